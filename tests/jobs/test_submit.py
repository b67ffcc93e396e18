"""``ldm submit``: what is refused before anything is sent, and which servers are trusted. No Ray here."""

import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml

from jobs import cli
from jobs.chain_file import read_chain
from jobs.encode import EncodeJob
from jobs.evaluate_samples import EvaluateSamplesJob
from jobs.generate import GenerateJob
from jobs.job_file import END_OF_OPTIONS, JobFile, command_line, read_job
from jobs.job_server import JobServer, asks_for_token, is_loopback
from jobs.ray_token import find_token
from jobs.train import TrainJob
from jobs.train_vae import TrainVaeJob
from ldm.errors import UserError

READY = Path(__file__).resolve().parents[2] / "jobs" / "ready"
READY_JOBS = {
    "encode-256-512-clip": EncodeJob,
    "train-base": TrainJob,
    "train-upsampler": TrainJob,
    "finetune-vae": TrainVaeJob,
    "evaluate-samples": EvaluateSamplesJob,
    "generate": GenerateJob,
}
SECRET = "hf_0123456789"


@pytest.fixture
def job_path(tmp_path: Path) -> Path:
    return tmp_path / "job.yaml"


@pytest.fixture(autouse=True)
def _no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a token nor an address from outside of the test."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def refused(path: Path, text: str) -> str:
    """What is said about a job with this text, on a cluster."""
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_job(path).check(path, on_cluster=True)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path), "FILE")


@pytest.mark.parametrize("name", READY_JOBS)
def test_a_ready_job_is_what_its_command_takes(name: str) -> None:
    path = READY / f"{name}.yaml"
    job = read_job(path)
    config = job.check(path, on_cluster=True)
    assert type(config) is READY_JOBS[name]
    assert config.model_dump()["cluster"]["address"] == "auto"
    assert job.env and job.working_dir
    comment = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"ldm submit jobs/ready/{path.name}" in comment
    assert "hours" in comment or "train-base.yaml" in comment
    assert "cost" in comment


def test_every_ready_file_is_tested() -> None:
    assert {path.stem for path in READY.iterdir()} == {*READY_JOBS, "chain"}


def test_the_ready_chain_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    chain = read_chain(READY / "chain.yaml")
    configs = chain.check(READY / "chain.yaml", on_cluster=True)
    assert [stage.records(config) for stage, config in zip(chain.stages, configs, strict=True)] == [
        ("s3://BUCKET/latents/stats.json",),
        ("/mnt/shared/model/ldm.json",),
        ("/mnt/shared/reports/model.html",),
        (),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("options: {}", "command in FILE is missing; add it"),
        ("command: encod", "command in FILE: unknown command 'encod'; did you mean 'encode'?"),
        ("command: encode\noption: {}", "unknown option option in FILE; did you mean 'options'?"),
        (
            "command: encode\noptions: {input: s3://a/b}",
            "options.output in FILE is missing; add it",
        ),
        (
            "command: encode\noptions: {input: s3://a/b, output: s3://a/c, encoder: {max_sise: 2}}",
            "unknown option options.encoder.max_sise in FILE; did you mean 'options.encoder.max_size'?",
        ),
        (
            "command: encode\noptions: {input: s3://a/b, output: s3://a/c, encoder: {max_size: no}}",
            "options.encoder.max_size in FILE is False",
        ),
        (
            "command: encode\noptions: {input: s3://a/b, output: latents}",
            "options.output in FILE is 'latents', a path in a folder that ends with the job; allowed: an "
            "absolute path that every node sees, a URL, or what is in working_dir",
        ),
        (
            "command: evaluate samples\noptions: {checkpoint: /c, reference: s3://a/b}",
            "options.page in FILE is 'out/samples.html', a path in a folder that ends with the job",
        ),
        (
            "command: encode\noptions: {input: /a, output: /b, cluster: {address: 'h:6379'}}",
            "options.cluster.address is 'h:6379' in a job that is submitted; leave it out",
        ),
        (
            "command: encode\noptions: {input: /a, output: /b, cluster: {num_cpus: 4}}",
            "options.cluster in FILE: num_cpus, num_gpus and object_store_memory_bytes are for",
        ),
        ("command: train\nimage: i\nworking_dir: .", "working_dir and image exclude each other"),
        ("command: train\nexcludes: [a]", "excludes needs working_dir"),
        ("command: submit", "command in FILE: unknown command 'submit'"),
        ("resources: {num_cpu: 1}\ncommand: train", "unknown option resources.num_cpu in FILE; did you mean"),
        ("- command", "FILE holds no options; allowed: a mapping of option names to values"),
        ("command: [", "FILE is not valid YAML at line 1"),
    ],
)
def test_mistakes_in_a_job_file(text: str, message: str, job_path: Path) -> None:
    assert refused(job_path, text).startswith(message)


