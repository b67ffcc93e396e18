"""From bytes to plans, and from refusals to answers."""

import math

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from pipelines.serve.api_errors import ApiError, restarting
from pipelines.serve.generation_request import GenerationRequest, Limits
from pipelines.serve.image_plan import ImagePlan, Refusal, plan_images
from pipelines.serve.messages import Rejected
from pipelines.serve.server import Server

__all__ = ["parsed", "planned", "rejected"]


def parsed(body: bytes, limits: Limits) -> GenerationRequest:
    """RequestValidationError, which is answered with 400."""
    try:
        return GenerationRequest.model_validate_json(body, context={"limits": limits})
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from error


def planned(request: GenerationRequest, server: Server) -> list[ImagePlan]:
    """ApiError 400, or 404 for a model that is not there."""
    try:
        return plan_images(request, server.cards, server.config, server.factors)
    except Refusal as refusal:
        is_model = refusal.param == "model"
        code = "model_not_found" if is_model else "invalid_value"
        raise ApiError(404 if is_model else 400, str(refusal), param=refusal.param, code=code) from refusal


def rejected(event: Rejected) -> ApiError:
    """429 or 503 with Retry-After; 504 for what was accepted and came too late."""
    if event.reason == "late":
        return ApiError(504, "the deadline passed before the image was done", code="deadline_missed")
    retry_after_s = max(1, math.ceil(event.retry_after_s))
    if event.reason == "draining":
        return restarting(retry_after_s)
    retry = {"Retry-After": str(retry_after_s)}
    if event.reason == "deadline":
        message = "the deadline cannot be met now; try again later, or allow more time"
        return ApiError(429, message, param="deadline_s", code="deadline_cannot_be_met", headers=retry)
    return ApiError(429, "as many images as this server takes are on their way", code="full", headers=retry)
