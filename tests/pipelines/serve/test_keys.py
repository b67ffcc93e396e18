import hashlib
import hmac
import json
import os
from pathlib import Path

import pytest

from ldm.errors import UserError
from pipelines.serve import keys
from pipelines.serve.keys import KeyEntry, KeyRing, new_key

CLEAR = "correct-horse-battery-staple-0123456789"


def _file(folder: Path, *lines: str, mode: int = 0o600) -> Path:
    path = folder / "keys.jsonl"
    path.write_text("\n".join(lines) + "\n")
    path.chmod(mode)
    return path


def _entry(name: str, key: str) -> KeyEntry:
    return KeyEntry(name=name, sha256=hashlib.sha256(key.encode()).hexdigest())


def test_a_new_key_is_found_by_its_line_and_is_not_in_it(tmp_path: Path) -> None:
    key, line = new_key("alice")
    other, _ = new_key("alice")

    ring = KeyRing.load(_file(tmp_path, "# of the laboratory", "", line), {})

    found = ring.find(key.encode())
    assert found is not None and found.name == "alice"
    assert ring.find(other.encode()) is None
    assert key.startswith("ldm-") and len(key) == len("ldm-") + 43
    assert key not in line and key not in repr(ring.entries)


def test_a_line_has_the_hash_and_may_have_limits(tmp_path: Path) -> None:
    digest = hashlib.sha256(CLEAR.encode()).hexdigest()
    line = json.dumps({"name": "bob", "sha256": digest, "requests_per_minute": 6, "max_concurrent": 2})

    (entry,) = KeyRing.load(_file(tmp_path, line), {}).entries

    assert (entry.name, entry.sha256, entry.requests_per_minute, entry.max_concurrent) == (
        "bob",
        digest,
        6,
        2,
    )


def test_keys_of_the_environment_join_those_of_the_file(tmp_path: Path) -> None:
    key, line = new_key("alice")

    ring = KeyRing.load(_file(tmp_path, line), {"LDM_API_KEYS": f"bob:{CLEAR}, carol:{CLEAR[::-1]},"})

    presented = [key, CLEAR, CLEAR[::-1]]
    found = [ring.find(clear.encode()) for clear in presented]
    assert [entry and entry.name for entry in found] == ["alice", "bob", "carol"]
    assert not ring.is_open


def test_without_keys_the_server_is_open() -> None:
    assert KeyRing.load(None, {}).is_open


@pytest.mark.parametrize("presented", [b"", b"\xff\xfe\x00", CLEAR[:-1].encode(), CLEAR.encode() + b" "])
def test_what_is_not_exactly_a_key_finds_nobody(presented: bytes) -> None:
    assert KeyRing([_entry("bob", CLEAR)]).find(presented) is None


def test_every_entry_is_compared_also_after_the_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = KeyRing([_entry(name, name + CLEAR) for name in ("a", "b", "c")])
    compared: list[str] = []
    compare = hmac.compare_digest

    def counted(expected: str, presented: str) -> bool:
        compared.append(expected)
        return compare(expected, presented)

    monkeypatch.setattr(keys.hmac, "compare_digest", counted)

    found = ring.find(b"a" + CLEAR.encode())
    assert found is not None and found.name == "a"
    assert compared == [entry.sha256 for entry in ring.entries]


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o620, 0o602, 0o601, 0o777])
def test_a_file_that_others_can_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    path = _file(tmp_path, new_key("alice")[1], mode=mode)

    with pytest.raises(UserError, match=f"chmod 600 {path}"):
        KeyRing.load(path, {})


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o440, 0o640])
def test_a_file_of_its_owner_and_group_is_read(tmp_path: Path, mode: int) -> None:
    assert len(KeyRing.load(_file(tmp_path, new_key("alice")[1], mode=mode), {}).entries) == 1


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 1 of .*JSON"),
        ('{"name": "alice"}', "sha256: Field required"),
        (json.dumps({"name": "alice", "sha256": CLEAR}), "sha256"),
        (json.dumps({"name": "alice", "sha256": "0" * 64, CLEAR: 1}), "entry: Extra inputs"),
        (json.dumps({"name": "a b\n", "sha256": "0" * 64}), "name: String should match"),
        (json.dumps({"name": "anonymous", "sha256": "0" * 64}), "anonymous"),
        (json.dumps({"name": "alice", "sha256": "0" * 64, "max_concurrent": 0}), "max_concurrent"),
        ("# nothing else", "holds no key"),
    ],
)
def test_bad_files_are_refused_with_the_line_and_never_with_what_it_holds(
    tmp_path: Path, line: str, told: str
) -> None:
    with pytest.raises(UserError, match=told) as refused:
        KeyRing.load(_file(tmp_path, line), {})
    assert CLEAR not in str(refused.value) and refused.value.__cause__ is None


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (CLEAR, "entry 1 of LDM_API_KEYS"),
        (f"bob:{CLEAR},carol:short", "entry 2 of LDM_API_KEYS"),
        (f"bob:{CLEAR} {CLEAR}", "entry 1 of LDM_API_KEYS"),
        (f"bob:{CLEAR}é", "entry 1 of LDM_API_KEYS"),
        (f"{CLEAR * 2}:{CLEAR}", "name: String should match"),
        (f"bob:{CLEAR},bob:{CLEAR[::-1]}", "two keys have the name 'bob'"),
        (f"bob:{CLEAR},carol:{CLEAR}", "'bob' and 'carol' have the same key"),
        ("", "holds no key"),
        (" , ", "holds no key"),
    ],
)
def test_a_bad_environment_is_refused_without_showing_a_key(value: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as refused:
        KeyRing.load(None, {"LDM_API_KEYS": value})
    assert CLEAR not in str(refused.value)


def test_a_file_that_is_missing_or_no_text_is_the_users_to_put_right(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        KeyRing.load(tmp_path / "none", {})
    with pytest.raises(UserError, match="directory"):
        KeyRing.load(tmp_path, {})
    path = tmp_path / "binary"
    path.write_bytes(os.urandom(16) + b"\xff")
    path.chmod(0o600)
    with pytest.raises(UserError, match="not text"):
        KeyRing.load(path, {})


def test_no_key_is_made_for_a_bad_name() -> None:
    with pytest.raises(UserError, match="name"):
        new_key("two words")
