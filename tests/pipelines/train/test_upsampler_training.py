"""Upsamplers: the loss against its formula, what the U-Net is told, and that they learn from pairs."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from ldm import checkpoint, unet
from ldm.checkpoint import CheckpointInfo
from ldm.errors import UserError
from pipelines.dataset import LatentDataset
from pipelines.generate import Request, check
from pipelines.train.config import UnetTraining
from pipelines.train.loader import LatentBatch
from pipelines.train.loss import loss_of
from pipelines.train.plan import build_unet, open_loader, plan
from pipelines.train.state import TrainState

CPU = torch.device("cpu")
DATA = {"validation_rows": 0, "size_px": 32, "low_size_px": 16}


def training(**options: object) -> UnetTraining:
    return UnetTraining.model_validate({"preset": "tiny", "batch_size": 8, "data": DATA, **options})


@pytest.fixture(scope="module")
def dataset(write_pairs: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    return LatentDataset.open(write_pairs(tmp_path_factory.mktemp("pairs") / "d", count=300))


@pytest.fixture(scope="module")
def info(dataset: LatentDataset) -> CheckpointInfo:
    return plan(dataset, training(), None)


@pytest.fixture(scope="module")
def model(info: CheckpointInfo) -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_unet(training(), info)


@pytest.fixture(scope="module")
def batch(dataset: LatentDataset) -> LatentBatch:
    return next(open_loader(dataset, training(condition_dropout=0.5)).batches(rank=0, world=1))


def loss_by_diffusers(
    model: UNet2DConditionModel, batch: LatentBatch, config: UnetTraining, info: CheckpointInfo
) -> Tensor:
    shift, scale = (torch.tensor(value).view(1, 3, 1, 1) for value in (info.shift, info.scale))
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert batch.low is not None
    level = torch.tensor([int(u * (config.max_noise_level + 1)) for u in batch.low.u_B.tolist()])
    low = scheduler.add_noise((batch.low.z_BChw - shift) / scale, batch.low.noise_BChw, level)
    residual = batch.z_BChw - F.interpolate(batch.low.z_BChw, scale_factor=2, mode="bicubic")
    assert info.residual_shift is not None and info.residual_scale is not None
    take, by = (torch.tensor(value).view(1, 3, 1, 1) for value in (info.residual_shift, info.residual_scale))
    x0, noise = (residual - take) / by, batch.noise_BChw
    if config.prediction == "flow":
        t = 1000 * batch.u_B
        sigma = batch.u_B.view(-1, 1, 1, 1)
        noisy, target = (1 - sigma) * x0 + sigma * noise, noise - x0
    else:
        t = (1000 * batch.u_B).long()
        noisy, target = scheduler.add_noise(x0, noise, t), scheduler.get_velocity(x0, noise, t)
    seen = torch.cat([noisy, low.repeat_interleave(2, 2).repeat_interleave(2, 3)], 1)
    prediction = model(seen, t, encoder_hidden_states=None, class_labels=level, return_dict=False)[0]
    return (prediction - target).square().mean((1, 2, 3))


@pytest.mark.parametrize("prediction", ["v_prediction", "flow"])
@pytest.mark.parametrize("max_noise_level", [0, 350, 999])
def test_loss_is_that_of_diffusers_schedulers(
    dataset: LatentDataset,
    model: UNet2DConditionModel,
    batch: LatentBatch,
    prediction: str,
    max_noise_level: int,
) -> None:
    config = training(prediction=prediction, min_snr_gamma=None, max_noise_level=max_noise_level)
    info = plan(dataset, config, None)
    with torch.no_grad():
        loss, expected = (
            of(model, batch, config, info) for of in (lambda *args: loss_of(*args, CPU), loss_by_diffusers)
        )
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_the_level_reaches_the_unet(
    model: UNet2DConditionModel, batch: LatentBatch, info: CheckpointInfo
) -> None:
    """With nothing to scale, a level changes what the U-Net is told, and nothing else."""
    assert batch.low is not None
    silent = replace(batch.low, noise_BChw=torch.zeros_like(batch.low.noise_BChw), z_BChw=shifts(info, batch))

    def loss(u: float) -> Tensor:
        low = replace(silent, u_B=torch.full((8,), u))
        with torch.no_grad():
            return loss_of(model, replace(batch, low=low), training(), info, CPU)

    assert (loss(0.1) - loss(0.9)).abs().min() > 1e-5
    assert torch.equal(loss(0.1), loss(0.1))


def shifts(info: CheckpointInfo, batch: LatentBatch) -> Tensor:
    """Low-resolution latents that whitening makes 0, at which no noise level scales anything."""
    assert batch.low is not None
    return torch.tensor(info.shift).view(1, 3, 1, 1).expand_as(batch.low.z_BChw)


def test_every_weight_gets_a_gradient(
    model: UNet2DConditionModel, batch: LatentBatch, info: CheckpointInfo
) -> None:
    model.zero_grad()
    loss_of(model, batch, training(), info, CPU).mean().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_labels_do_not_matter_and_embeddings_do(batch: LatentBatch, info: CheckpointInfo) -> None:
    """Where the condition is dropped the embeddings go, and the noise level stays."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        told = info.model_copy(update={"embedding_width": 6})
        model = build_unet(training(), told)
    assert {True, False} == set(batch.keep_B.tolist())
    rng = np.random.default_rng(0)

    def loss(seen: LatentBatch) -> Tensor:
        some = tuple(rng.standard_normal((2, 6)).astype(np.float16) for _ in range(8))
        with torch.no_grad():
            return loss_of(model, replace(seen, embeddings_B=some), training(), told, CPU)

    first, second = loss(batch), loss(replace(batch, labels_B=1 - batch.labels_B))
    assert torch.equal(first == second, ~batch.keep_B)
    assert batch.low is not None
    third = loss(replace(batch, low=replace(batch.low, u_B=1 - batch.low.u_B)))
    assert (third != first).all()


