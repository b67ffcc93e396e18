"""U-Net training: the loss against its formula, its share over ranks, what is refused, one real run."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from ldm import unet
from ldm.checkpoint import CheckpointInfo, read_info
from ldm.errors import UserError
from ldm.latents import keyed_normal
from ldm.seeds import keyed_seed
from pipelines.dataset import LatentDataset
from pipelines.train.loader import LatentBatch, batches, load_rows
from pipelines.train.unet import METRICS_FILE, UnetTraining, fit, loss_of, plan

CPU = torch.device("cpu")
NULL = 2


def training(**options: object) -> UnetTraining:
    values: dict[str, object] = {"preset": "tiny", "batch_size": 8, **options}
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
    stream = batches(
        load_rows(dataset),
        seed=config.seed,
        batch_size=config.batch_size,
        rank=rank,
        world=world,
        first=index,
    )
    return next(stream)


def by_hand(
    model: UNet2DConditionModel, batch: LatentBatch, config: UnetTraining, info: CheckpointInfo
) -> Tensor:
    """The loss without min-SNR, row by row, with diffusers' own schedule."""
    alpha_bar = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod
    losses = []
    for z, label, position in zip(batch.z_BChw, batch.labels_B.tolist(), batch.positions_B, strict=True):
        x0 = (z - torch.tensor(info.shift).view(3, 1, 1)) / torch.tensor(info.scale).view(3, 1, 1)
        noise = keyed_normal([keyed_seed("noise", config.seed, position)], (3, 8, 8))[0]
        generator = torch.Generator().manual_seed(keyed_seed("t", config.seed, position))
        u, keep = torch.rand(2, generator=generator).tolist()
        t = 1000 * u if config.prediction == "flow" else int(1000 * u)
        a, s = (1 - u, u) if config.prediction == "flow" else (alpha_bar[t] ** 0.5, (1 - alpha_bar[t]) ** 0.5)
        target = {"epsilon": noise, "v_prediction": a * noise - s * x0, "flow": noise - x0}
        shown = label if keep >= config.condition_dropout and label >= 0 else NULL
        (prediction,) = model(
            (a * x0 + s * noise)[None],
            torch.tensor([t]),
            encoder_hidden_states=None,
            class_labels=torch.tensor([shown]),
            return_dict=False,
        )
        losses.append((prediction[0] - target[config.prediction]).square().mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_loss_is_the_formula(dataset: LatentDataset, model: UNet2DConditionModel, prediction: str) -> None:
    config = training(prediction=prediction, min_snr_gamma=None, condition_dropout=0.5)
    info = plan(dataset, config, None)
    batch = batch_of(dataset, config)
    with torch.no_grad():
        loss = loss_of(model, batch, config, info, CPU)
        torch.testing.assert_close(loss, by_hand(model, batch, config, info), rtol=1e-5, atol=0)


def test_min_snr_weighs_every_row(dataset: LatentDataset, model: UNet2DConditionModel) -> None:
    plain, weighted = training(min_snr_gamma=None), training(min_snr_gamma=5.0)
    info = plan(dataset, plain, None)
    batch = batch_of(dataset, plain)
    alpha_bar = plain.noise_schedule.alphas_cumprod
    total = 0.0
    with torch.no_grad():
        for i, position in enumerate(batch.positions_B):
            row = LatentBatch(batch.z_BChw[i : i + 1], batch.labels_B[i : i + 1], (position,))
            generator = torch.Generator().manual_seed(keyed_seed("t", 0, position))
            at = alpha_bar[int(1000 * torch.rand(2, generator=generator)[0])]
            snr = at / (1 - at)
            total += float(loss_of(model, row, plain, info, CPU) * min(snr, 5.0) / (snr + 1))
        assert float(loss_of(model, batch, weighted, info, CPU)) == pytest.approx(total / 8, rel=1e-5)


def test_every_weight_gets_a_gradient(dataset: LatentDataset, model: UNet2DConditionModel) -> None:
    config = training()
    model.zero_grad()
    loss_of(model, batch_of(dataset, config), config, plan(dataset, config, None), CPU).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


@pytest.mark.parametrize("world", [2, 4])
def test_mean_over_ranks_is_the_loss_of_one(
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
    assert abs(float(torch.stack(shares).mean() - whole)) <= 1e-6


def test_labels_are_dropped_by_the_share_asked_for(
    dataset: LatentDataset, model: UNet2DConditionModel
) -> None:
    """With all of them dropped the labels cannot matter; with none dropped they do."""

    def losses(dropout: float) -> list[float]:
        config = training(condition_dropout=dropout)
        info, batch = plan(dataset, config, None), batch_of(dataset, config)
        swapped = LatentBatch(batch.z_BChw, 1 - batch.labels_B.clamp(min=0), batch.positions_B)
        with torch.no_grad():
            return [float(loss_of(model, b, config, info, CPU)) for b in (batch, swapped)]

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
    assert loss.isfinite()


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
    stream = batches(load_rows(dataset), seed=0, batch_size=20, rank=0, world=1)
    x = torch.cat([whitening.normalise(batch.z_BChw) for batch in islice(stream, 50)])
    assert x.mean((0, 2, 3)).abs().max() < 0.02
    assert (x.std((0, 2, 3)) - 1).abs().max() < 0.02


def test_plan_refuses_another_vae(dataset: LatentDataset, other_vae_folder: Path) -> None:
    with pytest.raises(UserError, match=r"has latents of another VAE .* than .*other_vae"):
        plan(dataset, training(), str(other_vae_folder))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_workers": 3}, "a batch of 8 cannot be shared by 3 workers evenly"),
        ({"preset": "gigantic"}, "no U-Net preset 'gigantic'; allowed: tiny, small"),
        ({"batch_size": 32}, "20 latents cannot fill a batch of 32; allowed: 1 to 20"),
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


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_leaves_a_checkpoint_for_plain_diffusers(dataset: LatentDataset, tmp_path: Path) -> None:
    config = training(steps=6, log_every=4, warmup_steps=1, ema_decay=0.5, threads=1)
    info = plan(dataset, config, None)
    result = fit(dataset, config, info, tmp_path)
    assert result.checkpoint is not None
    folder = Path(result.checkpoint.path)
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 6]
    assert result.metrics is not None
    assert lines[-1].items() <= result.metrics.items()
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
    stream = batches(load_rows(dataset), seed=0, batch_size=8, rank=0, world=1)
    losses = []
    for step, batch in enumerate(islice(stream, 6)):
        optimizer.param_groups[0]["lr"] = 3e-4 * lr_factor(step, 6, 1)
        loss = loss_of(model, batch, config, info, CPU)
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
