"""What the command says before, after and beside a run (rows 48 and 90 to 99)."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import drawplate
import drawplate.run.tune as story
from drawplate import cli
from drawplate.errors import NeedsNetwork, UsageError
from drawplate.hub_answers import unanswered
from drawplate.recipe import load_recipe
from drawplate.records import RunRecord, from_json
from drawplate.report.next_command import next_commands
from tests.faults.conftest import Server, values_of, write_recipe
from tests.faults.rows import shows


def invoke(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and what was printed on standard error."""
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return done.exit_code, done.stderr


def test_row_90_a_recipe_that_cannot_be_meant_is_refused_with_its_place(small: Path, tmp_path: Path) -> None:
    path = write_recipe(small, tmp_path / "run")
    assert invoke("plan", path)[0] == 0, "the control"
    path.write_text(path.read_text() + "train: {seed: 1}\n")
    code, said = invoke("plan", path)
    assert code == 2
    shows(90, said, 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "RECIPE", "--set", "data={files: ''}"),
        ("tune", "RECIPE", "--set", "output_dir=''"),
        ("eval", "--model", "BASE", "--data", ""),
        ("eval", "--model", "", "--data", "TEXTS"),
        ("eval", "--model", "BASE", "--adapter", "", "--data", "TEXTS"),
        ("resume", ""),
        ("plan", ""),
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-1] or 'empty'}",
)
def test_row_90_an_empty_path_is_not_the_current_folder(
    arguments: tuple[str, ...], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"RECIPE": str(write_recipe(small, tmp_path / "run")), "BASE": str(small / "base")}
    names["TEXTS"] = str(small / "texts")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "private.txt").write_text("nobody asked to train on this")
    monkeypatch.chdir(tmp_path / "here")
    code, said = invoke(*(names.get(argument, argument) for argument in arguments))
    assert code == 2
    shows(90, said, 1)
    assert [path.name for path in Path().iterdir()] == ["private.txt"]


def test_row_90_a_pattern_that_is_none_and_a_key_of_another_library(small: Path, tmp_path: Path) -> None:
    path = write_recipe(small, tmp_path / "run")
    code, said = invoke("plan", path, "--set", "lora.target_modules=.*(q_proj")
    assert code == 2
    shows(90, said, 2)
    code, said = invoke("plan", path, "--set", "lora.use_dora=true")
    assert code == 2
    shows(90, said, 3)


