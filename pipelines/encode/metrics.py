"""What Prometheus can scrape of a run, through Ray's own metrics; Ray prefixes the names with ``ray_``."""

from ray.util.metrics import Counter, Histogram

from pipelines.encode.report import UnitReport

__all__ = ["EncodeMetrics"]

SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]


class EncodeMetrics:
    """Counts on the driver, from the reports of committed units. Needs a connected Ray."""

    def __init__(self) -> None:
        self._rows = Counter("ldm_encode_rows_total", "rows that were committed")
        self._images = Counter("ldm_encode_images_total", "images that were encoded")
        self._bytes = Counter("ldm_encode_written_bytes_total", "bytes of committed files")
        self._units = Counter("ldm_encode_units_total", "units that were committed")
        self._quarantined = Counter(
            "ldm_encode_quarantined_total", "inputs that cannot be encoded", tag_keys=("reason",)
        )
        self._encode = Histogram("ldm_encode_unit_encode_seconds", "an encoder's time for a unit", SECONDS)
        self._decode = Histogram("ldm_encode_unit_decode_seconds", "a decoder's time for a unit", SECONDS)

    def add(self, report: UnitReport) -> None:
        """One more unit is committed."""
        self._units.inc(1)
        for counter, value in (
            (self._rows, report.rows),
            (self._images, report.images),
            (self._bytes, report.bytes),
        ):
            if value:  # a counter refuses to be increased by nothing
                counter.inc(value)
        for reason, count in report.quarantined.items():
            self._quarantined.inc(count, {"reason": reason})
        self._encode.observe(report.encode_s)
        self._decode.observe(report.decode_s)
