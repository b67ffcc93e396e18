"""Marks that outlive a process, and the register that counts deaths."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from pipelines.encode.attempts import NOTHING, Attempt, Attempts, Mark

KILLED = "import os, signal, sys; from pathlib import Path; from pipelines.encode.attempts import Mark\n"


def test_a_mark_survives_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "mark"
    code = KILLED + "m = Mark(Path(sys.argv[1])); m.at(7); m.at(41); os.kill(os.getpid(), signal.SIGKILL)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    died = subprocess.run([sys.executable, "-c", code, str(path)], env=environment)
    assert died.returncode == -signal.SIGKILL
    assert Mark.read(path) == 41
    assert not path.exists() and Mark.read(path) == NOTHING


def test_a_mark_that_touched_nothing_accuses_nothing(tmp_path: Path) -> None:
    mark = Mark(tmp_path / "mark")
    assert Mark.read(mark.path) == NOTHING
    mark.close()


def test_the_register_knows_attempts_that_did_not_end() -> None:
    register = Attempts()
    assert register.begin("decode", "u", "node", "a") == ("", "")
    assert register.begin("encode", "u", "node", "b") == ("", "")
    assert register.begin("decode", "u", "other", "c") == ("node", "a")
    assert register.died("decode", "u", 3) == {3: 1}
    assert register.begin("decode", "u", "node", "d") == ("other", "c")
    assert register.died("decode", "u", 3) == {3: 2}
    register.done("decode", "u")
    assert register.begin("decode", "u", "node", "e") == ("", "")
    assert register.begin("encode", "u", "node", "f") == ("node", "b")


def test_two_deaths_convict_and_one_does_not(tmp_path: Path) -> None:
    attempt = Attempt({3: 2, 5: 1, NOTHING: 9}, Mark(tmp_path / "mark"))
    assert [item for item in range(8) if attempt.is_convicted(item)] == [3]
    attempt.mark.close()
