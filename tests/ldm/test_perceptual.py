"""Perceptual distance and its gradient: against torchmetrics and the stlpips package; what is refused."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm import feature_networks, perceptual_weights
from ldm.errors import UserError
from ldm.perceptual import NETWORKS, Perceptual, load_perceptual

needs_stlpips = pytest.mark.skipif(find_spec("stlpips_pytorch") is None, reason="needs extra perceptual")
BACKBONES = {"vgg": "vgg16", "alex": "alexnet"}


def images(seed: int, height: int = 48, width: int = 40) -> Tensor:
    return torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def with_random_weights(name: str) -> Perceptual:
    stages = NETWORKS[name][0]()
    return Perceptual(name, stages, perceptual_weights.random_features(stages))


def torchvision_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchmetrics' net.slice2.5.weight → torchvision's features.5.weight."""
    parts = {key: key.split(".") for key in state if key.startswith("net.slice")}
    return {f"features.{p[-2]}.{p[-1]}": state[key].contiguous() for key, p in parts.items()}


def assert_same_distance_and_gradient(ours: nn.Module, theirs: nn.Module) -> None:
    a, b = images(0).requires_grad_(), images(1)
    got, expected = ours(a, b), theirs(a, b).flatten()
    assert (got.shape, got.dtype) == ((3,), torch.float32)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)
    (gradient,), (theirs_a,) = (torch.autograd.grad(d.sum(), a) for d in (got, expected))
    assert float((gradient - theirs_a).norm() / theirs_a.norm()) < 1e-4


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_equals_torchmetrics_with_the_same_weights(net: str, tmp_path: Path) -> None:
    from torchmetrics.functional.image.lpips import _LPIPS

    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = _LPIPS(net=net, pnet_rand=True)
    tensors = torchvision_names(theirs.state_dict())
    (tmp_path / "st").mkdir()
    save_file(tensors, tmp_path / "st" / f"{BACKBONES[net]}.safetensors")
    torch.save(tensors, tmp_path / f"{BACKBONES[net]}-0123abcd.pth")
    ours, same = load_perceptual(str(tmp_path / "st")), load_perceptual(str(tmp_path))
    assert ours.name == f"lpips-{net}"
    assert ours.fingerprint == same.fingerprint
    assert_same_distance_and_gradient(ours, theirs)


@needs_stlpips
def test_equals_the_stlpips_package(monkeypatch: pytest.MonkeyPatch) -> None:
    # What its code imports and does not use here.
    for name, attribute in (("IPython", "embed"), ("torchsummary", "summary")):
        module = ModuleType(name)
        setattr(module, attribute, None)
        monkeypatch.setitem(sys.modules, name, module)
    from stlpips_pytorch import stlpips

    theirs = stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    ours = load_perceptual("stlpips")
    assert ours.name == "stlpips"
    assert_same_distance_and_gradient(ours, theirs)


def test_random_features_are_the_same_bits_every_time_and_leave_the_global_state() -> None:
    before = torch.get_rng_state()
    first, second = load_perceptual("random"), load_perceptual("random")
    assert torch.equal(torch.get_rng_state(), before)
    assert first.name == "random-features"
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first(images(0), images(1)), second(images(0), images(1)))


def test_fingerprint_tells_one_changed_weight_and_the_network() -> None:
    stages = feature_networks.random_network()
    weights = perceptual_weights.random_features(stages)
    first = Perceptual("random-features", stages, weights)
    weights.convolutions[0].view(-1)[0] += 1e-3
    other = Perceptual("random-features", feature_networks.random_network(), weights)
    assert first.fingerprint != other.fingerprint
    assert with_random_weights("lpips-alex").fingerprint != with_random_weights("stlpips").fingerprint


@pytest.mark.parametrize("name", NETWORKS)
def test_is_a_distance_of_each_pair_alone(name: str) -> None:
    perceptual = with_random_weights(name)
    a, b = images(0), images(1)
    distances = perceptual(a, b)
    assert (distances > 0).all()
    assert torch.equal(perceptual(a, a), torch.zeros(3))
    torch.testing.assert_close(perceptual(b, a), distances)
    torch.testing.assert_close(perceptual(a[1:2], b[1:2]), distances[1:2])


def test_weights_are_frozen_and_gradients_finite_where_features_vanish() -> None:
    perceptual = with_random_weights("random-features")
    assert [p for p in perceptual.parameters() if p.requires_grad] == []
    # The colour that scales to 0: no convolution gives anything there.
    flat = (
        torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1).expand(3, 3, 48, 40).clone().requires_grad_()
    )
    perceptual(flat, images(1)).sum().backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


@pytest.mark.parametrize("name", NETWORKS)
def test_smallest_side_is_the_networks_own(name: str) -> None:
    perceptual = with_random_weights(name)
    least = perceptual.min_px
    assert perceptual(images(0, least, 64), images(1, least, 64)).isfinite().all()
    small = images(0, least - 1, 64)
    with pytest.raises(UserError, match=rf"64×{least - 1} pixels is too small for {name}.*{least} pixels"):
        perceptual(small, small)
    perceptual.min_px = 0
    with pytest.raises(RuntimeError):
        perceptual(small, small)


def save(name: str, content: object) -> Callable[[Path], None]:
    return lambda folder: torch.save(content, folder / name)


class Code:
    """What no file of weights may bring along."""


@pytest.mark.parametrize(
    ("fill", "said"),
    [
        (lambda folder: None, "has the weights of no feature network; allowed: one of vgg16"),
        (save("vgg16.pth", {"features.0.weight": torch.zeros(2)}), "do not fit lpips-vgg"),
        (save("vgg16.pth", Code()), "cannot read .*vgg16.pth"),
        (lambda folder: (folder / "alexnet.safetensors").write_bytes(b"{"), "cannot read .*alexnet.safet"),
        (
            lambda folder: [(folder / name).touch() for name in ("vgg16.pth", "alexnet.pth")],
            "has the weights of lpips-vgg and lpips-alex",
        ),
        (
            lambda folder: [(folder / name).touch() for name in ("vgg16-a.pth", "vgg16-b.pth")],
            "has 2 files of vgg16; allowed: 1",
        ),
    ],
)  # fmt: skip
def test_folder_is_refused(fill: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(UserError, match=said):
        load_perceptual(str(tmp_path))


def test_weights_that_cannot_be_had_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(perceptual_weights, "find_spec", lambda name: None)
    for source, said in {
        "lpips-vgg": "cannot download https://.*/vgg16-.*pth: .*no route.*; give a folder .* or use stlpips",
        "stlpips": "weights of stlpips are not installed; pip install",
        "lpips-squeeze": "no perceptual distance 'lpips-squeeze'; allowed: lpips-vgg, lpips-alex, stl",
    }.items():
        with pytest.raises(UserError, match=said) as caught:
            load_perceptual(source)
        assert "\n" not in str(caught.value)
