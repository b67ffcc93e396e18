"""Cards of checkpoints, and the trajectories that requests become of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.model_card import read_card
from ldm.text import load_text_encoder
from pipelines.serve.loaded_model import trajectory
from pipelines.serve.messages import Condition, Edit, SampleRequest
from tests.tiny_text import WIDTH, save_clip


def test_the_text_encoder_must_be_the_checkpoints(
    checkpoint_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint_folders["flow"], tmp_path / "checkpoint")
    right, wrong = (str(save_clip(tmp_path / f"clip{seed}", seed=seed)) for seed in (0, 1))
    info = json.loads((folder / "ldm.json").read_text())
    info |= {"text_fingerprint": load_text_encoder(right).fingerprint, "embedding_width": WIDTH}
    (folder / "ldm.json").write_text(json.dumps(info | {"text_encoder": right}))
    assert read_card(folder).condition == "text"
    (folder / "ldm.json").write_text(json.dumps(info | {"text_encoder": wrong}))
    with pytest.raises(UserError, match="is not the one of the checkpoint"):
        read_card(folder)


@pytest.mark.parametrize(("strength", "steps_left"), [(0.01, 1), (0.5, 5), (1.0, 10)])
def test_an_edit_takes_its_share_of_the_steps_and_one_at_least(
    checkpoint_folders: dict[str, Path], strength: float, steps_left: int
) -> None:
    card = read_card(checkpoint_folders["v_prediction"])
    begun = trajectory(
        card,
        SampleRequest(
            model="any",
            shape=card.latent_shape,
            scheduler="ddim",
            num_steps=10,
            guidance=1.0,
            seed=0,
            condition=Condition(label=0),
            edit=Edit(np.zeros(card.latent_shape, np.float32), strength, None),
        ),
    )
    assert begun.num_steps - begun.step_index == steps_left
