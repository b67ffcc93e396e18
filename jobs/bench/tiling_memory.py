"""Time and memory of decoding one large latent by ``ldm decode``, in a process of its own."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["Run", "decode_latent"]

INTERVAL_S = 0.01


@dataclass(frozen=True)
class Run:
    """seconds of the whole command; peak_gb: of resident memory; private_gb: of that, what no file backs.

    With maps in a spill folder, private memory is the interpreter's and what a device would hold: weights,
    tiles, statistics.
    """

    seconds: float
    peak_gb: float
    private_gb: float


def decode_latent(size_px: int, mode: str, tile: int, threads: int, *, spill: bool) -> Run:
    """A random latent of the f8 VAE, into a PNG of ``size_px`` × ``size_px``. RuntimeError if that fails."""
    with tempfile.TemporaryDirectory(prefix="ldm-bench-") as folder:
        latent = Path(folder) / "latent.npy"
        rng = np.random.default_rng(0)
        np.save(latent, rng.standard_normal((4, size_px // 8, size_px // 8), np.float32))
        options = [f"--tiling.mode={mode}", f"--tiling.tile={tile}"]
        options += [f"--tiling.spill={folder}/spill"] if spill else []
        command = [sys.executable, "-m", "jobs.cli", "decode", str(latent), f"{folder}/image.png", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        start = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        private_kb = [0]
        threading.Thread(target=_watch, args=(process, private_kb), daemon=True).start()
        assert process.stderr is not None
        with process.stderr:
            log = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            raise RuntimeError(f"{' '.join(command)} failed:\n{log[-2000:]}")
        return Run(time.perf_counter() - start, usage.ru_maxrss / 1e6, private_kb[0] / 1e6)


def _watch(process: "subprocess.Popen[str]", private_kb: list[int]) -> None:
    while process.returncode is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            return
        fields = dict(line.split(":", 1) for line in status.splitlines())
        if "RssAnon" in fields:
            private_kb[0] = max(private_kb[0], int(fields["RssAnon"].split()[0]))
        time.sleep(INTERVAL_S)
