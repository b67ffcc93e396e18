"""The ledger by f against geometry, the claims against figures made by hand, and what fits a device."""

import pytest
import torch
from torch import nn

from ldm import unet
from ldm.autoencoder import Autoencoder
from ldm.device_fit import SizePeak, decode_bytes, fits, tiled_decode_bytes
from ldm.errors import UserError
from ldm.meta_cost import LiveBytes
from ldm.savings import ledger
from ldm.savings_claims import Claim, Series, computed_series, findings, measured_series

TINY = ledger("tiny", 64)


def test_geometry_and_parameters() -> None:
    assert {f: row.shape for f, row in TINY.items()} == {
        1: (3, 64, 64),
        4: (3, 16, 16),
        8: (4, 8, 8),
        16: (16, 4, 4),
    }
    assert {f: row.values for f, row in TINY.items()} == {1: 12288, 4: 768, 8: 256, 16: 256}
    assert TINY[8].num_params == unet.PRESETS["tiny"].num_params
    assert TINY[8].weight_bytes == 4 * TINY[8].num_params


def test_attention_grows_with_the_square_of_the_positions_and_the_rest_with_them() -> None:
    pixels, latents = TINY[1].cost, TINY[4].cost
    assert pixels.attention_flops == 16**2 * latents.attention_flops
    others = [cost.flops - cost.attention_flops for cost in (pixels, latents)]
    assert others[0] / others[1] == pytest.approx(16, rel=0.02)


@pytest.mark.parametrize("size_px", [0, 96, 500])
def test_a_size_that_cannot_be_halved_often_enough(size_px: int) -> None:
    with pytest.raises(UserError, match=f"size {size_px} px; allowed: multiples of 64"):
        ledger("tiny", size_px)


def verdicts(kind: str, by_f: dict[int, float]) -> dict[tuple[str, int], tuple[float, str, str]]:
    one = Series("made", kind, by_f, lambda _: "why more", lambda _: "why less")  # type: ignore[arg-type]
    return {(f.claim.kind, f.claim.f): (f.value, f.verdict, f.reason) for f in findings([one])}


def test_claims_are_judged_by_their_range() -> None:
    assert verdicts("compute", {1: 256.0, 4: 16.0, 8: 5.0, 16: 0.5}) == {
        ("compute", 4): (16, "holds", ""),
        ("compute", 8): (51.2, "holds", ""),
        ("compute", 16): (512, "more", "why more"),
        ("compute × steps", 8): (20 * 51.2, "holds", ""),
    }
    assert verdicts("compute", {1: 10.0, 4: 1.0, 8: 0.5, 16: 0.5})["compute", 4] == (10, "less", "why less")
    assert verdicts("memory", {1: 99.0, 4: 8.0, 8: 2.0, 16: 0.5}) == {
        ("memory", 8): (0.25, "holds", ""),
        ("memory", 16): (0.0625, "less", "why less"),
    }


def test_positions_hold_at_any_size_and_reasons_have_the_runs_own_figures() -> None:
    found = {
        (f.claim.kind, f.claim.f, f.found_in.split(",")[0]): f
        for f in findings(computed_series("tiny", TINY))
    }
    for f in (4, 8, 16):
        assert found["positions", f, "positions"].value == f**2
        assert found["positions", f, "positions"].verdict == "holds"
    assert found["values", 8, "values"].value == 48
    share = TINY[1].cost.attention_flops / TINY[1].cost.flops
    assert f"{share:.0%} of the FLOPs at f=1" in found["compute", 8, "FLOPs"].reason
    seconds = dict.fromkeys(TINY, 1.0)
    slow, *_ = findings(measured_series("tiny", TINY, 2, seconds, dict.fromkeys(TINY, 1e6)))
    assert (slow.value, slow.verdict) == (1, "less")
    assert f"{2 * TINY[4].cost.flops / 1e9:.1f} GFLOP/s" in slow.reason


def test_a_claim_of_memory_is_a_share_and_every_other_a_quotient() -> None:
    by_f = {1: 100.0, 4: 10.0, 8: 5.0}
    assert Claim("memory", 8, 4, 0, 0).value(by_f) == 0.5
    assert Claim("compute", 8, 1, 0, 0, factor=3).value(by_f) == 60


def test_tiles_are_bounded_from_above() -> None:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            latent_channels=3,
            norm_num_groups=4,
            mid_block_add_attention=False,
            sample_size=32,
        )
    autoencoder = Autoencoder(nn.Module.to(vae, dtype=torch.float16))
    whole, bound = decode_bytes(autoencoder, 16), tiled_decode_bytes(autoencoder, 16)
    vae.enable_tiling()
    with torch.device("meta"), LiveBytes() as live:
        autoencoder.decode(torch.empty(1, 3, 16, 16, dtype=torch.float16))
    assert live.peak <= bound < whole
    assert tiled_decode_bytes(autoencoder, 8) == decode_bytes(autoencoder, 8)


def test_the_largest_size_that_fits() -> None:
    gb, weights = 1_000_000_000, 2_000_000_000  # and 1 GB is allowed for CUDA
    peaks = [
        SizePeak(1024, weights, gb, 5 * gb, gb),
        SizePeak(2048, weights, 4 * gb, 20 * gb, 2 * gb),
        SizePeak(4096, weights, 21 * gb, 99 * gb, 5 * gb),
    ]
    assert [(fit.device_bytes // gb, fit.tiled, fit.largest_px) for fit in fits(peaks)] == [
        (8, False, 1024),
        (8, True, 2048),
        (24, False, 2048),
        (24, True, 4096),
    ]
    assert all(fit.largest_px == 0 for fit in fits([SizePeak(1024, 30 * gb, 0, 0, 0)]))
