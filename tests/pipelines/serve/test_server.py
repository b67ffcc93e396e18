"""The whole server, by the clients that people have: `openai`, and plain HTTP."""

import base64
import io
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from numpy.typing import NDArray
from openai import APIStatusError, OpenAI
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from ray.serve.schema import TracingConfig
from torch import Tensor

from ldm import autoencoder, checkpoint, unet
from ldm.cascade import Sampling, Upsampler, Upsampling, WindowDenoiser
from ldm.image_tensors import from_model
from ldm.images import encode_png
from pipelines.serve.config import (
    JobsConfig,
    ModelSource,
    SamplerPool,
    ServeConfig,
    StagePool,
    UpsamplerStage,
)
from pipelines.serve.generation_request import Limits
from tests.pipelines.serve.span_files import Span, spans_of

# The server runs in other processes, which the shared cluster keeps; nothing of theirs ends here.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

DEADLINE_S = 60.0
WAIT_MS = 30_000
CHROMIUM = shutil.which("chromium")
MAX_STEPS = 1000


@pytest.fixture(scope="module")
def served_config(
    checkpoint_folders: dict[str, Path],
    save_upsampler: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> ServeConfig:
    """Images of 32 px by default; two models, of v-prediction and of a flow; one upsampler, × 2."""
    return ServeConfig(
        models={name: ModelSource(folder=folder) for name, folder in checkpoint_folders.items()},
        ingress=StagePool(num_cpus=0.1, max_ongoing=1000),
        sampler=SamplerPool(num_cpus=1, threads=1, max_rows=8),
        decoder=StagePool(num_cpus=0.5, threads=1),
        upsamplers=(UpsamplerStage(checkpoint=save_upsampler(1), steps=4, num_cpus=0.5, threads=1),),
        limits=Limits(sizes_multiple_px=4, max_side_px=256, max_steps=MAX_STEPS),
        jobs=JobsConfig(url=str(tmp_path_factory.mktemp("jobs"))),
    )


@pytest.fixture(scope="module")
def server_url(ray_cluster: None, served_config: ServeConfig) -> Iterator[str]:
    """Of a running server without keys."""
    from jobs.cluster import ClusterConfig
    from jobs.serve import serving
    from pipelines.serve.application import Checked

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    # Only what a client asks to be traced is.
    tracing = TracingConfig(enabled=True, sampling_ratio=0.0)
    with serving(Checked(served_config), ClusterConfig(), "127.0.0.1", port, tracing):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def client(server_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(server_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server_url, timeout=DEADLINE_S) as http:
        yield http


def _pixels(b64_json: str | None) -> NDArray[np.uint8]:
    assert b64_json is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))))


def _latent_alone(config: ServeConfig, label: int, seed: int, steps: int, guidance: float) -> Tensor:
    """What diffusers' own scheduler makes in a plain loop: (1, C, h, w), in the VAE's scale."""
    folder = config.models["v_prediction"].folder
    info, model = checkpoint.read_info(folder), unet.load(folder).eval()
    scheduler = DDIMScheduler.from_config(checkpoint.read_scheduler_config(folder), clip_sample=False)
    scheduler.set_timesteps(steps)
    x = torch.randn((1, *info.latent_shape), generator=torch.Generator().manual_seed(seed))
    assert info.class_names is not None
    labels = torch.tensor([label, len(info.class_names)])
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            yes, no = model(torch.cat([x, x]), timestep, None, class_labels=labels).sample
            x = scheduler.step((no + guidance * (yes - no))[None], timestep, x).prev_sample
    return info.whitening.denormalise(x)


def _decoded(config: ServeConfig, latent_1Chw: Tensor) -> NDArray[np.uint8]:
    vae = checkpoint.read_info(config.models["v_prediction"].folder).vae
    return from_model(autoencoder.load(vae).decode(latent_1Chw))[0]


def _alone(config: ServeConfig, label: int, seed: int, steps: int, guidance: float) -> NDArray[np.uint8]:
    return _decoded(config, _latent_alone(config, label, seed, steps, guidance))


def _upsampled(config: ServeConfig, latent_1Chw: Tensor, seed: int) -> NDArray[np.uint8]:
    (stage,) = config.upsamplers
    upsampler = Upsampler.read(stage.checkpoint)
    sampling = Sampling(
        seed=seed,
        num_inference_steps=stage.steps,
        scheduler=upsampler.default_scheduler,
        noise_level=0,
        window_overlap=stage.window_overlap,
        window_batch=stage.window_batch,
    )
    upsampling = Upsampling(latent_1Chw[0], upsampler, sampling, stage=1)
    denoiser = WindowDenoiser(unet.load(stage.checkpoint), upsampler.info)
    while not upsampling.trajectory.done:
        upsampling.step(lambda batches: map(denoiser, batches))
    return _decoded(config, upsampling.latent_CHW[None])


