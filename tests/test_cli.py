from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import drawplate
from drawplate import cli, ending, errors
from drawplate.machine.doctor import Check
from drawplate.recipe import Recipe, known_keys, load_recipe
from drawplate.records import ModelScore

HELP_SECONDS = 0.5


@pytest.fixture
def recipe_file(tmp_path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {{name_or_path: m}}\ndata: {{files: [a.txt]}}\noutput_dir: {tmp_path / 'run'}\n")
    return path


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


def raising(error: BaseException):
    def call(*_, **__):
        raise error

    return call


@pytest.mark.parametrize("arguments", [["--help"], ["tune", "--help"], ["--version"], ["recipe"]])
def test_what_needs_no_torch_imports_none(arguments):
    code = (
        "import sys; from drawplate.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'bitsandbytes', 'datasets', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_help_answers_at_once():
    def seconds() -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "drawplate.cli", "--help"], capture_output=True, timeout=60, check=True)
        return time.perf_counter() - began

    fastest = min(seconds() for _ in range(5))
    assert fastest < 2 * HELP_SECONDS, "twice what a person is promised, because tests share the machine"


def test_a_ctrl_c_after_the_end_changes_nothing(monkeypatch):
    monkeypatch.setattr(cli, "app", raising(SystemExit(75)))
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit, match="75"):
            cli.main()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_version_is_the_packages():
    assert invoke("--version").stdout == f"drawplate {drawplate.__version__}\n"


@pytest.mark.parametrize(
    "kind",
    [
        errors.UsageError,
        errors.EnvironmentProblem,
        errors.DataError,
        errors.DoesNotFit,
        errors.NumericError,
        errors.StorageError,
        errors.IntegrityError,
        errors.NeedsNetwork,
        errors.StoppedSafely,
    ],
)
def test_a_user_error_is_three_labelled_lines_and_its_exit_code(monkeypatch, recipe_file, kind):
    error = kind("a.txt is empty.", safe="The base model is untouched.", next_step="Add text to a.txt.")
    monkeypatch.setattr(drawplate, "tune", raising(error))
    done = invoke("tune", str(recipe_file))
    assert done.exit_code == kind.exit_code
    assert done.stderr.splitlines() == [
        "  what happened: a.txt is empty.",
        "   what is safe: The base model is untouched.",
        "what to do next: Add text to a.txt.",
    ]
    assert done.stdout == ""


def test_long_lines_and_control_characters_stay_three_lines(monkeypatch, recipe_file):
    name = "x" * 300 + "\x1b[2J\u202e\n.txt"
    monkeypatch.setattr(drawplate, "tune", raising(errors.DataError(name, next_step="[red]Rename[/red] it.")))
    lines = invoke("tune", str(recipe_file)).stderr.splitlines()
    assert len(lines) == 3
    assert "\x1b" not in lines[0]
    assert r"\x1b[2J\u202e\x0a.txt" in lines[0]
    assert lines[2].endswith("[red]Rename[/red] it.")


@pytest.mark.parametrize("command", ["tune", "plan"])
def test_a_wrong_recipe_is_refused_before_anything_is_loaded(monkeypatch, recipe_file, command):
    monkeypatch.setattr(f"drawplate.run.tune.{command}", raising(AssertionError("was called")))
    done = invoke(command, str(recipe_file), "--set", "train.learning_rat=1")
    assert done.exit_code == 2
    assert "did you mean train.learning_rate?" in done.stderr


def test_overrides_reach_the_run(monkeypatch, recipe_file):
    seen: list[Recipe] = []
    monkeypatch.setattr("drawplate.run.tune.plan", lambda recipe, gpu, tell: seen.append(recipe) or {})
    options = ("--set", "train.seed=7", "--set", "lora.r=4", "--vram", "6GiB")
    done = invoke("plan", str(recipe_file), *options, "--json")
    assert done.exit_code == 0, done.stderr
    assert (seen[0].train.seed, seen[0].lora.r, seen[0].memory.vram) == (7, 4, 6 * 2**30)
    assert json.loads(done.stdout) == {}


def test_an_interrupt_before_anything_was_kept_is_clean(monkeypatch, recipe_file):
    monkeypatch.setattr(drawplate, "tune", raising(KeyboardInterrupt()))
    done = invoke("tune", str(recipe_file))
    assert done.exit_code == 130
    assert len(done.stderr.splitlines()) == 3


def test_an_interrupted_run_that_kept_something_says_where(monkeypatch, recipe_file, tmp_path):
    def stop(*_):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "record.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(drawplate, "tune", stop)
    done = invoke("tune", str(recipe_file))
    assert done.exit_code == 75
    assert str(tmp_path / "run") in done.stderr


def test_an_older_runs_record_is_not_taken_for_this_ones(monkeypatch, recipe_file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "record.json").write_text("{}")
    monkeypatch.setattr(drawplate, "tune", raising(KeyboardInterrupt()))
    assert invoke("tune", str(recipe_file)).exit_code == 130


