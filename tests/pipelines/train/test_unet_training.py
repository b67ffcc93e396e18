"""U-Net training: the loss against its formula, its share over ranks, what is refused, one real run."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from pydantic import ValidationError
from torch import Tensor

from ldm import unet
from ldm.checkpoint import CheckpointInfo, read_info
from ldm.errors import UserError
from pipelines.dataset import LatentDataset
from pipelines.train.config import UnetTraining
from pipelines.train.loader import LatentBatch
from pipelines.train.loss import loss_of
from pipelines.train.plan import open_loader, plan
from pipelines.train.progress import DivergedError
from pipelines.train.state import TrainState
from pipelines.train.unet import METRICS_FILE, export, fit, loop_of

CPU = torch.device("cpu")
NULL = 2


def training(**options: object) -> UnetTraining:
    values: dict[str, object] = {"preset": "tiny", "batch_size": 8, "data": {"validation_rows": 0}, **options}
    return UnetTraining.model_validate(values)


@pytest.fixture
def dataset(latent_folder: Path) -> LatentDataset:
    return LatentDataset.open(latent_folder)


@pytest.fixture(scope="module")
def model() -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return unet.build("tiny", in_channels=3, num_classes=2, sample_size=8)


def batch_of(
    dataset: LatentDataset, config: UnetTraining, *, rank: int = 0, world: int = 1, index: int = 3
) -> LatentBatch:
    stream = open_loader(dataset, config).batches(rank=rank, world=world, first=index)
    return next(stream)


def loss_by_diffusers(
    model: UNet2DConditionModel, batch: LatentBatch, config: UnetTraining, info: CheckpointInfo
) -> Tensor:
    """The loss of each row as diffusers' training scripts get it: its schedulers noise and aim."""
    shift, scale = (torch.tensor(value).view(1, 3, 1, 1) for value in (info.shift, info.scale))
    x0, noise = (batch.z_BChw - shift) / scale, batch.noise_BChw
    if config.prediction == "flow":
        t = 1000 * batch.u_B
        noisy, target = FlowMatchEulerDiscreteScheduler().scale_noise(x0, t, noise), noise - x0
    else:
        scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        t = (1000 * batch.u_B).long()
        noisy = scheduler.add_noise(x0, noise, t)
        target = noise if config.prediction == "epsilon" else scheduler.get_velocity(x0, noise, t)
    labels = torch.where(batch.keep_B & (batch.labels_B >= 0), batch.labels_B, NULL)
    (prediction,) = model(noisy, t, encoder_hidden_states=None, class_labels=labels, return_dict=False)
    loss = (prediction - target).square().mean((1, 2, 3))
    if config.min_snr_gamma is not None:
        snr = compute_snr(scheduler, t)
        divisor = snr if config.prediction == "epsilon" else snr + 1
        loss = loss * snr.clamp(max=config.min_snr_gamma) / divisor
    return loss


def on_the_grid(batch: LatentBatch) -> LatentBatch:
    """With whole timesteps, which are the only ones that diffusers' flow scheduler knows."""
    k = torch.arange(1, 1001)
    whole = k[(k / 1000) * 1000 == k] / 1000
    return replace(batch, u_B=whole[(batch.u_B[:, None] - whole).abs().argmin(1)])