def _same(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> bool:
    difference = np.abs(a.astype(int) - b.astype(int))
    return bool(difference.max() <= 1 and (difference == 0).mean() >= 0.999)


def test_images_are_what_diffusers_own_loop_makes(client: OpenAI, served_config: ServeConfig) -> None:
    made = client.images.generate(
        prompt="dog", n=3, extra_body={"seed": 11, "num_inference_steps": 8, "guidance_scale": 2.5}
    )
    assert made.data is not None and len(made.data) == 3
    for offset, image in enumerate(made.data):
        assert _same(_pixels(image.b64_json), _alone(served_config, 1, 11 + offset, 8, 2.5))


def test_models_tell_what_they_take(client: OpenAI) -> None:
    models = {model.id: model.to_dict() for model in client.models.list()}
    assert set(models) == {"v_prediction", "flow"}
    assert models["v_prediction"]["classes"] == ["cat", "dog"]
    assert models["flow"]["schedulers"] == ["flow_euler"]
    assert client.models.retrieve("flow").id == "flow"


def test_another_model_by_its_name(client: OpenAI) -> None:
    made = client.images.generate(prompt="", model="flow", extra_body={"num_inference_steps": 4})
    assert made.data is not None and _pixels(made.data[0].b64_json).shape == (32, 32, 3)


def test_a_stream_has_previews_and_then_the_image(client: OpenAI) -> None:
    asked = {"seed": 3, "num_inference_steps": 24}
    events = list(client.images.generate(prompt="cat", stream=True, partial_images=3, extra_body=asked))
    kinds = [event.type for event in events]
    assert kinds[-1] == "image_generation.completed"
    assert kinds[:-1] == ["image_generation.partial_image"] * len(kinds[:-1]) and 1 <= len(kinds) - 1 <= 3
    assert _pixels(events[0].b64_json).shape == (8, 8, 3)
    whole = client.images.generate(prompt="cat", extra_body=asked)
    assert whole.data is not None
    assert np.array_equal(_pixels(events[-1].b64_json), _pixels(whole.data[0].b64_json))


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_other_formats(client: OpenAI, output_format: str) -> None:
    made = client.images.generate(
        prompt="", output_format=output_format, output_compression=80, extra_body={"num_inference_steps": 2}
    )  # type: ignore[call-overload]
    file = base64.b64decode(made.data[0].b64_json)
    assert Image.open(io.BytesIO(file)).format == output_format.upper()


def test_an_edit_leaves_alone_what_the_mask_covers(client: OpenAI, photo: Callable[[int], bytes]) -> None:
    rgba = np.zeros((32, 40, 4), np.uint8)
    rgba[..., 3] = 255
    rgba[8:24, 8:24, 3] = 0
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "PNG")
    edited = client.images.edit(
        image=("image.png", photo(1)),
        mask=("mask.png", buffer.getvalue()),
        prompt="dog",
        extra_body={"seed": 1, "num_inference_steps": 6},
    )
    assert edited.data is not None
    before = np.asarray(Image.open(io.BytesIO(photo(1))).convert("RGB"))
    after = _pixels(edited.data[0].b64_json)
    changed = (after != before).any(axis=2)
    assert changed[8:24, 8:24].mean() > 0.9
    changed[8:24, 8:24] = False
    assert not changed.any()


def test_a_job_makes_the_same_image(http: httpx.Client, client: OpenAI) -> None:
    body = {"prompt": "cat", "seed": 21, "num_inference_steps": 10}
    job = http.post("/v1/jobs", json=body)
    assert job.status_code == 202
    path = f"/v1/jobs/{job.json()['id']}"
    found = _finished(http, path)
    assert found["status"] == "completed" and found["size"] == "32x32" and found["progress"] == 1
    made = client.images.generate(prompt="cat", extra_body=body | {"prompt": "cat"})
    assert made.data is not None
    content = http.get(f"{path}/content")
    assert content.headers["content-type"] == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content.content))), _pixels(made.data[0].b64_json))
    assert "512" in http.get(f"{path}/tiles.dzi").text
    assert http.get(f"{path}/tiles_files/0/0_0.jpg").headers["content-type"] == "image/jpeg"
    assert http.get(f"{path}/preview").headers["content-type"] == "image/png"
    assert path.endswith(http.get("/v1/jobs").json()["data"][0]["id"])


