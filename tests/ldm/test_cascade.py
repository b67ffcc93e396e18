"""A stage of a cascade: against diffusers in one window, the same whatever the windows, and resumed."""

import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from ldm import unet
from ldm.cascade import Denoise, Sampling, Upsampler, Upsampling, WindowBatch, WindowDenoiser
from ldm.checkpoint import CheckpointInfo
from ldm.objective import NoiseSchedule

# Of diffusers' Euler scheduler, with numpy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

SHIFT, SCALE = (0.5, -0.5, 0.0), (1.0, 2.0, 0.5)
RESIDUAL_SHIFT, RESIDUAL_SCALE = (0.125, 0.0, -0.25), (0.5, 1.0, 0.25)
SCHEDULERS = ("ddim", "ddpm", "dpmpp", "euler", "flow_euler")
LOW = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32))


def upsampler(
    scheduler: str = "ddim", size: int = 8, size_multiple: int = 1, embedding_width: int | None = None
) -> Upsampler:
    """Twice as large, trained on (3, size, size)."""
    prediction = "flow" if scheduler == "flow_euler" else "v_prediction"
    info = CheckpointInfo(
        step=1, latent_shape=(3, size, size), shift=SHIFT, scale=SCALE, vae="f8", vae_fingerprint="0",
        class_names=None, upsampling_factor=2, max_noise_level=100, embedding_width=embedding_width,
        residual_shift=RESIDUAL_SHIFT, residual_scale=RESIDUAL_SCALE,
    )  # fmt: skip
    config = NoiseSchedule(prediction=prediction).scheduler_config()  # type: ignore[arg-type]
    return Upsampler(Path("upsampler"), info, config, size_multiple, "0")


def sampling(scheduler: str = "ddim", overlap: float = 0.25, **choices: int) -> Sampling:
    defaults = {"seed": 3, "num_inference_steps": 4, "noise_level": 20, "window_batch": 3}
    return Sampling(scheduler=scheduler, window_overlap=overlap, **{**defaults, **choices})


