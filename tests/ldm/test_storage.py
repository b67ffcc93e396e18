"""URLs become file systems in one place."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.storage import filesystem


@pytest.mark.parametrize(
    ("url", "protocol", "path"),
    [
        ("/a/b/", "file", "/a/b"),
        ("file:///a/b", "file", "/a/b"),
        ("memory://a/b", "memory", "/a/b"),
        ("s3://bucket/a/b/", "s3", "bucket/a/b"),
        ("s3a://bucket", "s3", "bucket"),
    ],
)
def test_url_is_a_file_system_and_a_path(url: str, protocol: str, path: str) -> None:
    store, found = filesystem(url)
    assert found == path
    assert protocol in store.protocol


def test_relative_path_is_made_absolute() -> None:
    assert filesystem("x/y")[1] == str(Path("x/y").absolute())


def test_unknown_scheme_is_told() -> None:
    with pytest.raises(UserError, match="cannot use nowhere://x"):
        filesystem("nowhere://x")


def test_limits_travel_with_the_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_S3_ATTEMPTS", "3")
    store, _ = filesystem("s3://bucket")
    monkeypatch.setenv("LDM_S3_ATTEMPTS", "7")
    assert pickle.loads(pickle.dumps(store)).limits.attempts == 3
    assert filesystem("s3://bucket")[0].limits.attempts == 7


def test_a_local_path_imports_no_s3_client() -> None:
    code = (
        "import sys; from ldm.storage import filesystem; filesystem('/tmp'); print('botocore' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
