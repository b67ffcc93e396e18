"""docs/reference.md is what `make docs` writes, on any machine."""

import subprocess
import sys

from tests.docs.markdown_page import ROOT

# With a number of CPUs that no machine has, what depends on the machine would stand out.
CODE = (
    "import os, sys; os.cpu_count = lambda: 7919; "
    "from jobs.reference import reference; sys.stdout.buffer.write(reference().encode())"
)


def test_the_committed_reference_is_that_of_the_models() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    page = (ROOT / "docs" / "reference.md").read_bytes()
    assert done.stdout == page, "run: make docs"
