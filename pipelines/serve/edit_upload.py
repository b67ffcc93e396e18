"""``POST /v1/images/edits``: a form with an image, maybe a mask, and the fields of a generation."""

import asyncio
from typing import Annotated, Literal

import numpy as np
import torch
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException

from ldm.editing import latent_mask
from ldm.errors import BadSampleError
from ldm.images import DAMAGE, decode_image, open_image, padded
from ldm.model_card import ModelCard
from pipelines.serve.api_errors import ApiError
from pipelines.serve.generation_request import GenerationRequest
from pipelines.serve.image_maker import EditInput
from pipelines.serve.server import Server

__all__ = ["EditRequest", "read_edit"]

HALF = 128
# Of SDEdit, where nothing says which part is to change: enough to change, little enough to know it again.
STRENGTH_WITHOUT_MASK = 0.75


class EditRequest(GenerationRequest):
    """Fields of the form. ``input_fidelity`` is accepted, and changes nothing."""

    strength: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = Field(
        None, description="share of the steps that are taken; default 1 with a mask, 0.75 without"
    )
    input_fidelity: Literal["high", "low"] | None = None


async def read_edit(http: Request, server: Server) -> tuple[EditRequest, EditInput]:
    """What is asked for, and on what. ApiError 400 for an image or a mask that is none, or does not fit."""
    try:
        form = await http.form(max_files=2, max_fields=40)
    except MultiPartException as error:
        raise ApiError(400, f"no form that can be read: {error.message}", code="invalid_form") from error
    async with _closing(form):
        request = _fields(form, server)
        if request.upscale_to is not None:
            raise ApiError(400, "upscale_to with an edit; allowed: none", param="upscale_to")
        image, mask = await _file(form, "image"), await _file(form, "mask")
    if image is None:
        raise ApiError(400, "image: a file is missing", param="image", code="missing")
    card = server.cards.get(request.model or next(iter(server.cards)))
    if card is None:
        raise ApiError(404, "no such model", param="model", code="model_not_found")
    edit = await asyncio.to_thread(_edit, image, mask, request, card, server.config.limits.max_side_px)
    height, width = edit.image_HW3.shape[:2]
    if request.size not in ("auto", f"{width}x{height}"):
        raise ApiError(
            400, f"size {request.size}; allowed: auto, or the image's {width}x{height}", param="size"
        )
    return request.model_copy(update={"size": "auto"}), edit


class _closing:
    """The form's files are gone after the block."""

    def __init__(self, form: FormData) -> None:
        self.form = form

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None:
        await self.form.close()


def _fields(form: FormData, server: Server) -> EditRequest:
    texts = {name: value for name, value in form.items() if isinstance(value, str)}
    try:
        return EditRequest.model_validate(texts, context={"limits": server.config.limits})
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from error


async def _file(form: FormData, name: str) -> bytes | None:
    # The name with brackets is what OpenAI's client gives to a list of images.
    upload = form.get(name) or form.get(f"{name}[]")
    return await upload.read() if isinstance(upload, UploadFile) else None


def _edit(
    image: bytes, mask: bytes | None, request: EditRequest, card: ModelCard, max_side_px: int
) -> EditInput:
    image_HW3 = _image(image, max_side_px)
    mask_HW = None if mask is None else _mask(mask, image_HW3.shape[:2], max_side_px)
    multiple = card.size_multiple_px
    area = None if mask_HW is None else torch.from_numpy(padded(mask_HW.astype(np.uint8), multiple))
    strength = request.strength
    if strength is None:
        strength = STRENGTH_WITHOUT_MASK if mask is None else 1.0
    return EditInput(
        image_HW3=image_HW3,
        mask_HW=mask_HW,
        padded_HW3=padded(image_HW3, multiple),
        latent_mask_hw=None if area is None else latent_mask(area, card.f).numpy(),
        strength=strength,
    )


def _image(data: bytes, max_side_px: int) -> NDArray[np.uint8]:
    try:
        image = decode_image(data, max_pixels=max_side_px**2)
    except BadSampleError as error:
        raise ApiError(400, f"image: {error}", param="image", code=error.reason) from error
    if max(image.size) > max_side_px:
        raise ApiError(400, f"image: {_size(image)}; allowed: sides up to {max_side_px}", param="image")
    return np.asarray(image)


def _mask(data: bytes, shape_HW: tuple[int, ...], max_side_px: int) -> NDArray[np.bool_]:
    """True where it is transparent, as OpenAI has it; of a mask without transparency, where it is white."""
    try:
        image = open_image(data, max_pixels=max_side_px**2)
        if image.has_transparency_data:
            mask_HW = np.asarray(image.convert("RGBA").getchannel("A")) < HALF
        else:
            mask_HW = np.asarray(image.convert("L")) >= HALF
    except BadSampleError as error:
        raise ApiError(400, f"mask: {error}", param="mask", code=error.reason) from error
    except DAMAGE as error:
        raise ApiError(400, "mask: damaged", param="mask", code="damaged_image") from error
    if mask_HW.shape != shape_HW:
        allowed = f"{shape_HW[1]}x{shape_HW[0]}, which the image is"
        raise ApiError(400, f"mask: {_size(image)}; allowed: {allowed}", param="mask", code="mask_size")
    if not mask_HW.any():
        raise ApiError(400, "mask: nothing in it is to be changed", param="mask", code="empty_mask")
    return mask_HW


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