def log_file(stderr: str) -> Path:
    assert len(stderr.splitlines()) == 3, stderr
    return Path(stderr.split("The log is ")[1].split(".txt")[0] + ".txt")


def test_a_programmers_error_is_three_lines_and_a_file(monkeypatch, recipe_file, tmp_path):
    monkeypatch.setattr(ending.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(drawplate, "tune", raising(KeyError("loss\nsecond line")))
    done = invoke("tune", str(recipe_file))
    assert done.exit_code == 1
    file = log_file(done.stderr)
    assert file.parent == tmp_path
    assert "Traceback (most recent call last)" in file.read_text()
    assert "KeyError" in file.read_text()


def test_the_traceback_of_a_run_that_had_begun_lies_in_its_log(monkeypatch, recipe_file, tmp_path):
    def fail(*_):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "recipe.yaml").write_text("")
        raise RuntimeError("shapes")

    monkeypatch.setattr(drawplate, "tune", fail)
    file = log_file(invoke("tune", str(recipe_file)).stderr)
    assert file == tmp_path / "run" / "log.txt"
    assert "RuntimeError: shapes" in file.read_text()


def test_where_no_log_can_be_written_the_place_is_named(monkeypatch, recipe_file):
    monkeypatch.setattr(ending.tempfile, "NamedTemporaryFile", raising(PermissionError()))
    monkeypatch.setattr(drawplate, "tune", raising(KeyError("loss")))
    lines = invoke("tune", str(recipe_file)).stderr.splitlines()
    assert len(lines) == 3
    assert "No log could be written; it came from " in lines[2]
    assert "test_cli.py, line " in lines[2]


def test_eval_takes_several_files_and_prints_only_json(monkeypatch):
    calls = []

    def measure(model, adapter, files, *, settings, observer):
        calls.append((model, adapter, files, settings))
        return {"base model": ModelScore(nats=20.0, tokens=10, bytes=40)}

    monkeypatch.setattr(drawplate, "evaluate", measure, raising=False)
    done = invoke("eval", "--model", "m", "--adapter", "a", "--data", "x.txt", "--data", "y", "--json")
    assert calls == [(["m"], ["a"], ["x.txt", "y"], [])]
    assert json.loads(done.stdout)["base model"]["loss"] == 2.0
    assert "7.39" in invoke("eval", "--model", "m", "--data", "x.txt").stdout


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("absent", 0), ("missing", 3)])
def test_doctor_exits_3_only_if_something_needed_is_missing(monkeypatch, status, code):
    row = Check(name="torch", status=status, found="2.13.0", mend="pip install torch")
    monkeypatch.setattr("drawplate.machine.doctor.examine", lambda network: [row])
    done = invoke("doctor")
    assert done.exit_code == code
    assert "pip install torch" in done.stdout
    as_json = invoke("doctor", "--json")
    assert as_json.exit_code == code
    assert json.loads(as_json.stdout) == [
        {"name": "torch", "status": status, "found": "2.13.0", "mend": "pip install torch"}
    ]


def test_the_printed_recipe_has_every_key_its_default_and_its_meaning():
    text = invoke("recipe").stdout
    values = yaml.safe_load(text)
    values["model"]["name_or_path"], values["data"]["files"] = "m", ["a.txt"]
    assert load_recipe(values) == load_recipe({"model": {"name_or_path": "m"}, "data": {"files": ["a.txt"]}})
    for key, meaning in known_keys().items():
        leaf = key.rpartition(".")[2]
        assert any(line.strip().startswith(f"{leaf}:") and meaning in line for line in text.splitlines()), key


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["tune"], ["eval", "--model", "m"]])
def test_a_command_that_cannot_be_meant_exits_2(arguments):
    assert invoke(*arguments).exit_code == 2


def test_the_public_door_keeps_its_names_beside_the_submodules():
    code = (
        "import drawplate, drawplate.planner.bytes.ledger, drawplate.run.tune, types\n"
        "assert drawplate.__all__ == ['__version__', 'evaluate', 'plan', 'prepare_model', 'resume', 'tune']\n"
        "for name in ('tune', 'resume', 'plan', 'evaluate', 'prepare_model'):\n"
        "    assert isinstance(getattr(drawplate, name), types.FunctionType), name\n"
        "from drawplate.evaluation.score import total\n"
        "assert isinstance(drawplate.evaluate, types.FunctionType)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'tunes'"):
        _ = drawplate.tunes


@pytest.mark.parametrize("key", ["model.name_or_path", "output_dir"])
def test_a_name_that_no_file_can_have_ends_in_words(recipe_file, key):
    done = invoke("tune", str(recipe_file), "--set", f"{key}={'a' * 300}")
    assert done.exit_code in (2, 7), done.output
    assert "longer than this system allows" in done.stderr
    assert "Traceback" not in done.output


def test_an_adapter_of_such_a_name_too(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat")
    done = invoke("eval", "--model", str(tmp_path), "--adapter", "a" * 300, "--data", str(tmp_path / "a.txt"))
    assert done.exit_code != 1
    assert "unexpectedly" not in done.stderr