@pytest.mark.parametrize(
    ("prediction", "gamma"),
    [("epsilon", None), ("epsilon", 5.0), ("v_prediction", None), ("v_prediction", 5.0), ("flow", None)],
)
def test_loss_is_that_of_diffusers_schedulers(
    dataset: LatentDataset, model: UNet2DConditionModel, prediction: str, gamma: float | None
) -> None:
    config = training(prediction=prediction, min_snr_gamma=gamma, condition_dropout=0.5)
    info = plan(dataset, config, None)
    for index in range(4):
        batch = on_the_grid(batch_of(dataset, config, index=index))
        with torch.no_grad():
            loss = loss_of(model, batch, config, info, CPU)
            expected = loss_by_diffusers(model, batch, config, info)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_one_step_is_that_of_a_loop_over_diffusers(dataset: LatentDataset, prediction: str) -> None:
    """Weights after a step of ours, and after loss, clipping and AdamW as diffusers' scripts have them."""
    config = training(
        prediction=prediction, min_snr_gamma=None, condition_dropout=0.5, warmup_steps=1, schedule="constant"
    )
    info = plan(dataset, config, None)
    batch = on_the_grid(batch_of(dataset, config))
    state = TrainState(config, info, CPU)
    reference = copy.deepcopy(state.raw)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=config.learning_rate, weight_decay=0.01)
    loss = loss_by_diffusers(reference, batch, config, info).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), config.clip_norm)
    optimizer.step()
    got, _ = state.step(batch, 1)
    assert float(got) == pytest.approx(float(loss.detach()), rel=1e-6)
    for ours, theirs in zip(state.raw.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_every_weight_gets_a_gradient(dataset: LatentDataset, model: UNet2DConditionModel) -> None:
    config = training()
    model.zero_grad()
    loss_of(model, batch_of(dataset, config), config, plan(dataset, config, None), CPU).mean().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_have_the_losses_of_one(
    dataset: LatentDataset, model: UNet2DConditionModel, world: int
) -> None:
    config = training()
    info = plan(dataset, config, None)
    with torch.no_grad():
        whole = loss_of(model, batch_of(dataset, config), config, info, CPU)
        shares = [
            loss_of(model, batch_of(dataset, config, rank=rank, world=world), config, info, CPU)
            for rank in range(world)
        ]
    torch.testing.assert_close(torch.stack(shares, 1).flatten(), whole, rtol=0, atol=1e-6)


def test_labels_are_dropped_by_the_share_asked_for(
    dataset: LatentDataset, model: UNet2DConditionModel
) -> None:
    """With all of them dropped the labels cannot matter; with none dropped they do."""

    def losses(dropout: float) -> list[float]:
        config = training(condition_dropout=dropout)
        info, batch = plan(dataset, config, None), batch_of(dataset, config)
        swapped = replace(batch, labels_B=1 - batch.labels_B.clamp(min=0))
        with torch.no_grad():
            return [float(loss_of(model, b, config, info, CPU).sum()) for b in (batch, swapped)]

    always, never = losses(1.0), losses(0.0)
    assert always[0] == always[1]
    assert never[0] != never[1]


@pytest.mark.parametrize("class_names", [None, ()])
def test_without_classes_the_model_is_unconditional(
    write_latents: Callable[..., Path], tmp_path: Path, class_names: tuple[str, ...] | None
) -> None:
    dataset = LatentDataset.open(write_latents(tmp_path / "d", class_names=class_names))
    config = training()
    plain = unet.build("tiny", in_channels=3, num_classes=None, sample_size=8)
    with torch.no_grad():
        loss = loss_of(plain, batch_of(dataset, config), config, plan(dataset, config, None), CPU)
    assert loss.isfinite().all()


def test_plan_says_what_the_checkpoint_will(dataset: LatentDataset, vae_folder: Path) -> None:
    info = plan(dataset, training(), None)
    stats = dataset.derived().stats
    assert stats is not None
    assert (info.shift, info.scale) == (stats.mean_C, stats.std_C)
    assert (info.latent_shape, info.class_names, info.step) == ((3, 8, 8), ("cat", "dog"), 0)
    assert (info.vae, info.vae_fingerprint) == (str(vae_folder), dataset.header.vae_fingerprint)
    own = plan(dataset, training(whitening="vae"), None)
    assert own.scale == (1 / 0.18215,) * 3


def test_data_whitening_gives_the_unet_mean_0_and_std_1(dataset: LatentDataset) -> None:
    whitening = plan(dataset, training(), None).whitening
    stream = open_loader(dataset, training(batch_size=20)).batches(rank=0, world=1)
    x = torch.cat([whitening.normalise(batch.z_BChw) for batch in islice(stream, 50)])
    assert x.mean((0, 2, 3)).abs().max() < 0.02
    assert (x.std((0, 2, 3)) - 1).abs().max() < 0.02


def test_plan_refuses_another_vae(dataset: LatentDataset, other_vae_folder: Path) -> None:
    with pytest.raises(UserError, match=r"has latents of another VAE .* than .*other_vae"):
        plan(dataset, training(), str(other_vae_folder))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preset": "gigantic"}, "no U-Net preset 'gigantic'; allowed: tiny, small"),
        ({"batch_size": 32}, "20 latents in bucket 32x32 cannot fill a batch of 32"),
    ],
)
def test_plan_refuses_what_cannot_be_trained(
    dataset: LatentDataset, options: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        plan(dataset, training(**options), None)


def test_plan_refuses_latents_that_the_layout_cannot_halve(
    write_latents: Callable[..., Path], tmp_path: Path
) -> None:
    dataset = LatentDataset.open(write_latents(tmp_path / "d", count=8, size_px=24))
    with pytest.raises(UserError, match="preset tiny cannot take 6×6 latents; allowed: multiples of 4"):
        plan(dataset, training(), None)


def test_a_batch_that_workers_cannot_share() -> None:
    with pytest.raises(ValidationError, match="a batch of 8 cannot be shared by 3 workers evenly"):
        training(num_workers=3)


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_leaves_a_checkpoint_for_plain_diffusers(dataset: LatentDataset, tmp_path: Path) -> None:
    config = training(steps=6, log_every=4, warmup_steps=1, ema_decay=0.5, threads=1)
    info = plan(dataset, config, None)
    fit(dataset, config, info, tmp_path)
    export(tmp_path, config, info)
    folder = tmp_path
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 6]
    assert read_info(folder) == info.model_copy(update={"step": 6})
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    assert scheduler.config["prediction_type"] == "v_prediction"
    _assert_trained(folder, dataset, config, info, lines)