class Pointwise(nn.Module):
    """A "U-Net" whose prediction at a place depends on that place only, by exactly rounded operations."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.75))
        self.calls: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, timestep: Tensor, **rest: object) -> tuple[Tensor]:
        self.calls.append(tuple(x.shape))
        noisy, low = x.chunk(2, 1)
        labels = rest["class_labels"]
        assert isinstance(labels, Tensor)
        share = (timestep + labels).view(-1, 1, 1, 1) / 1024
        return ((noisy * self.gain + low * share) * 0.5,)


def local(model: nn.Module, made: Upsampler) -> Denoise:
    denoiser = WindowDenoiser(model, made.info)
    return lambda batches: map(denoiser, batches)


def result(upsampling: Upsampling, denoise: Denoise) -> Tensor:
    while not upsampling.trajectory.done:
        upsampling.step(denoise)
    return upsampling.latent_CHW


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = unet.build(
            "tiny", in_channels=6, out_channels=3, num_classes=None, num_noise_levels=1000, sample_size=8
        )
        return model.eval()


def test_one_window_is_a_plain_loop_of_diffusers(tiny: nn.Module) -> None:
    made = upsampler()
    low = LOW[:, :4, :4]
    upsampling = Upsampling(low, made, sampling(), stage=1)
    latent = upsampling.trajectory.latent[None].clone()
    shift, scale = torch.tensor(SHIFT).view(1, 3, 1, 1), torch.tensor(SCALE).view(1, 3, 1, 1)
    level = torch.tensor([20])
    augmented = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).add_noise((low[None] - shift) / scale, upsampling.low_noise_1Chw, level)  # fmt: skip
    repeated = augmented.repeat_interleave(2, 2).repeat_interleave(2, 3)
    base = F.interpolate(low[None], scale_factor=2, mode="bicubic")
    add, times = (torch.tensor(value).view(1, 3, 1, 1) for value in (RESIDUAL_SHIFT, RESIDUAL_SCALE))
    scheduler = DDIMScheduler.from_config({**made.scheduler_config, "clip_sample": False})
    scheduler.set_timesteps(4)
    denoise = local(tiny, made)
    for t in scheduler.timesteps:
        upsampling.step(denoise)
        with torch.no_grad():
            (prediction,) = tiny(
                torch.cat([latent, repeated], 1), t[None].float(),
                encoder_hidden_states=None, class_labels=level, return_dict=False,
            )  # fmt: skip
        stepped = scheduler.step(prediction, t, latent)
        latent = stepped.prev_sample
        clean = (stepped.pred_original_sample * times + add + base)[0]
        torch.testing.assert_close(upsampling.preview_CHW, clean, rtol=1e-5, atol=1e-5)
    assert torch.equal(upsampling.latent_CHW, (latent * times + add + base)[0])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_windows_do_not_matter_to_a_pointwise_model(scheduler: str) -> None:
    """10×14 latents in one call, and in windows of 4, 6 and 8, with every overlap."""
    model = Pointwise()
    whole = upsampler(scheduler, size=14)
    expected = result(Upsampling(LOW, whole, sampling(scheduler), 1), local(model, whole))
    assert model.calls == [(1, 6, 10, 14)] * 4
    for size in (4, 6, 8):
        for overlap in (0.0, 0.25, 0.5, 0.9):
            windows = upsampler(scheduler, size=size)
            upsampling = Upsampling(LOW, windows, sampling(scheduler, overlap), 1)
            assert torch.equal(result(upsampling, local(model, windows)), expected), (size, overlap)
    assert {shape[2:] for shape in model.calls[4:]} == {(4, 4), (6, 6), (8, 8)}


def test_the_batch_bounds_the_call() -> None:
    model, made = Pointwise(), upsampler(size=4)
    upsampling = Upsampling(LOW, made, sampling(window_batch=5), 1)
    upsampling.step(local(model, made))
    counts = [shape[0] for shape in model.calls]
    assert counts[:-1] == [5] * (len(counts) - 1) and 1 <= counts[-1] <= 5
    assert sum(counts) == len(upsampling.corners(0)) > 5


def test_windows_move_from_step_to_step_and_with_the_seed() -> None:
    upsampling = Upsampling(LOW, upsampler(size=6), sampling(), 1)
    steps = [upsampling.corners(index) for index in range(8)]
    assert steps == [upsampling.corners(index) for index in range(8)]
    assert len({tuple(corners) for corners in steps}) > 1
    other = Upsampling(LOW, upsampler(size=6), sampling(seed=4), 1)
    assert steps != [other.corners(index) for index in range(8)]


def test_noise_depends_on_seed_and_stage_and_not_on_windows() -> None:
    first = Upsampling(LOW, upsampler(size=4), sampling(), 1)
    same = Upsampling(LOW, upsampler(size=8), sampling(overlap=0.5, window_batch=1), 1)
    assert torch.equal(first.trajectory.latent, same.trajectory.latent)
    assert torch.equal(first.low_noise_1Chw, same.low_noise_1Chw)
    for other in (
        Upsampling(LOW, upsampler(), sampling(seed=4), 1),
        Upsampling(LOW, upsampler(), sampling(), 2),
    ):
        assert not torch.equal(first.trajectory.latent, other.trajectory.latent)
        assert not torch.equal(first.low_noise_1Chw, other.low_noise_1Chw)


def stored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Through a .npz, as a run stores it."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: value.numpy() for name, value in state.items()})  # type: ignore[arg-type]
    with np.load(io.BytesIO(buffer.getvalue()), allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_resumed_at_any_step_to_the_same_bits(scheduler: str) -> None:
    made, choice = upsampler(scheduler), sampling(scheduler, num_inference_steps=6)
    denoise = local(Pointwise(), made)
    undisturbed = Upsampling(LOW, made, choice, 1)
    states = []
    while not undisturbed.trajectory.done:
        undisturbed.step(denoise)
        states.append(stored(undisturbed.state()))
    for state in states[:-1]:
        resumed = Upsampling(LOW, made, choice, 1)
        resumed.restore(state)
        assert torch.equal(result(resumed, denoise), undisturbed.latent_CHW)


def backwards(denoise: Callable[[WindowBatch], Tensor]) -> Denoise:
    """A pool that happens to finish its last batch first."""

    def run(batches: Iterable[WindowBatch]) -> Iterator[Tensor]:
        waiting = list(batches)
        done = {index: denoise(waiting[index]) for index in reversed(range(len(waiting)))}
        return (done[index] for index in range(len(waiting)))

    return run


def test_a_pool_that_finishes_in_another_order_gives_the_same_bits(tiny: nn.Module) -> None:
    made = upsampler()
    serial, sharded = (Upsampling(LOW, made, sampling(), 1) for _ in range(2))
    other = backwards(WindowDenoiser(tiny, made.info))
    assert torch.equal(result(serial, local(tiny, made)), result(sharded, other))


def test_a_size_that_the_unet_cannot_take_is_padded(tiny: nn.Module) -> None:
    """5×7 becomes 6×8 with its last row and column repeated, and the result is cut again."""
    made = upsampler(size_multiple=4, size=16)
    cut = Upsampling(LOW, made, sampling(), 1)
    by_hand = torch.from_numpy(np.pad(LOW.numpy(), ((0, 0), (0, 1), (0, 1)), mode="edge"))
    padded = Upsampling(by_hand, made, sampling(), 1)
    denoise = local(tiny, made)
    assert torch.equal(result(cut, denoise), result(padded, denoise)[:, :10, :14])
    assert cut.latent_CHW.shape == (3, 10, 14)


def test_embeddings_are_the_null() -> None:
    seen = []

    class Model(Pointwise):
        def forward(self, x: Tensor, timestep: Tensor, **rest: object) -> tuple[Tensor]:
            seen.append((rest["encoder_hidden_states"], rest["class_labels"]))
            return super().forward(x, timestep, **rest)

    made = upsampler(embedding_width=6)
    Upsampling(LOW, made, sampling(), 1).step(local(Model(), made))
    for embeddings, labels in seen:
        assert isinstance(embeddings, Tensor) and isinstance(labels, Tensor)
        assert embeddings.shape == (len(labels), 1, 6) and not embeddings.any()
        assert set(labels.tolist()) == {20}


def test_preview_needs_a_step() -> None:
    with pytest.raises(ValueError, match="no step"):
        _ = Upsampling(LOW, upsampler(), sampling(), 1).preview_CHW