def _finished(http: httpx.Client, path: str) -> dict[str, Any]:
    end = time.monotonic() + DEADLINE_S
    while (found := http.get(path).json())["status"] not in ("completed", "failed", "cancelled"):
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return dict(found)


def test_a_job_goes_through_the_cascade(http: httpx.Client, served_config: ServeConfig) -> None:
    """To the image that the upsampler's own class makes of the same latent."""
    body = {"prompt": "cat", "seed": 4, "num_inference_steps": 6, "upscale_to": 64, "output_format": "webp"}
    path = f"/v1/jobs/{http.post('/v1/jobs', json=body).json()['id']}"
    assert _finished(http, path)["size"] == "64x64"
    content = http.get(f"{path}/content")
    assert content.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(content.content)).size == (64, 64)
    online = http.post("/v1/images/generations", json=body | {"output_format": "png"}).json()
    made = _pixels(online["data"][0]["b64_json"])
    assert made.shape == (64, 64, 3)
    assert _same(made, _upsampled(served_config, _latent_alone(served_config, 0, 4, 6, 3.0), seed=4))


def test_a_cancelled_job_stops(http: httpx.Client) -> None:
    before = _cancellations(http)
    path = f"/v1/jobs/{http.post('/v1/jobs', json={'num_inference_steps': MAX_STEPS}).json()['id']}"
    _wait_for(lambda: http.get(path).json()["progress"] > 0)
    http.post(f"{path}/cancel")
    assert _finished(http, path)["status"] == "cancelled"
    _wait_for(lambda: _cancellations(http) == before + 1)


