"""LoRA in training: what moves and what is kept, on one rank and two, and what diffusers makes of it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from ldm import checkpoint, lora, unet
from ldm.errors import UserError
from pipelines.dataset import LatentDataset
from pipelines.train.config import UnetTraining
from pipelines.train.plan import build_unet, open_loader, plan
from pipelines.train.snapshots import snapshot_folder
from pipelines.train.state import TrainState
from pipelines.train.unet import SNAPSHOTS, export
from tests.pipelines.train.test_state import OPTIONS, Stopped, assert_same_bits, losses, new_state, run
from tests.pipelines.train.training_ranks import train_on


@pytest.fixture(scope="module")
def folder(write_latents: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents") / "d", count=96)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A U-Net to adapt."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = unet.build("tiny", in_channels=3, num_classes=2, sample_size=8)
    unet.save(model, tmp_path_factory.mktemp("base") / "unet")
    return tmp_path_factory.getbasetemp() / "base0" / "unet"


@pytest.fixture(scope="module")
def options(base: Path) -> dict[str, Any]:
    # A rate at which the update is far above rounding after a few steps.
    return {"init": str(base), "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1}, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def undisturbed(
    folder: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainState, Path]:
    out = tmp_path_factory.mktemp("undisturbed")
    return run(folder, out, **options), out


def base_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Those outside of the adapter, by the names that they have without one."""
    named = model.state_dict().items()
    return {name.replace(".base_layer", ""): value for name, value in named if ".lora_" not in name}


def test_the_adapter_trains_and_the_base_does_not(base: Path, undisturbed: tuple[TrainState, Path]) -> None:
    state = undisturbed[0]
    stored = load_file(base / "diffusion_pytorch_model.safetensors")
    assert_same_bits(base_weights(state.raw), stored)
    assert_same_bits(base_weights(state.ema.module), stored)
    trained = {p for group in state.optimizer.param_groups for p in group["params"]}
    assert trained == {p for name, p in state.raw.named_parameters() if ".lora_" in name}
    start = build_unet(state.config, state.info).state_dict()
    named = {name: value for name, value in state.raw.state_dict().items() if ".lora_" in name}
    assert [name for name, value in named.items() if torch.equal(value, start[name])] == []
    assert [name for name, value in named.items() if ".lora_B" in name and start[name].any()] == []


def test_a_snapshot_holds_only_what_trains(undisturbed: tuple[TrainState, Path]) -> None:
    """For each adapter weight the weight, its average, AdamW's two moments and step; and one count."""
    state, out = undisturbed
    adapter = [name for name, _ in state.raw.named_parameters() if ".lora_" in name]
    expected = {f"model.{name}" for name in adapter} | {f"ema.module.{name}" for name in adapter}
    expected |= {
        f"optimizer.state.{name}.{moment}" for name in adapter for moment in ("exp_avg", "exp_avg_sq", "step")
    }
    stored = FileSystemReader(snapshot_folder(out / SNAPSHOTS, 12)).read_metadata().state_dict_metadata
    held = {name for name in stored if not name.startswith("optimizer.param_groups")}
    assert held == expected | {"ema.n_averaged"}


@pytest.mark.parametrize("stop_after", [2, 7])
def test_a_stopped_run_ends_with_the_same_bits(
    folder: Path,
    options: dict[str, Any],
    undisturbed: tuple[TrainState, Path],
    tmp_path: Path,
    stop_after: int,
) -> None:
    with pytest.raises(Stopped):
        run(folder, tmp_path, stop_after=stop_after, **options)
    torch.manual_seed(99)  # nothing may depend on what was drawn before
    again = run(folder, tmp_path, **options)
    assert_same_bits(again.state(), undisturbed[0].state())
    assert_same_bits(base_weights(again.raw), base_weights(undisturbed[0].raw))
    assert losses(tmp_path) == losses(undisturbed[1])


def test_the_first_step_depends_on_the_seed_alone(folder: Path, options: dict[str, Any]) -> None:
    first = new_state(folder, **options)
    torch.seed()
    assert_same_bits(new_state(folder, **options).state(), first.state())
    other = new_state(folder, seed=1, **options).state()["model"]
    same = [name for name, value in first.state()["model"].items() if torch.equal(value, other[name])]
    assert same == [name for name in other if ".lora_B" in name]


