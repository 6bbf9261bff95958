"""A tiny run of nine steps and three checkpoints, a server that forks processes for it, and what a clean run gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import recipe_values, write_base, write_texts

ROOT = Path(__file__).parent.parent.parent
ADAPTER = "adapter/adapter_model.safetensors"
STEPS = 9
COUNTS = "DRAWPLATE_KILL_COUNTS"
"""Environment variable: a file that takes a line of JSON for every count of kills (bench/kill_sweep.py)."""
Tally = Callable[[int, int, float], None]


class Server:
    """Runs `drawplate` commands in processes forked from one that has imported everything."""

    def __init__(self, cache: Path) -> None:
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DRAWPLATE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            cwd=ROOT,
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._answer() == {"ready": True}

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def start(self, out: Path, *argv: str, faults: list[Any] | None = None) -> int:
        """Begin a command; its process number. What it prints goes to the end of `out`."""
        return self._ask({"argv": [str(a) for a in argv], "faults": faults or [], "out": str(out)})["pid"]

    def wait(self, process: int) -> int:
        """Its exit code; minus the signal's number if one killed it."""
        return self._ask({"wait": process})["code"]

    def run(self, out: Path, *argv: str, faults: list[Any] | None = None) -> int:
        """Begin a command and wait for its end."""
        return self.wait(self.start(out, *argv, faults=faults))

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One a test process."""
    made = Server(tmp_path_factory.mktemp("server-cache"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of one layer and a dozen documents; not to be written to."""
    folder = tmp_path_factory.mktemp("small")
    write_base(folder / "base", num_hidden_layers=1)
    write_texts(folder / "texts", 12)
    return folder


def values_of(small: Path, output: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a run of nine steps, a checkpoint after every third, an evaluation after every second."""
    often = {"save_steps": 3, "keep_checkpoints": True}
    train = {"effective_batch_size": 2, "max_steps": STEPS, **often, **sections.pop("train", {})}
    defaults: dict[str, dict[str, Any]] = {
        "data": {"heldout_fraction": 0.2},
        "lora": {"lora_dropout": 0.1},
        "evaluation": {"eval_steps": 2},
        "memory": {"rehearsal": "off"},  # a fault that is injected should come in training
    }
    merged = {name: {**defaults.get(name, {}), **sections.get(name, {})} for name in {*defaults, *sections}}
    return recipe_values(small / "base", small / "texts", output, train=train, **merged)


def write_recipe(small: Path, run: Path, **sections: dict[str, Any]) -> Path:
    """`values_of` as a file beside the run's folder."""
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values_of(small, run, **sections)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def clean(server: Server, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    run = tmp_path_factory.mktemp("clean") / "run"
    out = run.with_suffix(".txt")
    assert server.run(out, "tune", write_recipe(small, run)) == 0, out.read_text()
    return run


def same_adapter(a: Path, b: Path) -> bool:
    """Byte for byte."""
    return (a / ADAPTER).read_bytes() == (b / ADAPTER).read_bytes()


@pytest.fixture
def tally(capsys: pytest.CaptureFixture[str]) -> Tally:
    """Takes a row, its kills (each of which ended bit-equal) and the seconds they took: printed, and kept if asked."""

    def told(row: int, kills: int, seconds: float) -> None:
        with capsys.disabled():
            print(f"\n  row {row}: {kills} kills, each bit-equal, {seconds:.0f} s")
        if os.environ.get(COUNTS):
            with Path(os.environ[COUNTS]).open("a") as file:
                file.write(json.dumps({"row": row, "kills": kills, "seconds": seconds}) + "\n")

    return told
