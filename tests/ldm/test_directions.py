"""Directions on Gaussians of known means, the regression against scikit-learn's, and files."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from ldm.direction_file import read_direction, write_direction
from ldm.directions import Direction, fit, logistic_regression
from ldm.errors import UserError
from ldm.latents import Whitening

SHAPE = (2, 3, 4)
ABOUT = {"attribute": "red", "against": "", "method": "mean", "vae": "f8", "vae_fingerprint": "ab" * 32}
WHITENING = Whitening((1.0, -2.0), (0.5, 4.0))


def gaussians(difference: torch.Tensor, count: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of unit variance about a mean, and about a mean that is ``difference`` away."""
    x = torch.randn(2, count, *SHAPE, generator=torch.Generator().manual_seed(0)) + 3
    return x[0] + difference, x[1]


@pytest.fixture(scope="module")
def difference() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(7)) * 0.4


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum() / a.norm() / b.norm())


def test_the_mean_direction_is_the_difference_of_the_means(difference: torch.Tensor) -> None:
    has, has_not = gaussians(difference)
    direction = fit(has, has_not, "mean", WHITENING, 1.0, ABOUT)
    torch.testing.assert_close(
        direction.step_Chw.double(), has.double().mean(0) - has_not.double().mean(0), atol=1e-6, rtol=0
    )
    # Of the means of N draws each: standard deviation sqrt(2 / N) in every value.
    assert (direction.step_Chw - difference).abs().max() < 5 * math.sqrt(2 / 2000)
    assert direction.probability(has) is None


@pytest.mark.parametrize("method", ["mean", "logistic"])
def test_position_is_0_at_one_mean_and_1_at_the_other(method: str, difference: torch.Tensor) -> None:
    has, has_not = gaussians(difference, 500)
    direction = fit(has, has_not, method, WHITENING, 1.0, ABOUT)  # type: ignore[arg-type]
    assert float(direction.position(has).mean()) == pytest.approx(1, abs=1e-5)
    assert float(direction.position(has_not).mean()) == pytest.approx(0, abs=1e-5)
    z = has[:1]
    before, after = direction.position(z), direction.position(direction.moved(z[0], 2.5)[None])
    assert float(after - before) == pytest.approx(2.5, abs=1e-5)


def test_logistic_direction_and_probability_of_gaussians_are_those_of_bayes(difference: torch.Tensor) -> None:
    # For unit variances the log odds are linear: difference · z + const.
    difference = 2 * difference
    has, has_not = gaussians(difference)
    direction = fit(has, has_not, "logistic", Whitening((3.0, 3.0), (1.0, 1.0)), 1e-3, ABOUT)
    assert cosine(direction.step_Chw, difference) > 0.99
    middle = torch.full((1, *SHAPE), 3.0) + difference / 2
    probability = direction.probability(torch.cat([middle, middle + difference, middle - difference]))
    assert probability is not None
    odds = float(difference.square().sum())
    expected = [0.5, 1 / (1 + math.exp(-odds)), 1 / (1 + math.exp(odds))]
    assert probability.tolist() == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("l2", [0.1, 10.0])
def test_the_regression_is_scikit_learns(l2: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 40))
    has = x @ rng.normal(size=40) + rng.normal(size=120) > 0.5
    expected = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=10_000).fit(x, has)
    weight, bias = logistic_regression(torch.from_numpy(x), torch.from_numpy(has), l2)
    np.testing.assert_allclose(weight.numpy(), expected.coef_[0], atol=1e-5)
    assert bias == pytest.approx(expected.intercept_[0], abs=1e-5)


def test_the_regression_knows_nothing_of_whitening_but_its_penalty(difference: torch.Tensor) -> None:
    # scikit-learn on whitened latents; probabilities are asked for latents as they are.
    has, has_not = gaussians(difference, 200)
    shift = torch.tensor(WHITENING.shift_C).view(2, 1, 1)
    scale = torch.tensor(WHITENING.scale_C).view(2, 1, 1)
    z = torch.cat([has, has_not])
    x = ((z - shift) / scale).double().flatten(1).numpy()
    expected = LogisticRegression(C=0.5, tol=1e-10, max_iter=10_000).fit(x, np.arange(400) < 200)
    direction = fit(has, has_not, "logistic", WHITENING, 2.0, ABOUT)
    probability = direction.probability(z)
    assert probability is not None
    np.testing.assert_allclose(probability.numpy(), expected.predict_proba(x)[:, 1], atol=1e-5)
    whitened_step = (direction.step_Chw / scale).flatten()
    assert cosine(whitened_step.double(), torch.from_numpy(expected.coef_[0])) > 1 - 1e-9


def test_strength_0_is_the_latent_itself(difference: torch.Tensor) -> None:
    has, has_not = gaussians(difference, 10)
    direction = fit(has, has_not, "mean", WHITENING, 1.0, ABOUT)
    assert torch.equal(direction.moved(has[0], 0.0), has[0])


def test_equal_means_and_empty_sides_are_refused() -> None:
    z = torch.ones(2, *SHAPE)
    with pytest.raises(UserError, match="'red' have the same mean"):
        fit(z, z, "mean", WHITENING, 1.0, ABOUT)
    with pytest.raises(ValueError, match="with and without"):
        fit(z, z[:0], "mean", WHITENING, 1.0, ABOUT)


@pytest.mark.parametrize("method", ["mean", "logistic"])
def test_a_file_keeps_all_of_it(method: str, difference: torch.Tensor, tmp_path: Path) -> None:
    has, has_not = gaussians(difference, 50)
    direction = fit(has, has_not, method, WHITENING, 1.0, ABOUT)  # type: ignore[arg-type]
    write_direction(direction, tmp_path / "new" / "red.safetensors")
    again = read_direction(tmp_path / "new" / "red.safetensors")
    assert torch.equal(again.step_Chw, direction.step_Chw)
    assert (again.origin, again.bias, again.about) == (direction.origin, direction.bias, ABOUT)
    expected = direction.probability(has)
    found = again.probability(has)
    assert (expected is None) == (found is None) == (method == "mean")
    assert expected is None or torch.equal(found, expected)  # type: ignore[arg-type]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["red.safetensors"]


@pytest.mark.parametrize("content", [b"", b"no safetensors", None])
def test_a_file_that_is_no_direction_is_told(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "red.safetensors"
    if content is None:
        from safetensors.torch import save_file

        save_file({"step": torch.zeros(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="direction"):
        read_direction(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read direction"):
        read_direction(tmp_path / "none.safetensors")


def test_latents_of_another_shape_or_vae_are_told() -> None:
    direction = Direction(torch.ones(SHAPE), 0.0, ABOUT)
    direction.check(SHAPE, "ab" * 32)
    with pytest.raises(UserError, match="of another VAE"):
        direction.check(SHAPE, "cd" * 32)
    with pytest.raises(UserError, match=r"has the shape \(2, 3, 4\), the latent \(2, 3, 5\)"):
        direction.check((2, 3, 5), "ab" * 32)