def test_the_average_has_no_dropout_and_no_base_of_its_own(folder: Path, options: dict[str, Any]) -> None:
    state = new_state(folder, **options | {"lora": {"dropout": 0.9}})
    loader = open_loader(LatentDataset.open(folder), state.config)
    state.step(next(loader.batches(rank=0, world=1)), 1)
    held_out = loader.validation(rank=0, world=1)
    assert state.validate(held_out) == state.validate(held_out)
    shared = zip(state.raw.parameters(), state.ema.module.parameters(), strict=True)
    assert all((ours.data_ptr() == mean.data_ptr()) != ours.requires_grad for ours, mean in shared)


@pytest.mark.parametrize("option", [{"gradient_checkpointing": True}, {"accumulate": 2}, {"ema": "power"}])
def test_an_option_changes_only_the_rounding(
    folder: Path, options: dict[str, Any], tmp_path: Path, option: dict[str, object]
) -> None:
    plain = options | {"lora": {"rank": 4}, "steps": 4, "schedule": "constant"}
    run(folder, tmp_path, **plain, **option)
    run(folder, tmp_path / "plain", **plain)
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_change_only_the_rounding(
    folder: Path, options: dict[str, Any], tmp_path: Path, parallel: str
) -> None:
    """Two processes, whose snapshot one goes on from."""
    # Without dropout, whose masks depend on the shape of a rank's share.
    plain = options | {"lora": {"rank": 4}, "schedule": "constant"}
    train_on(2, tmp_path, folder, OPTIONS | plain | {"steps": 6, "parallel": parallel})
    run(folder, tmp_path, **plain)
    run(folder, tmp_path / "one", **plain)
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def loaded(folder: Path) -> UNet2DConditionModel:
    """By diffusers alone."""
    return UNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=False)


@torch.no_grad()
def predicted(model: UNet2DConditionModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 8, 8, generator=generator)
    labels = torch.tensor([0, 1, 2, 0])
    timesteps = torch.tensor([1, 300, 700, 999])
    sample: Tensor = model.eval()(x, timesteps, encoder_hidden_states=None, class_labels=labels).sample
    return sample


def test_diffusers_reads_the_update_and_the_merged_unet(
    base: Path, undisturbed: tuple[TrainState, Path]
) -> None:
    """Base and update, as diffusers puts them together, are unet/, and that is the EMA that was trained."""
    state, out = undisturbed
    export(out, state.config, state.info)
    adapted = loaded(base)
    at_first = predicted(adapted)
    adapted.load_lora_adapter(out / "lora", prefix=None, use_safetensors=True)
    merged, last = (loaded(out / part) for part in ("unet", "unet_last"))
    torch.testing.assert_close(predicted(merged), predicted(adapted), rtol=0, atol=1e-5)
    torch.testing.assert_close(predicted(merged), predicted(state.ema.module), rtol=0, atol=1e-5)
    torch.testing.assert_close(predicted(last), predicted(state.raw), rtol=0, atol=1e-5)
    assert (predicted(merged) - at_first).abs().max() > 0.01
    assert (predicted(merged) - predicted(last)).abs().max() > 0.001
    assert merged.state_dict().keys() == load_file(base / "diffusion_pytorch_model.safetensors").keys()
    assert unet.fingerprint(unet.load(base)) == checkpoint.read_info(out).init_fingerprint
    served = loaded(base)
    lora.put_adapter(served, out / "lora")
    torch.testing.assert_close(predicted(served), predicted(adapted), rtol=0, atol=1e-5)
    assert served.state_dict().keys() == merged.state_dict().keys()


def test_an_adapter_that_is_none_is_told(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter folder"):
        lora.put_adapter(loaded(base), tmp_path / "missing")
    with pytest.raises(UserError, match="cannot put the adapter"):
        lora.put_adapter(loaded(base), tmp_path)


def test_without_a_base_there_is_no_update() -> None:
    with pytest.raises(ValidationError, match="lora needs init: the U-Net that it is an update of"):
        UnetTraining.model_validate({"lora": {}})


def test_a_missing_peft_is_told(
    folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"LoRA needs the package peft; pip install 'ray-ldm\[lora\]'"):
        new_state(folder, **options)


def test_plan_refuses_targets_that_are_not_there(folder: Path, options: dict[str, Any]) -> None:
    lora = {"target_modules": ["to_q", "to_out", "query"]}
    config = UnetTraining.model_validate(OPTIONS | options | {"lora": lora})
    with pytest.raises(UserError, match="LoRA's target_modules to_out, query: no linear or convolution"):
        plan(LatentDataset.open(folder), config, None)
