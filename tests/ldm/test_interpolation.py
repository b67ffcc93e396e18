"""Paths between latents against closed forms."""

import math

import pytest
import torch

from ldm.errors import UserError
from ldm.interpolation import METHODS, between, grid, lerp, path, slerp

A, B, C, D = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """By the arc cosine, which the code does not use."""
    a, b = a.double().flatten(), b.double().flatten()
    return math.acos(float((a @ b / a.norm() / b.norm()).clamp(-1, 1)))


@pytest.mark.parametrize("method", METHODS)
def test_the_ends_of_a_path_are_exact(method: str) -> None:
    frames = path(A, B, 5, method)  # type: ignore[arg-type]
    assert frames.shape == (5, 3, 8, 8)
    assert torch.equal(frames[0], A) and torch.equal(frames[-1], B)


def test_lerp_is_the_weighted_mean() -> None:
    for t in (0.25, 0.5, 0.9):
        torch.testing.assert_close(lerp(A, B, t), (1 - t) * A + t * B)


def test_slerp_between_unit_axes_is_a_quarter_circle() -> None:
    x, y = torch.eye(2, dtype=torch.float64)
    for t in (0.0, 0.2, 0.5, 1.0):
        expected = torch.tensor([math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)], dtype=torch.float64)
        torch.testing.assert_close(slerp(x, y, t), expected, atol=1e-15, rtol=0)


def test_slerp_of_unit_vectors_is_shoemakes_formula() -> None:
    a, b = (x.double() / x.double().norm() for x in (A, B))
    w = angle(a, b)
    for t in (0.1, 0.5, 0.8):
        expected = (math.sin((1 - t) * w) * a + math.sin(t * w) * b) / math.sin(w)
        torch.testing.assert_close(slerp(a, b, t), expected, atol=1e-13, rtol=0)


def test_slerp_has_equal_angle_steps_and_linear_lengths() -> None:
    frames = path(A, 3 * B, 9, "slerp")
    steps = [angle(frames[i], frames[i + 1]) for i in range(8)]
    assert steps == pytest.approx([angle(A, B) / 8] * 8, rel=1e-5)
    lengths = frames.double().flatten(1).norm(dim=1)
    torch.testing.assert_close(
        lengths, torch.linspace(float(A.norm()), 3 * float(B.norm()), 9).double(), rtol=1e-5, atol=0
    )


def test_slerp_of_parallel_vectors_keeps_the_direction() -> None:
    for t in (0.25, 0.5):
        torch.testing.assert_close(slerp(A, 2 * A, t), (1 + t) * A)
        torch.testing.assert_close(slerp(A, A, t), A)


def test_slerp_of_opposite_vectors_turns_by_half_a_circle_in_equal_steps() -> None:
    frames = path(A, -A, 7, "slerp")
    steps = [angle(frames[i], frames[i + 1]) for i in range(6)]
    assert steps == pytest.approx([math.pi / 6] * 6, rel=1e-5)
    torch.testing.assert_close(frames.flatten(1).norm(dim=1), A.norm().expand(7), rtol=1e-5, atol=0)
    assert torch.equal(path(A, -A, 7, "slerp"), frames)


def test_slerp_with_zero_is_lerp() -> None:
    torch.testing.assert_close(slerp(torch.zeros_like(A), A, 0.25), 0.25 * A)


def test_a_grid_has_its_corners_and_is_bilinear() -> None:
    latents = grid([A, B, C, D], 4, "lerp").view(4, 4, 3, 8, 8)
    assert all(
        torch.equal(latents[row, column], corner)
        for (row, column), corner in zip([(0, 0), (0, 3), (3, 0), (3, 3)], [A, B, C, D], strict=True)
    )
    u, v = 1 / 3, 2 / 3  # down, right
    expected = (1 - u) * ((1 - v) * A + v * B) + u * ((1 - v) * C + v * D)
    torch.testing.assert_close(latents[1, 2], expected)


def test_a_grid_of_slerp_has_its_corners_and_slerp_for_its_top() -> None:
    latents = grid([A, B, C, D], 3, "slerp")
    assert torch.equal(latents[8], D)
    torch.testing.assert_close(latents[1], slerp(A, B, 0.5))


def test_latents_of_different_shapes_are_told() -> None:
    with pytest.raises(UserError, match=r"\(3, 8, 8\) and \(3, 8, 4\) have no path"):
        between(A, B[:, :, :4], 0.5, "lerp")


def test_a_path_of_one_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="two ends"):
        path(A, B, 1, "lerp")