def test_plan_says_what_a_sampler_needs(dataset: LatentDataset) -> None:
    config = training(max_noise_level=200)
    info = plan(dataset, config, None)
    assert info.latent_shape == (3, 8, 8)
    assert (info.upsampling_factor, info.max_noise_level, info.class_names) == (2, 200, None)
    layout = build_unet(config, info).config
    assert (layout["in_channels"], layout["out_channels"], layout["num_class_embeds"]) == (6, 3, 1000)
    plain = plan(dataset, training(data=DATA | {"low_size_px": None}), None)
    assert (plain.upsampling_factor, plain.max_noise_level, plain.class_names) == (None, None, ("cat", "dog"))
    assert (plain.residual_shift, plain.residual_scale) == (None, None)


def test_the_residual_is_whitened_by_its_own_statistics(dataset: LatentDataset, info: CheckpointInfo) -> None:
    """Over all rows, which are no more than those that the statistics are taken from."""
    batches = islice(open_loader(dataset, training()).batches(rank=0, world=1), 37)
    residuals = torch.cat([
        batch.z_BChw - F.interpolate(batch.low.z_BChw, scale_factor=2, mode="bicubic")
        for batch in batches if batch.low is not None
    ])  # fmt: skip
    white = info.residual_whitening.normalise(residuals)
    torch.testing.assert_close(white.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=0.02)
    torch.testing.assert_close(white.std((0, 2, 3)), torch.ones(3), rtol=0.02, atol=0)


def test_init_must_be_an_upsampler(dataset: LatentDataset, info: CheckpointInfo, tmp_path: Path) -> None:
    plain = unet.build("tiny", in_channels=3, num_classes=2, sample_size=8)
    unet.save(plain, tmp_path / "plain")
    unet.save(build_unet(training(), info), tmp_path / "upsampler")
    planned = plan(dataset, training(init=str(tmp_path / "upsampler")), None)
    assert planned == info.model_copy(update={"init_fingerprint": planned.init_fingerprint})
    said = r"plain does not fit the dataset: in_channels 3, not 6; num_class_embeds 3, not 1000"
    with pytest.raises(UserError, match=said):
        plan(dataset, training(init=str(tmp_path / "plain")), None)
    said = "in_channels 6, not 3; num_class_embeds 1000, not 3"
    with pytest.raises(UserError, match=said):
        plan(dataset, training(init=str(tmp_path / "upsampler"), data=DATA | {"low_size_px": None}), None)


@pytest.mark.parametrize("level", [-1, 1000])
def test_a_level_that_the_schedule_does_not_have(level: int) -> None:
    with pytest.raises(ValidationError, match="max_noise_level"):
        training(max_noise_level=level)


def shuffled(batches: Iterator[LatentBatch]) -> Iterator[LatentBatch]:
    """Every row with the low-resolution latent of its neighbour."""
    for batch in batches:
        assert batch.low is not None
        yield replace(batch, low=replace(batch.low, z_BChw=batch.low.z_BChw.roll(1, 0)))


def final_loss(
    dataset: LatentDataset,
    config: UnetTraining,
    info: CheckpointInfo,
    see: Callable[[Iterator[LatentBatch]], Iterator[LatentBatch]],
) -> float:
    state = TrainState(config, info, CPU)
    batches = see(open_loader(dataset, config).batches(rank=0, world=1))
    losses = [state.step(batch, step)[0] for step, batch in enumerate(islice(batches, config.steps), 1)]
    return float(torch.stack(losses[-10:]).mean())


def test_pairs_are_learned_from(dataset: LatentDataset) -> None:
    """High is low repeated, plus a tenth of detail. Shuffled pairs have all but the relation of the two."""
    config = training(
        steps=40, learning_rate=3e-3, warmup_steps=5, schedule="constant", min_snr_gamma=None,
        max_noise_level=20,
    )  # fmt: skip
    info = plan(dataset, config, None)
    paired = final_loss(dataset, config, info, iter)
    unpaired = final_loss(dataset, config, info, shuffled)
    assert paired < 0.5 * unpaired, (paired, unpaired)


def test_a_checkpoint_says_that_it_is_an_upsampler(
    info: CheckpointInfo, model: UNet2DConditionModel, tmp_path: Path
) -> None:
    scheduler = training().noise_schedule.scheduler_config()
    checkpoint.save(tmp_path, ema=model, last=model, scheduler_config=scheduler, info=info)
    assert checkpoint.read_info(tmp_path) == info
    assert unet.load(tmp_path).config["num_class_embeds"] == 1000
    with pytest.raises(
        UserError, match=r"which cannot be sampled alone; enlarge something with it: ldm upscale "
    ):
        check(tmp_path, [Request(None, 0, 1.0, 4, "ddim")], None)