def _assert_trained(
    folder: Path,
    dataset: LatentDataset,
    config: UnetTraining,
    info: CheckpointInfo,
    lines: list[dict[str, float]],
) -> None:
    """The checkpoint is what the same six steps give in this process, without Ray."""
    from pipelines.train.schedule import lr_factor

    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = unet.build("tiny", in_channels=3, num_classes=2, sample_size=8)
    mean = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    stream = open_loader(dataset, config).batches(rank=0, world=1)
    losses = []
    for step, batch in enumerate(islice(stream, 6)):
        optimizer.param_groups[0]["lr"] = 3e-4 * lr_factor(step, 6, 1)
        loss = loss_of(model, batch, config, info, CPU).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        # The first update of the average copies; then min(decay, (1 + n) / (10 + n)).
        decay = 0.0 if step == 0 else min(0.5, (1 + step) / (10 + step))
        mean = [decay * m + (1 - decay) * p.detach() for m, p in zip(mean, model.parameters(), strict=True)]
    assert [line["loss"] for line in lines] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 2], 1e-4)
    for name, weights in (("unet_last", list(model.parameters())), ("unet", mean)):
        saved = UNet2DConditionModel.from_pretrained(folder / name)
        for got, expected in zip(saved.parameters(), weights, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_that_diverges_is_not_started_again(dataset: LatentDataset, tmp_path: Path) -> None:
    config = training(steps=8, log_every=2, learning_rate=1e30, clip_norm=1e30, warmup_steps=1, threads=1)
    with pytest.raises(DivergedError, match=r"is (nan|inf) at step [24]; lower the learning rate"):
        fit(dataset, config, plan(dataset, config, None), tmp_path)
    assert len(list((tmp_path / "ray_train").iterdir())) == 1


def test_workers_find_relative_folders(
    dataset: LatentDataset,
    model: UNet2DConditionModel,
    vae_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They have another working directory than the command, on a cluster that runs already."""
    monkeypatch.chdir(tmp_path)
    unet.save(model, "base")
    (tmp_path / "vae").symlink_to(vae_folder)
    config = training(init="base")
    loop = loop_of(dataset, config, plan(dataset, config, "vae"), Path("out"))
    monkeypatch.chdir("/")
    state = TrainState(loop["config"], loop["info"], CPU)
    assert unet.fingerprint(state.raw) == unet.fingerprint(model)
    assert Path(loop["info"].vae) == vae_folder.resolve()
    assert loop["out"] == tmp_path / "out"
