"""Runs the blocks of a page one after the other in a folder of their own, with smaller numbers."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["PageShell", "smaller"]

BLOCK_TIMEOUT_S, START_TIMEOUT_S, END_TIMEOUT_S = 600, 180, 60
SERVER = re.compile(r"^ldm serve ", re.MULTILINE)
READY = "(end it with Ctrl+C)"
# What a reader types → what a test runs instead: as many steps, crops and workers as show that the command
# works, and no weights that would have to be downloaded.
SMALLER = {
    r"--crops-per-image \d+": "--crops-per-image 12",
    r"--train\.steps \d+": "--train.steps 2",
    r"(ldm train .*)--train\.preset \w+": r"\1--train.preset tiny",
    r"--train\.num-workers \d+": "--train.num-workers 2",
    r"--train\.num-gpus \d+": "--train.num-gpus 0",
    r"--train\.lora\.rank \d+": "--train.lora.rank 2",
    r"--steps [\d,]+": "--steps 2",
    r"--guidance 1,2,3": "--guidance 1,3",
    r"--pool\.size \d+": "--pool.size 2",
    r"--actors\.size \d+": "--actors.size 2",
    r"--extractor (inception|mobilenet)": "--extractor random",
    r"--perceptual lpips-\w+": "--perceptual random",
    r"(?<= )/scratch\b": "scratch",
    r'num_inference_steps": \d+': 'num_inference_steps": 2',
}
# What the pages leave to defaults that are made for more than two cores and a minute.
ENVIRONMENT = {
    "LDM_TRAIN__TRAIN__BATCH_SIZE": "8",
    "LDM_TRAIN__TRAIN__DATA__VALIDATION_ROWS": "0",
    "LDM_TRAIN__TRAIN__SAMPLES__NUM_IMAGES": "0",
    "LDM_TRAIN__TRAIN__PRESET": "tiny",
    "LDM_TRAIN_VAE__TRAIN__BATCH_SIZE": "2",
    "LDM_SAMPLE__IMAGES_PER_CLASS": "1",
    "LDM_SAMPLE__STEPS": "2",
    "LDM_UPSCALE__STEPS": "2",
    "LDM_EDIT__DENOISE__STEPS": "4",
    "LDM_INPAINT__DENOISE__STEPS": "2",
    "LDM_INTERPOLATE__DENOISE__STEPS": "2",
    "LDM_INTERPOLATE__FRAMES": "3",
    "LDM_EVALUATE_SAMPLES__EXTRACTOR": "random",
    "LDM_EVALUATE_SAMPLES__NUM_IMAGES": "4",
    "LDM_EVALUATE_SAMPLES__BOOTSTRAP__RESAMPLES": "10",
    "LDM_EVALUATE_SAMPLES__BOOTSTRAP__FID_RESAMPLES": "2",
    "LDM_EVALUATE_RECON__BOOTSTRAP__RESAMPLES": "10",
    "LDM_EVALUATE_RECON__BOOTSTRAP__FID_RESAMPLES": "2",
    "LDM_EVALUATE_BY_F__SECONDS": "0.5",
    "LDM_EVALUATE_BY_F__BOOTSTRAP__RESAMPLES": "10",
    "OMP_NUM_THREADS": "1",
}


def smaller(text: str, *, key: str, port: int) -> str:
    """A block as it is run. key: of a row that stands for KEY; port: for that of the server."""
    for pattern, instead in SMALLER.items():
        text = re.sub(pattern, instead, text)
    return text.replace("#KEY", f"#{key}").replace("127.0.0.1:8000", f"127.0.0.1:{port}")


class PageShell:
    """One page's folder. A block with ``ldm serve`` runs on beside the later ones, until `close`."""

    def __init__(self, folder: Path, *, key: str, port: int, **environment: str) -> None:
        self.folder, self.key, self.port = folder, key, port
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LDM_")}
        own = {"LDM_SERVE__PORT": str(port), "PATH": path}
        self.environment = kept | ENVIRONMENT | own | environment
        self.server: subprocess.Popen[bytes] | None = None
        self.log = folder / "server.log"

    def run(self, language: str, text: str) -> None:
        """AssertionError, with what was printed, where a command ends with another status than 0."""
        script = smaller(text, key=self.key, port=self.port)
        if language == "sh" and SERVER.search(script):
            self._serve(script)
            return
        line = ["bash", "-euxo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]
        done = subprocess.run(
            [*line, script], cwd=self.folder, env=self.environment, timeout=BLOCK_TIMEOUT_S,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{script}\nended with {done.returncode}:\n{done.stdout[-6000:]}"

    def _serve(self, script: str) -> None:
        assert self.server is None, "a page has one server"
        with self.log.open("wb") as log:
            self.server = subprocess.Popen(
                ["bash", "-euc", f"exec {script}"], cwd=self.folder, env=self.environment,
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        deadline = time.monotonic() + START_TIMEOUT_S
        while READY not in self.log.read_text():
            assert self.server.poll() is None, f"the server ended:\n{self.log.read_text()[-6000:]}"
            assert time.monotonic() < deadline, f"the server did not start:\n{self.log.read_text()[-6000:]}"
            time.sleep(0.2)

    def close(self) -> None:
        """End the server as Ctrl+C does; AssertionError where it does not end with status 0."""
        if self.server is None:
            return
        self.server.send_signal(signal.SIGINT)
        try:
            status = self.server.wait(END_TIMEOUT_S)
        finally:
            self.server.kill()
        assert status == 0, f"the server ended with {status}:\n{self.log.read_text()[-6000:]}"