def test_a_path_in_the_working_folder_goes_with_the_job(tmp_path: Path, job_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    text = f"command: shards\nworking_dir: {tmp_path}\noptions: {{src: photos, out: /mnt/shards}}"
    job_path.write_text(text)
    read_job(job_path).check(job_path, on_cluster=True)
    assert refused(job_path, text.replace("/mnt/shards", "shards")).startswith(
        "options.out in FILE is 'shards'"
    )


def test_secrets_are_named_and_never_shown(
    job_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "command: shards\noptions: {src: /a, out: /b}\nenv: [HF_TOKEN, NOT_SET_1]"
    job_path.write_text(text)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert cli.main(["submit", str(job_path)]) == 2
    assert capsys.readouterr().err == (
        "ldm submit: error: environment variable NOT_SET_1 is not set; "
        "set it where you submit, or take its name out of env\n"
    )
    job = JobFile(command="shards", options={"src": "/a", "out": "/b"}, env=("HF_TOKEN",))
    assert job.runtime_env() == {"env_vars": {"HF_TOKEN": SECRET}}
    assert SECRET not in repr(job) + command_line(job.command, job.options_there())
    assert SECRET not in refused(job_path, f"command: shards\nenv: ['HF_TOKEN={SECRET}']")


@pytest.mark.parametrize(
    "options",
    [
        {"input": "s3://a/b", "sizes": [256, 512], "nested": {"flag": True, "none": None, "number": 1e-4}},
        {"text": f'it\'s\n{END_OF_OPTIONS}\n$(touch x) `y` \\ "z" é', "empty": {}},
        {"long": "x" * 100_000},
        {},
    ],
)
def test_the_shell_hands_the_options_on_unchanged(options: dict[str, object], tmp_path: Path) -> None:
    """With `cat` in place of the command, by the shell that Ray uses: subprocess with shell=True."""
    line = command_line("encode", options)
    start = "exec python -m jobs.cli encode --config /dev/stdin"
    assert line.startswith(start)
    shown = subprocess.run(
        line.replace(start, "exec cat /dev/stdin", 1),
        shell=True, capture_output=True, text=True, timeout=20, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert yaml.safe_load(shown.stdout) == options
    assert list(tmp_path.iterdir()) == []


def test_what_ray_gets_of_folder_and_image(tmp_path: Path) -> None:
    options = {"src": "/a", "out": "/b"}
    folder = JobFile(command="shards", options=options, working_dir=tmp_path, excludes=("*.bin",))
    assert folder.runtime_env() == {"working_dir": str(tmp_path), "excludes": ["*.bin"]}
    image = JobFile(command="shards", options=options, image="registry/ldm:1")
    assert image.runtime_env() == {"image_uri": "registry/ldm:1"}
    from ray.runtime_env import RuntimeEnv

    assert dict(RuntimeEnv(**image.runtime_env())) == {"image_uri": "registry/ldm:1"}


def write_token(path: Path, text: str, mode: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_the_token_is_looked_for_in_rays_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_token() is None
    write_token(tmp_path / "home/.ray/auth_token", "default\n", 0o600)
    assert find_token() == "default"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(write_token(tmp_path / "named", "named\n", 0o400)))
    assert find_token() == "named"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert find_token() == "given"


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("t", 0o640, r"token file .*named is open to others \(mode 640\); chmod 600 .*named"),
        ("t", 0o604, r"token file .*named is open to others \(mode 604\)"),
        (" \n", 0o600, "token file .*named is empty"),
        (None, 0, "cannot read the token file .*named: No such file or directory"),
    ],
)
def test_token_files_that_are_refused(
    text: str | None, mode: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "named"
    if text is not None:
        write_token(path, text, mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    with pytest.raises(UserError, match=message):
        find_token()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8265", True),
        ("http://127.8.9.1", True),
        ("https://[::1]:8265", True),
        ("http://localhost:8265", True),
        ("http://0.0.0.0:8265", False),
        ("http://10.0.0.1:8265", False),
        ("http://[::]:8265", False),
        ("http://127.0.0.1.nip.invalid", False),
    ],
)
def test_loopback(url: str, expected: bool) -> None:
    assert is_loopback(url) is expected


@pytest.mark.parametrize(
    "address", ["auto", "10.0.0.1:6379", "ray://h:10001", "http://", "http://h:port", "ftp://h"]
)
def test_addresses_that_are_no_url(address: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"address is '{address}'; allowed: http://HOST:PORT")):
        _ = JobServer(address=address).url


@pytest.fixture
def serve_status(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], str]]:
    """(status, host) → the URL of an HTTP server that answers everything with it, and counts tokens."""
    monkeypatch.setenv("NO_PROXY", "*")
    servers = []

    def start(status: int, host: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                assert "Authorization" not in self.headers
                self.send_response(status)
                self.send_header("Location", "http://127.0.0.1:9/")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer((host, 0), Handler)
        servers.append(server)
        Thread(target=server.serve_forever, daemon=True).start()
        return f"http://{host}:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("status", "expected"), [(200, False), (401, True), (403, True)])
def test_who_asks_for_a_token(status: int, expected: bool, serve_status: Callable[[int, str], str]) -> None:
    assert asks_for_token(serve_status(status, "127.0.0.1")) is expected


@pytest.mark.parametrize("status", [302, 404, 500])
def test_other_servers_are_refused(status: int, serve_status: Callable[[int, str], str]) -> None:
    url = serve_status(status, "127.0.0.1")
    with pytest.raises(UserError, match=f"^{url} is no job server: it answers {status}"):
        JobServer(address=url).connect()


def test_nobody_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    assert cli.main(["jobs", "list", "--address", url]) == 2
    assert capsys.readouterr().err.startswith(f"ldm jobs list: error: no job server at {url} (")


def test_a_token_is_asked_for(serve_status: Callable[[int, str], str]) -> None:
    url = serve_status(401, "127.0.0.1")
    with pytest.raises(
        UserError, match=f"^{url} asks for a token, and there is none; set RAY_AUTH_TOKEN_PATH"
    ):
        JobServer(address=url).connect()


def own_address() -> str:
    """An address of this machine that others may reach; no packet is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("no address but loopback")
        address: str = probe.getsockname()[0]
        return address


def test_an_open_server_of_others_is_refused_unless_told(
    serve_status: Callable[[int, str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serve_status(200, own_address())
    # The handler asserts that nobody sends it: a server that asks for no token gets none.
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(write_token(tmp_path / "token", "t", 0o600)))
    with pytest.raises(
        UserError, match=f"^{url} asks for no token: .*; start its cluster with RAY_AUTH_MODE=token"
    ):
        JobServer(address=url).connect()
