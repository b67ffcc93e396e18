"""torch.compile learns what the uncompiled U-Net learns. Inductor compiles for minutes."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from ldm import unet
from pipelines.dataset import LatentDataset
from pipelines.train.config import UnetTraining
from pipelines.train.plan import open_loader, plan
from pipelines.train.state import TrainState

pytestmark = [pytest.mark.faults_long, pytest.mark.timeout(1200)]


def after_three_steps(dataset: LatentDataset, options: dict[str, object]) -> tuple[TrainState, list[float]]:
    """A rank's state, and the losses and norms on the way."""
    fixed = {"preset": "tiny", "batch_size": 8, "warmup_steps": 1, "data": {"validation_rows": 0}}
    config = UnetTraining.model_validate(fixed | options)
    state = TrainState(config, plan(dataset, config, None), torch.device("cpu"))
    batches = islice(open_loader(dataset, config).batches(rank=0, world=1), 3)
    return state, [float(value) for step, batch in enumerate(batches, 1) for value in state.step(batch, step)]


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_compiled_training_is_the_same_training(
    write_latents: Callable[..., Path], tmp_path: Path, lora: dict[str, int] | None
) -> None:
    dataset = LatentDataset.open(write_latents(tmp_path / "d", count=96))
    torch.manual_seed(1)
    unet.save(unet.build("tiny", in_channels=3, num_classes=2, sample_size=8), tmp_path / "base")
    options = {"init": str(tmp_path / "base"), "lora": lora}
    plain, expected = after_three_steps(dataset, options)
    compiled, found = after_three_steps(dataset, options | {"compile": True})
    assert found == pytest.approx(expected, rel=1e-5)
    ours, theirs = compiled.state(), plain.state()
    # The names are those without compile, so that either goes on from the other's snapshot.
    assert ours["model"].keys() == theirs["model"].keys()
    assert ours["ema"].keys() == theirs["ema"].keys()
    assert ours["optimizer"]["state"].keys() == theirs["optimizer"]["state"].keys()
    for name, value in theirs["ema"].items():
        # Adam's step is the sign of a gradient, so where that is rounding alone a weight may go either way.
        torch.testing.assert_close(ours["ema"][name], value, rtol=0, atol=1e-4)
    plain.restore(ours)
    restored = plain.raw.state_dict()
    assert all(torch.equal(value, restored[name]) for name, value in compiled.raw.state_dict().items())