def test_row_48_what_libraries_say_is_in_the_log_and_not_on_the_screen(
    server: Server, small: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out.txt"
    recipe = write_recipe(small, run, train={"max_steps": 2}, evaluation={"forgetting": False})
    assert server.run(out, "tune", recipe, faults=[["on_step", {"step": 1, "what": "talk"}]]) == 0
    log, said = (run / "log.txt").read_text(), out.read_text()
    for words in ("of Python", "of a logger", "of C"):
        assert words in log
        assert words not in said


def test_row_48_control_without_the_log_they_talk_over_the_screen(server: Server, small: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out.txt"
    recipe = write_recipe(small, run, train={"max_steps": 2}, evaluation={"forgetting": False})
    faults = [["libraries_on_the_screen", {}], ["on_step", {"step": 1, "what": "talk"}]]
    assert server.run(out, "tune", recipe, faults=faults) == 0
    assert "of C" in out.read_text()
    assert not (run / "log.txt").exists()


@pytest.mark.parametrize(("what", "code", "which"), [("memory", 5, 0), ("fault", 1, 1)])
def test_row_91_an_exception_of_anybody_is_three_lines_and_what_was_trained_is_kept(
    what: str, code: int, which: int, server: Server, small: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out.txt"
    recipe = write_recipe(small, run, train={"save_steps": 2, "max_steps": 4}, evaluation={"forgetting": False})
    assert server.run(out, "tune", recipe, faults=[["on_step", {"step": 3, "what": what}]]) == code
    said = out.read_text()
    assert "Traceback" not in said
    shows(91, said, which)
    for sentence in (2, 3):
        shows(91, said, which=sentence)
    assert "Traceback (most recent call last)" in (run / "log.txt").read_text()
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


def test_row_92_a_closed_standard_error_changes_nothing(tmp_path: Path) -> None:
    command = ["/bin/sh", "-c", 'exec "$@" 2>&-', "-", sys.executable, "-m", "drawplate.cli"]
    done = subprocess.run([*command, "recipe"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout[:6]) == (0, "# Whic")
    done = subprocess.run([*command, "plan", str(tmp_path / "none.yaml")], capture_output=True, timeout=60, check=False)
    assert done.returncode == 2


@pytest.mark.parametrize("refusing", ["2>/dev/full", "2</dev/null"])
def test_row_92_a_standard_error_that_refuses_changes_no_exit_code(refusing: str, tmp_path: Path) -> None:
    command = ["/bin/sh", "-c", f'exec "$@" {refusing}', "-", sys.executable, "-m", "drawplate.cli"]
    for arguments, code in ((["recipe"], 0), (["plan", str(tmp_path / "none.yaml")], 2)):
        done = subprocess.run([*command, *arguments], stdout=subprocess.PIPE, timeout=60, check=False)
        assert done.returncode == code


def test_row_92_a_standard_output_that_refuses_is_said_and_costs_no_run(small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = write_recipe(small, run, train={"max_steps": 1}, evaluation={"forgetting": False})
    command = [
        "/bin/sh",
        "-c",
        'exec "$@" >/dev/full',
        "-",
        sys.executable,
        "-c",
        "from drawplate import cli; cli.main()",
    ]
    for arguments, which in ((["recipe"], 3), (["tune", str(recipe)], 4)):
        done = subprocess.run([*command, *arguments], stderr=subprocess.PIPE, text=True, timeout=120, check=False)
        assert done.returncode == 7
        shows(92, done.stderr, 2)
        shows(92, done.stderr, which)


def test_row_92_a_compilers_cache_that_cannot_be_made_is_named(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = {"__name__": "torch._inductor.codecache"}
    exec("import os\ndef make(*_): os.makedirs('/dev/null/x')", namespace)
    monkeypatch.setattr("drawplate.run.tune.plan", lambda *_: namespace["make"]())
    code, said = invoke("plan", write_recipe(small, tmp_path / "run"))
    assert code == 3
    shows(92, said, 0)
    shows(92, said, 1)


def test_row_93_one_of_several_processes_touches_nothing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(values_of(small, tmp_path / "run"))
    monkeypatch.setattr(story, "prepare", lambda *_: pytest.fail("something was read"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for begin in (lambda: story.tune(recipe), lambda: story.resume(tmp_path), lambda: story.evaluate("m", None, ["a"])):
        with pytest.raises(UsageError) as error:
            begin()
        shows(93, str(error.value))
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(pytest.fail.Exception):
        story.tune(recipe)  # the control: alone under a launcher it begins


class Answering(BaseHTTPRequestHandler):
    """A hub that gives everybody the same answer."""

    def do_GET(self) -> None:
        status, headers = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": "7"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"<html/>")

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """It answers with its `answer`: status and headers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url, constants = f"http://127.0.0.1:{server.server_port}", "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", url)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path))
    for module in (constants, "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("status", "headers", "which"),
    [(429, {"Retry-After": "120"}, 0), (500, {}, 1), (200, {}, 2), (403, {}, 3)],
    ids=["too many", "its own fault", "a login page", "forbidden"],
)
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_row_94_a_hub_that_answers_badly_is_quoted_with_when_to_try_again(
    kind: str, status: int, headers: dict[str, str], which: int, hub: ThreadingHTTPServer, small: Path
) -> None:
    hub.answer = (status, headers)  # type: ignore[attr-defined]
    values = values_of(small, Path("unused"))
    if kind == "model":
        values["model"]["name_or_path"] = "a/model"
    else:
        values["data"] = {"dataset": "a/set"}
    with pytest.raises(NeedsNetwork) as error:
        story.plan(load_recipe(values))
    assert error.value.exit_code == 9
    shows(94, str(error.value), which=which)
    assert "a/" in error.value.next_step, "the command that fetches it"


def test_row_94_control_without_any_answer_nothing_is_quoted() -> None:
    assert unanswered("a/model", OSError("no route to host"), "fetch") is None


def test_row_95_a_run_with_relative_paths_goes_on_from_anywhere(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small, tmp_path / "here")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    values = values_of(Path(), Path("run"), train={"max_steps": 2, "save_steps": 1}, evaluation={"forgetting": False})
    on_step = story.Journal.on_step

    def stop(self: Any, record: Any, progress: float) -> None:
        on_step(self, record, progress)
        if record.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(story.Journal, "on_step", stop)
        with pytest.raises(KeyboardInterrupt):
            story.tune(load_recipe(values))
    kept = load_recipe(Path("run/recipe.yaml"))
    assert kept.model.name_or_path == str(tmp_path / "here" / "base")
    assert kept.data.files == [str(tmp_path / "here" / "texts")]
    monkeypatch.chdir(tmp_path / "there")
    text = (tmp_path / "here" / "run" / "recipe.yaml").read_text()
    (tmp_path / "here" / "run" / "recipe.yaml").write_text(text.replace("save_steps: 1", "save_steps: 2"))
    record = story.resume(tmp_path / "here" / "run", accept=["train.save_steps"])
    assert record.status == "finished"
    said = " ".join(record.warnings)
    shows(95, said, 0)


def test_row_95_control_what_is_no_path_here_stays_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe({"model": {"name_or_path": "owner/model"}, "data": {"files": ["~/a", "${DRAWPLATE_CACHE}/b"]}})
    assert recipe.located() == recipe


def test_the_printed_command_is_taken_as_printed(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = from_json(RunRecord, json.loads((clean / "record.json").read_text()))
    (command, *_) = next_commands(record, str(clean))
    asked: list[Any] = []
    monkeypatch.setattr(drawplate, "evaluate", lambda *given, **more: asked.append((given, more)) or {}, raising=False)
    words = shlex.split(" ".join(command.parts).replace("YOUR_DOCUMENTS", str(clean)))
    done = CliRunner().invoke(cli.app, [*words[1:], "--json"])
    assert done.exit_code == 0, done.stderr
    ((models, adapters, files), more) = asked[0]
    recipe = load_recipe({"model": {"name_or_path": models[0]}, "data": {"files": files}}, more["settings"])
    assert recipe.quantization == load_recipe(clean / "recipe.yaml").quantization
    assert recipe.model == load_recipe(clean / "recipe.yaml").model
    assert (Path(adapters[0]) / "adapter_config.json").is_file()
