"""Where a config's values come from, and what is said about values that are not allowed."""

from pathlib import Path
from types import ModuleType

import pytest
import yaml
from pydantic import SecretStr, ValidationError

from jobs.config import job_class, load, save_resolved
from ldm.errors import UserError


@pytest.fixture
def yaml_path(tmp_path: Path) -> Path:
    return tmp_path / "job.yaml"


def refusal(tiny: ModuleType, *args: str) -> str:
    """What `load` says about these arguments."""
    with pytest.raises(UserError) as caught:
        load(tiny.TinyJob, "tiny-job", args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_priority_is_command_line_then_environment_then_file_then_default(
    tiny: ModuleType, yaml_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml_path.write_text("input: from-file\nbatch_size: 2\nlimit: 20\nstore: mode\n")
    monkeypatch.setenv("LDM_TINY_JOB__BATCH_SIZE", "3")
    monkeypatch.setenv("LDM_TINY_JOB__LIMIT", "30")
    config, as_json = load(tiny.TinyJob, "tiny-job", ["--config", str(yaml_path), "--batch-size", "4"])
    assert (config.batch_size, config.limit, config.store, config.flips) == (4, 30, "mode", False)
    assert (config.input, config.output) == ("from-file", "there")
    assert as_json is False


def test_nested_options_merge_key_by_key_over_all_places(
    tiny: ModuleType, yaml_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml_path.write_text("pool:\n  max_size: 7\n")
    from_file, _ = load(tiny.TinyJob, "tiny-job", ["in", "--config", str(yaml_path)])
    assert from_file.pool == tiny.Pool(min_size=2, max_size=7)
    monkeypatch.setenv("LDM_TINY_JOB__POOL__MAX_SIZE", "8")
    from_environment, _ = load(tiny.TinyJob, "tiny-job", ["in", "--config", str(yaml_path)])
    assert from_environment.pool == tiny.Pool(min_size=2, max_size=8)
    typed, _ = load(tiny.TinyJob, "tiny-job", ["in", "--pool.max-size", "9", "--config", str(yaml_path)])
    assert typed.pool == tiny.Pool(min_size=2, max_size=9)


@pytest.mark.parametrize(
    ("args", "field", "value"),
    [
        (["in", "out"], "output", "out"),
        (["in", "--batch-size", "3", "out"], "output", "out"),
        (["--flips", "in"], "flips", True),
        (["in", "--no-flips"], "flips", False),
        (["in", "--limit", "null"], "limit", None),
        (["in", "--sizes", "64,128"], "sizes", (64, 128)),
        (["in", "--sizes", "64", "--sizes", "96"], "sizes", (64, 96)),
        (["in", "--token", "hush-hush"], "token", SecretStr("hush-hush")),
    ],
)
def test_command_line_forms(tiny: ModuleType, args: list[str], field: str, value: object) -> None:
    config, _ = load(tiny.TinyJob, "tiny-job", args)
    assert getattr(config, field) == value


def test_a_config_built_in_code_ignores_the_environment(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_TINY_JOB__BATCH_SIZE", "3")
    monkeypatch.setenv("BATCH_SIZE", "3")
    assert tiny.TinyJob(input="in").batch_size == 8


def test_a_config_is_frozen(tiny: ModuleType) -> None:
    config = tiny.TinyJob(input="in")
    with pytest.raises(ValidationError, match="frozen"):
        config.batch_size = 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "INPUT is missing; give it on the command line or in --config FILE"),
        (["in", "--bacth-size", "3"], "unknown option '--bacth-size'; did you mean '--batch-size'?"),
        (["in", "--pool.max-siz=3"], "unknown option '--pool.max-siz'; did you mean '--pool.max-size'?"),
        (["in", "out", "more"], "unexpected argument 'more'; see ldm tiny-job --help"),
        (["in", "--limit"], "argument --limit: expected one argument; see ldm tiny-job --help"),
        (["in", "--batch-size", "x"], "--batch-size is 'x'; allowed: a valid integer"),
        (["in", "--batch-size", "0"], "--batch-size is '0'; allowed: greater than 0"),
        (["in", "--store", "all"], "--store is 'all'; allowed: 'moments' or 'mode'"),
        (["in", "--pool.min-size", "4"], "--pool: min_size 4 is above max_size 3"),
        (
            ["in", "--token", "abc"],
            "--token is not allowed; allowed: Value should have at least 4 items after validation, not 3",
        ),
        (
            ["in", "--batch-size", "x", "--pool.min-size", "0"],
            "--batch-size is 'x'; allowed: a valid integer | "
            "--pool.min-size is '0'; allowed: greater than or equal to 1",
        ),
    ],
)
def test_mistakes_on_the_command_line(tiny: ModuleType, args: list[str], message: str) -> None:
    assert refusal(tiny, *args) == message


def test_a_list_that_cannot_be_parsed_is_refused(tiny: ModuleType) -> None:
    assert "sizes" in refusal(tiny, "in", "--sizes", "{64")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bacth_size: 3", "unknown option bacth_size in {path}; did you mean 'batch_size'?"),
        ("pool: {max_siz: 3}", "unknown option pool.max_siz in {path}; did you mean 'pool.max_size'?"),
        ("batch_size: many", "batch_size in {path} is 'many'; allowed: a valid integer"),
        ("sizes: [64, big]", "sizes.1 in {path} is 'big'; allowed: a valid integer"),
        ("batch_size: {a: 1}", "batch_size in {path} is a dict; allowed: a valid integer"),
        ("- 3", "{path} holds no options; allowed: a mapping of option names to values"),
        ("token: 'open\n", "{path} is not valid YAML at line 2, column 1; correct the file"),
    ],
)
def test_mistakes_in_the_file(tiny: ModuleType, yaml_path: Path, text: str, message: str) -> None:
    yaml_path.write_text(text)
    assert refusal(tiny, "in", "--config", str(yaml_path)) == message.format(path=yaml_path)


