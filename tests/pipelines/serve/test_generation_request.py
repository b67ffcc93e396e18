import json

import pytest
from pydantic import ValidationError

from pipelines.serve.generation_request import GenerationRequest, Limits

LIMITS = Limits(max_side_px=1024, max_steps=100)


def _parse(body: str) -> GenerationRequest:
    return GenerationRequest.model_validate_json(body, context={"limits": LIMITS})


def test_what_openai_clients_send() -> None:
    request = _parse(json.dumps({"prompt": "a lighthouse", "n": 3, "size": "512x256", "quality": "high"}))

    assert (request.size_px, request.n, request.response_format) == ((256, 512), 3, "b64_json")


def test_extensions_reach_their_bounds() -> None:
    body = {"seed": 2**63 - 1, "num_inference_steps": 100, "guidance_scale": 0, "scheduler": "dpmpp"}

    assert _parse(json.dumps(body)).num_inference_steps == 100


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ('{"size": "100000x10000"}', "multiples of 64 from 64 to 1024"),
        ('{"size": "0x64"}', "multiples of 64"),
        ('{"size": "65x64"}', "multiples of 64"),
        ('{"size": "64"}', "WIDTHxHEIGHT"),
        ('{"size": "-64x64"}', "WIDTHxHEIGHT"),
        ('{"size": "٦٤x64"}', "WIDTHxHEIGHT"),
        ('{"num_inference_steps": 1000000000}', "at most 100"),
        ('{"num_inference_steps": 0}', "greater than 0"),
        ('{"guidance_scale": NaN}', "finite"),
        ('{"guidance_scale": Infinity}', "finite"),
        ('{"guidance_scale": -1}', "greater than or equal to 0"),
        ('{"guidance_scale": 1e300}', "at most 50"),
        ('{"seed": 1180591620717411303424}', "seed"),
        ('{"seed": -1}', "greater than or equal to 0"),
        ('{"n": 1000000}', "at most 4"),
        ('{"n": "many"}', "integer"),
        ('{"scheduler": "magic"}', "allowed: ddim"),
        ('{"partial_images": 2}', "stream=true"),
        ('{"partial_images": 51, "stream": true}', "less than or equal to 50"),
        ('{"deadline_s": 0}', "greater than 0"),
        ('{"upscale_to": 100000}', "at most 8192"),
        ('{"surprise": 1}', "Extra inputs"),
        ('{"prompt": {"$gt": ""}}', "string"),
        ('["prompt"]', "object"),
        ("{", "JSON"),
        ("[" * 100_000, "recursion"),
        (json.dumps({"prompt": "a" * 5000}), "at most 4000"),
    ],
)
def test_bad_requests_are_refused_before_any_work(body: str, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        _parse(body)
