"""Panels of encode.json."""

from panels import NODES, Panel, Row, quantiles, rate

__all__ = ["ENCODE"]

ENCODE = [
    Row(
        "Throughput",
        [
            Panel("images", "ops", [(rate("ray_ldm_encode_images_total"), "images/s")], "of all sizes"),
            Panel(
                "rows and units",
                "ops",
                [
                    (rate("ray_ldm_encode_rows_total"), "rows/s"),
                    (rate("ray_ldm_encode_units_total"), "units/s"),
                ],
                "committed; flat at 0 while images are encoded: nothing can be written",
            ),
            Panel("written", "Bps", [(rate("ray_ldm_encode_written_bytes_total"), "bytes/s")]),
        ],
    ),
    Row(
        "Inputs that cannot be encoded",
        [
            Panel(
                "into quarantine",
                "ops",
                [(rate("ray_ldm_encode_quarantined_total", "reason"), "{{reason}}")],
                "inputs/s by reason",
                12,
            ),
            Panel(
                "share of the inputs",
                "percentunit",
                [
                    (
                        f"{rate('ray_ldm_encode_quarantined_total')} / "
                        f"({rate('ray_ldm_encode_quarantined_total')} + {rate('ray_ldm_encode_rows_total')})",
                        "bad",
                    )
                ],
                "the job ends where it is above max_bad_share in all",
                12,
            ),
        ],
    ),
    Row(
        "Time of a unit",
        [
            Panel("encoder", "s", quantiles("ray_ldm_encode_unit_encode_seconds")),
            Panel("decoder", "s", quantiles("ray_ldm_encode_unit_decode_seconds")),
            Panel(
                "at work at once",
                "short",
                [
                    (rate("ray_ldm_encode_unit_encode_seconds_sum"), "encoders"),
                    (rate("ray_ldm_encode_unit_decode_seconds_sum"), "decoders"),
                ],
                "seconds of work in a second; encoders well below their number wait for decoders",
            ),
        ],
    ),
    NODES,
]