def test_an_unknown_key_that_is_near_nothing_lists_what_is_allowed(tiny: ModuleType, yaml_path: Path) -> None:
    yaml_path.write_text("pool: {zzz: 3}")
    assert refusal(tiny, "in", "--config", str(yaml_path)).endswith("allowed: pool.min_size, pool.max_size")


def test_a_missing_file_is_refused(tiny: ModuleType, yaml_path: Path) -> None:
    message = refusal(tiny, "in", "--config", str(yaml_path))
    assert message == f"cannot read --config {yaml_path}: No such file or directory; give a YAML file"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("LDM_TINY_JOB__BATCH_SIZE", "x", "LDM_TINY_JOB__BATCH_SIZE is 'x'; allowed: a valid integer"),
        (
            "LDM_TINY_JOB__BATCHSIZE",
            "1",
            "environment variable LDM_TINY_JOB__BATCHSIZE sets no option; "
            "did you mean 'LDM_TINY_JOB__BATCH_SIZE'?",
        ),
        (
            "LDM_TINY_JOB__POOL__ZZZ",
            "1",
            "unknown option LDM_TINY_JOB__POOL__ZZZ; "
            "allowed: LDM_TINY_JOB__POOL__MIN_SIZE, LDM_TINY_JOB__POOL__MAX_SIZE",
        ),
        (
            "LDM_TINY_JOB__POOL__MAX_SIZ",
            "1",
            "unknown option LDM_TINY_JOB__POOL__MAX_SIZ; did you mean 'LDM_TINY_JOB__POOL__MAX_SIZE'?",
        ),
    ],
)
def test_mistakes_in_the_environment(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    assert refusal(tiny, "in") == message


def test_a_secret_is_in_no_message(
    tiny: ModuleType, yaml_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_TINY_JOB__TOKEN", "xyz")
    assert "xyz" not in refusal(tiny, "in")
    monkeypatch.delenv("LDM_TINY_JOB__TOKEN")
    for text in ("token: {secret: xyz}", "token: 'xyz", "token: [xyz]"):
        yaml_path.write_text(text)
        assert "xyz" not in refusal(tiny, "in", "--config", str(yaml_path))


def test_a_resolved_config_reads_back_equal_and_holds_no_secret(tiny: ModuleType, yaml_path: Path) -> None:
    args = ["in", "--batch-size", "3", "--sizes", "64,96", "--pool.max-size", "5"]
    config, _ = load(tiny.TinyJob, "tiny-job", args)
    save_resolved(config, yaml_path)
    assert yaml.safe_load(yaml_path.read_text())["pool"] == {"min_size": 2, "max_size": 5}
    assert load(tiny.TinyJob, "tiny-job", ["--config", str(yaml_path)])[0] == config
    assert [path.name for path in yaml_path.parent.iterdir()] == ["job.yaml"]
    save_resolved(tiny.TinyJob(input="in", token=SecretStr("hush-hush")), yaml_path)
    assert "hush" not in yaml_path.read_text()


def test_a_module_has_exactly_one_job(tiny: ModuleType) -> None:
    assert job_class(tiny) is tiny.TinyJob
    with pytest.raises(ValueError, match="defines 0 job configs"):
        job_class(yaml)
