"""Tars: what was written comes back, and no archive from outside does harm."""

import gzip
import io
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.errors import BadSampleError
from pipelines.shards import InputConfig, Sample, Shard, list_shards, read_samples, write_tar

ROOT = Path(__file__).resolve().parents[3]
BLOCK = 512


def info(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member


def archive(*members: tuple[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in members:
            tar.addfile(info(name, len(data)), io.BytesIO(data))
    return buffer.getvalue()


def read(path: Path, **config: int) -> tuple[list[Sample], str]:
    """The samples, and the reason of the damage that ended them, if any did."""
    (shard,) = list_shards(path)
    samples: list[Sample] = []
    try:
        for sample in read_samples(shard, InputConfig(**config)):
            samples.append(sample)
    except BadSampleError as damage:
        return samples, f"{damage.reason}: {damage.detail.removeprefix(shard.url)}"
    return samples, ""


def saved(tmp_path: Path, data: bytes, name: str = "a.tar") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


MEMBERS = [(f"dir/ключ{i}.{e}", bytes([i]) * (i * 700)) for i in range(4) for e in ("jpg", "json")]
SAMPLES = [Sample(f"dir/ключ{i}", bytes([i]) * (i * 700), {"json": bytes([i]) * (i * 700)}) for i in range(4)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_what_was_written_comes_back(tmp_path: Path, form: int, suffix: str) -> None:
    data = archive(*MEMBERS, form=form)
    path = saved(tmp_path, data if suffix == ".tar" else gzip.compress(data), f"a{suffix}")
    assert read(path) == (SAMPLES, "")
    assert list_shards(path)[0].name == "a"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(tmp_path: Path, form: int) -> None:
    name = "é/" * 150 + "x"
    assert read(saved(tmp_path, archive((f"{name}.png", b"1"), form=form))) == ([Sample(name, b"1")], "")


def test_write_tar_and_read_back(tmp_path: Path) -> None:
    samples = [Sample("a", b"\x89PNG1", {"txt": b"t", "cls": b"1"}), Sample("b", None, {"json": b"{}"})]
    assert write_tar(tmp_path / "a.tar", samples) == 2
    assert read(tmp_path / "a.tar") == (samples, "")


def test_several_gzip_streams_in_a_row_are_one(tmp_path: Path) -> None:
    data = archive(*MEMBERS)
    packed = gzip.compress(data[:1000]) + gzip.compress(data[1000:])
    assert read(saved(tmp_path, packed, "a.tgz")) == (SAMPLES, "")


def test_names_are_data_and_other_members_are_passed_over(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("../up.jpg", "/etc/passwd.jpg", "nodot", ".hidden.jpg", "a.JPG", "a.jpg", "b.jpg"):
            tar.addfile(info(name, 1), io.BytesIO(b"x"))
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            link = info("b.png", 0, kind)
            link.linkname = "../../etc/passwd"
            tar.addfile(link)
        tar.addfile(info("c.jpg", 1), io.BytesIO(b"x"))
    inside = tmp_path / "in"
    inside.mkdir()
    samples, damage = read(saved(inside, buffer.getvalue()))
    # A second a.jpg is a second sample: to keep one of the two would drop the other silently.
    assert [sample.key for sample in samples] == ["../up", "/etc/passwd", "a", "a", "b", "c"]
    assert {sample.image for sample in samples} == {b"x"}
    assert damage == ""
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "in"]


def test_a_name_that_is_not_utf8_can_be_stored_as_utf8(tmp_path: Path) -> None:
    data = bytearray(archive(("zz.jpg", b"x")))
    data[0] = 0xFF
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:BLOCK]))
    samples, _ = read(saved(tmp_path, bytes(data)))
    assert [sample.key.encode() for sample in samples] == [rb"\xffz"]


SINGLES = [(f"{i}.jpg", bytes([i]) * 600) for i in range(3)]  # 1,536 bytes each


@pytest.mark.parametrize(
    ("length", "whole"),
    [
        (0, 0),
        (100, 0),
        (BLOCK, 0),
        (1536, 0),
        (1600, 0),
        (2048, 1),
        (2100, 1),
        (3 * 1536 - 1, 2),
        (3 * 1536, 2),
    ],
)
def test_every_whole_sample_before_a_tear(tmp_path: Path, length: int, whole: int) -> None:
    """One is known to be whole when the header of the next was read, or the end mark."""
    samples, damage = read(saved(tmp_path, archive(*SINGLES)[:length]))
    assert samples == [Sample(str(i), bytes([i]) * 600) for i in range(whole)]
    assert damage.startswith("broken_tar: ")
    assert ("may be cut" in damage) == (length >= BLOCK)
    if length >= BLOCK:
        assert f"'{whole}'" in damage


def test_the_first_end_block_is_enough(tmp_path: Path) -> None:
    assert len(read(saved(tmp_path, archive(*SINGLES)[: 3 * 1536 + BLOCK]))[0]) == 3


def test_torn_and_flipped_gzip(tmp_path: Path) -> None:
    noise = [(f"{i}.jpg", random.Random(i).randbytes(40_000)) for i in range(5)]
    packed = gzip.compress(archive(*noise))
    samples, damage = read(saved(tmp_path, packed[: len(packed) // 2], "a.tgz"))
    assert [(s.key, s.image) for s in samples] == [(n[:-4], d) for n, d in noise[:2]]
    assert damage.startswith("broken_tar")
    flipped = bytearray(packed)
    flipped[-6] ^= 1  # the checksum: every member was read, and one of them is not what was written
    samples, damage = read(saved(tmp_path, bytes(flipped), "a.tgz"))
    assert len(samples) == 5
    assert "CRC" in damage


def test_damage_is_told_not_taken_for_the_end(tmp_path: Path) -> None:
    data = bytearray(archive(*SINGLES))
    data[1536 + 5] ^= 1
    samples, damage = read(saved(tmp_path, bytes(data)))
    assert samples == []
    assert damage == "broken_tar: : damaged at byte 1536: bad checksum; sample '0' may be cut"
    joined = archive(*SINGLES[:1]) + archive(*SINGLES[1:])
    samples, damage = read(saved(tmp_path, joined))
    assert len(samples) == 1
    assert "data after the end mark" in damage


def test_ten_thousand_empty_members(tmp_path: Path) -> None:
    path = saved(tmp_path, archive(*((f"{i}.jpg", b"") for i in range(10_000))))
    assert read(path)[0] == [Sample(str(i), b"") for i in range(10_000)]


def test_members_of_one_sample_are_bounded_together(tmp_path: Path) -> None:
    many = [(f"a.{i}", b"x" * 600) for i in range(30)]
    (bad, good), damage = read(saved(tmp_path, archive(*many, ("b.jpg", b"x"))), max_member_bytes=10_000)
    assert damage == ""
    assert good == Sample("b", b"x")
    with pytest.raises(BadSampleError, match=r"member_too_large: a\.9: 600 bytes"):
        bad.image_bytes()


def huge(size: int, name: str = "big.jpg") -> bytes:
    return info(name, size).tobuf(tarfile.GNU_FORMAT)


def test_a_member_that_claims_ten_terabytes(tmp_path: Path) -> None:
    data = archive(("a.jpg", b"x"))[:1024] + huge(10**13) + bytes(5000)
    samples, damage = read(saved(tmp_path, data))
    assert samples == [Sample("a", b"x")]
    assert "in the middle of a member; sample 'big' may be cut" in damage


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_claims_ten_terabytes(tmp_path: Path, kind: bytes) -> None:
    data = info("x", 10**13, kind).tobuf(tarfile.GNU_FORMAT) + bytes(5000)
    assert "a header of 10000000000000 bytes" in read(saved(tmp_path, data))[1]


def test_five_thousand_pax_headers_in_a_row(tmp_path: Path) -> None:
    header = info("x", 0, tarfile.XHDTYPE).tobuf(tarfile.GNU_FORMAT)
    samples, damage = read(saved(tmp_path, header * 5000 + archive(("a.jpg", b"x"))))
    assert (samples, damage) == ([Sample("a", b"x")], "")


def sparse_old_gnu() -> bytes:
    """A header with the flag of a continued map, one block of map, one block of data."""
    header = bytearray(info("s.jpg", BLOCK, tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    header[482] = 1
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    return bytes(header) + bytes(BLOCK) + b"d" * BLOCK


def sparse_pax() -> bytes:
    member = info("GNUSparseFile.0/s.jpg", BLOCK)
    member.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "s.jpg",
        "GNU.sparse.realsize": "10000000000000",
    }
    return member.tobuf(tarfile.PAX_FORMAT) + b"1\n0\n512\n".ljust(BLOCK, b"\0")


@pytest.mark.parametrize("sparse", [sparse_old_gnu, sparse_pax])
def test_a_sparse_member_is_reported_and_the_stream_goes_on(
    tmp_path: Path, sparse: Callable[[], bytes]
) -> None:
    data = sparse() + archive(("b.jpg", b"x"))
    (bad, good), damage = read(saved(tmp_path, data))
    assert (good, damage) == (Sample("b", b"x"), "")
    assert bad.key == "s"
    with pytest.raises(BadSampleError, match="sparse_member"):
        bad.label()


def test_a_torn_sparse_map(tmp_path: Path) -> None:
    assert "middle of a member" in read(saved(tmp_path, sparse_old_gnu()[: BLOCK + 9]))[1]


CHILD = """
import sys
from ldm.errors import BadSampleError
from pipelines.shards import Shard, read_samples

def peak_kb():  # of this program: getrusage keeps the peak of the one that started it
    with open('/proc/self/status') as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))

list(read_samples(Shard(sys.argv[2], "warm", "1")))
before = peak_kb()
for sample in read_samples(Shard(sys.argv[1], "a", "1")):
    try:
        print(sample.key, len(sample.image_bytes()))
    except BadSampleError as error:
        print(sample.key, error.reason)
print(peak_kb() - before, file=sys.stderr)
"""


def test_a_member_that_unpacks_to_300_mb_costs_no_memory(tmp_path: Path) -> None:
    """A gzip bomb: 300 kB that a reader of whole members would make 300 MB of."""
    path, zeros = tmp_path / "bomb.tgz", bytes(1 << 20)
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(huge(300 << 20))
        for _ in range(300):
            stream.write(zeros)
        stream.write(archive(("b.jpg", b"x")))
    write_tar(tmp_path / "warm.tar", [Sample("a", b"x")])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(tmp_path / "warm.tar")],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.split("\n") == ["big member_too_large", "b 1", ""], done.stderr
    assert int(done.stderr) < 20_000  # kB


def test_a_shard_is_read_through_its_url_alone(tmp_path: Path) -> None:
    path = saved(tmp_path, archive(*MEMBERS), "with # and %20.tar")
    (shard,) = list_shards(path)
    assert list(read_samples(Shard(shard.url, "x", ""))) == SAMPLES
