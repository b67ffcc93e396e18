"""The demo, small: every stage runs for real, and the page shows what they did."""

import json
from pathlib import Path

import pytest

from jobs.demo import PHOTOS, DemoJob, photo_paths
from ldm import autoencoder
from ldm.errors import UserError


@pytest.mark.faults_long  # every stage starts actors of its own: a minute and a half
@pytest.mark.usefixtures("ray_cluster")
def test_small_demo_runs_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    autoencoder.build("f8").save_pretrained(tmp_path / "vae")
    job = DemoJob(
        out=out,
        vae=str(tmp_path / "vae"),
        crops_per_photo=7,
        train_steps=3,
        images_per_class=2,
        inference_steps=2,
    )
    result = job.run()
    page = (out / "report.html").read_text()
    assert result["chance"] == pytest.approx(1 / len(PHOTOS))
    assert set(result["seconds"]) >= {"shards", "encode", "reconstruct", "train"}
    for name in PHOTOS:
        assert f'alt="{name} sample 2"' in page
    assert page.count('alt="reconstruction ') == len(PHOTOS)
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing is fetched from outside
    assert len((out / "checkpoint" / "metrics.jsonl").read_text().splitlines()) == 1
    assert json.loads((out / "shards" / "classes.json").read_text()) == sorted(PHOTOS)


def test_classes_are_in_name_order_and_their_files_exist() -> None:
    paths = photo_paths()
    assert list(paths) == sorted(PHOTOS)
    assert all(path.is_file() for path in paths.values())


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        DemoJob(out=tmp_path).run()
    assert (tmp_path / "thesis.tex").read_text() == "mine"