BAD = {
    "size": ({"size": "100000x10000"}, 400),
    "steps": ({"num_inference_steps": 10**9}, 400),
    "seed": ({"seed": 2**70}, 400),
    "n": ({"n": 10**6}, 400),
    "class": ({"class_label": 99}, 400),
    "scheduler": ({"scheduler": "flow_euler"}, 400),
    "model": ({"model": "gpt-image-1"}, 404),
    "unknown field": ({"sead": 1}, 400),
    "upscale": ({"upscale_to": 128}, 400),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_told_what_is_allowed(client: OpenAI, name: str) -> None:
    body, status = BAD[name]
    with pytest.raises(APIStatusError) as refused:
        client.images.generate(prompt="", extra_body=body)
    assert refused.value.status_code == status
    assert len(refused.value.message.splitlines()) == 1


@pytest.mark.parametrize(
    "body", [b'{"guidance_scale": NaN}', b"[" * 10_000, b"\xff\xfe", b"", b'{"n": {"n": 1}}', b"null"]
)
def test_hostile_json(http: httpx.Client, body: bytes) -> None:
    answer = http.post("/v1/images/generations", content=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_a_body_that_is_too_large_is_not_read(server_url: str) -> None:
    url = httpx.URL(server_url)
    with socket.create_connection((url.host, url.port), timeout=DEADLINE_S) as connection:
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: {2**30}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(64).startswith(b"HTTP/1.1 413")


def test_a_bomb_and_a_mask_of_another_size(client: OpenAI, photo: Callable[[int], bytes]) -> None:
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    for files in (
        {"image": ("bomb.png", bomb.getvalue())},
        {"image": ("image.png", photo(1)), "mask": ("mask.png", encode_png(np.zeros((8, 8, 3), np.uint8)))},
        {"image": ("image.png", b"not an image")},
    ):
        with pytest.raises(APIStatusError) as refused:
            client.images.edit(prompt="", **files)  # type: ignore[call-overload]
        assert refused.value.status_code == 400


def _samples(http: httpx.Client, name: str) -> dict[str, float]:
    """Values of a metric, summed over replicas; every name of which there is a sample."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return {key: value for key, value in found.items() if key.startswith(name)}


def _cancellations(http: httpx.Client) -> float:
    """Of requests that a sampler had begun. Whoever cancels one waits for it here: counts come late."""
    name = "ray_ldm_serve_cancellations_total"
    return _samples(http, name).get(name, 0.0)


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_metrics_are_what_prometheus_reads(http: httpx.Client, client: OpenAI) -> None:
    client.images.generate(prompt="", extra_body={"num_inference_steps": 2})
    wanted = {"step_seconds_count", "queue_seconds_count", "batch_fill_count", "stage_seconds_count"}
    prefix = "ray_ldm_serve_"
    _wait_for(lambda: {prefix + name for name in wanted} <= _samples(http, prefix).keys())


TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_a_trace_goes_on_through_all_stages(http: httpx.Client) -> None:
    """From the client's span: ingress, sampler, upsampler, decoder, each below the one that asked it."""
    body = {"prompt": "cat", "seed": 40, "num_inference_steps": 6, "upscale_to": 64}
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "x-request-id": "traced"}
    assert http.post("/v1/images/generations", json=body, headers=headers).status_code == 200
    stages = {"ingress", "sampler", "upsampler-1", "decoder"}
    _wait_for(lambda: stages <= {span.stage for span in spans_of(TRACE)})
    spans = {span.id: span for span in spans_of(TRACE)}
    assert {span.attributes["request_id"] for span in spans.values()} == {"traced"}

    def stages_above(span: Span) -> list[str]:
        """That had the request before, nearest first; the client at the end."""
        if span.parent_id == CALLER:
            return ["client"]
        above = spans[span.parent_id]
        return [*([above.stage] if above.stage else []), *stages_above(above)]

    found = {span.stage: span for span in spans.values() if span.stage}
    assert {name: stages_above(span) for name, span in found.items()} == {
        "ingress": ["client"],
        "sampler": ["ingress", "client"],
        "upsampler-1": ["ingress", "client"],
        "decoder": ["ingress", "client"],
    }
    assert found["ingress"].ours == {"status": 200}
    sampler, upsampler, decoder = (found[name].ours for name in ("sampler", "upsampler-1", "decoder"))
    assert (sampler["steps"], sampler["batch_rows"], sampler["model"]) == (6, 2, "v_prediction")
    assert (upsampler["steps"], decoder["pixels"]) == (4, 64 * 64)
    assert all(stage["queue_s"] >= 0 for stage in (sampler, upsampler, decoder))


def test_what_no_client_asks_for_is_not_traced(http: httpx.Client) -> None:
    other = TRACE[::-1]
    for flags in ("00", None):
        headers = {"x-request-id": "not-traced"}
        headers |= {"traceparent": f"00-{other}-{CALLER}-{flags}"} if flags else {}
        answer = http.post("/v1/images/generations", json={"num_inference_steps": 2}, headers=headers)
        assert answer.status_code == 200
    assert spans_of(other) == []
    assert "not-traced" not in {span.attributes.get("request_id") for span in spans_of(None)}


def test_whoever_leaves_has_cancelled(http: httpx.Client) -> None:
    before = _cancellations(http)
    body = {"num_inference_steps": MAX_STEPS, "stream": True, "partial_images": 50, "seed": 77}
    with http.stream("POST", "/v1/images/generations", json=body) as answer:
        next(answer.iter_lines())
    _wait_for(lambda: _cancellations(http) == before + 1)


def test_who_sends_slowly_holds_nobody_up(server_url: str, http: httpx.Client) -> None:
    url = httpx.URL(server_url)
    slow = [socket.create_connection((url.host, url.port), timeout=DEADLINE_S) for _ in range(50)]
    try:
        for index, connection in enumerate(slow):
            head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\n"
            half = head if index % 2 else f"{head}Content-Length: 100\r\n\r\n{{"
            connection.sendall(half.encode())
        assert http.get("/healthz").status_code == 200
        assert http.post("/v1/images/generations", json={"num_inference_steps": 2}).status_code == 200
    finally:
        for connection in slow:
            connection.close()


def test_health_and_the_page(http: httpx.Client) -> None:
    health = http.get("/healthz", headers={"x-request-id": "mine"})
    assert health.json() == {"status": "ok"}
    assert health.headers.get_list("x-request-id") == ["mine"]
    assert http.get("/readyz").status_code == 200
    page = http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert http.get("/page/app.js").status_code == 200
    assert http.get("/page/../../config.py").status_code == 404


@pytest.mark.skipif(CHROMIUM is None, reason="no browser for the page: apt install chromium")
def test_a_visitor_makes_an_image_and_finds_it_again_by_its_seed(server_url: str, tmp_path: Path) -> None:
    from playwright import sync_api

    faults: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: "Policy" in message.text and faults.append(message.text))
        page.goto(server_url)
        page.get_by_label("Model", exact=True).select_option("v_prediction")
        page.get_by_label("Class", exact=True).select_option("dog")
        page.get_by_label("Steps", exact=True).fill("40")
        page.get_by_label("Seed", exact=True).fill("7")
        page.get_by_role("button", name="Generate", exact=True).click()
        image = page.locator("#gallery img[src^='blob:']")
        sync_api.expect(image).to_have_count(1, timeout=WAIT_MS)
        assert image.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [32, 32]
        sync_api.expect(page.get_by_role("button", name="Seed 7")).to_be_visible()
        page.screenshot(path=tmp_path / "page.png")
        browser.close()
    assert faults == []
