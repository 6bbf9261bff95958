"""Checkpoints that are damaged, and runs that are not what they were (rows 9 to 13)."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import drawplate.run.tune as story
from drawplate import cli
from drawplate.errors import IntegrityError, UsageError
from drawplate.recipe import load_recipe
from drawplate.records import Machine
from tests.faults.conftest import Server, same_adapter, values_of, write_recipe
from tests.faults.rows import shows
from tests.tiny import write_base, write_texts


@pytest.fixture(scope="module")
def killed(server: Server, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in step 8: checkpoints 3 and 6. To be copied."""
    run = tmp_path_factory.mktemp("killed") / "run"
    kill = ["kill_in", {"what": "forward", "number": 8}]
    assert server.run(run.with_suffix(".txt"), "tune", write_recipe(small, run), faults=[kill]) == -9
    return run


@pytest.fixture
def run(killed: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


def resume(run: Path, **options: Any) -> tuple[Any, str]:
    said: list[str] = []
    return story.resume(run, lambda progress: said.append(progress.message), **options), "\n".join(filter(None, said))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((path / "MANIFEST.json").read_text())
    change(values)
    (path / "MANIFEST.json").write_text(json.dumps(values))


DAMAGES: dict[str, tuple[int, Callable[[Path], Any]]] = {
    "bit": (0, lambda path: flip(path / "optimizer.safetensors")),
    "truncated": (1, lambda path: (path / "state.json").write_bytes((path / "state.json").read_bytes()[:-9])),
    "no manifest": (2, lambda path: (path / "MANIFEST.json").unlink()),
    "broken manifest": (3, lambda path: (path / "MANIFEST.json").write_text("{")),
    "newer schema": (4, lambda path: edit_manifest(path, lambda values: values.update(schema=2))),
    "edited manifest": (
        0,
        lambda path: edit_manifest(path, lambda v: v["files"]["state.json"].update(sha256="0" * 64)),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_row_09_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run: Path, clean: Path, damage: str) -> None:
    which, spoil = DAMAGES[damage]
    spoil(run / "checkpoints" / "step-000006")
    record, said = resume(run)
    shows(9, said, which)
    assert record.resumed == ("after step 3",)
    assert same_adapter(run, clean)


def test_row_09_control_unverified_a_flipped_bit_is_trained_on(
    run: Path, clean: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(run / "checkpoints" / "step-000006" / "optimizer.safetensors")
    monkeypatch.setattr("drawplate.checkpoint.write.problem_of", lambda folder, from_disk=False: None)
    record, _ = resume(run)
    assert record.resumed == ("after step 6",)
    assert not same_adapter(run, clean)


def test_row_10_all_bad_ends_with_every_reason_and_starts_nothing_over(run: Path) -> None:
    flip(run / "checkpoints" / "step-000006" / "adapter_model.safetensors")
    (run / "checkpoints" / "step-000003" / "MANIFEST.json").unlink()
    before = sorted(run.rglob("*"))
    with pytest.raises(IntegrityError) as error:
        resume(run)
    assert error.value.exit_code == 8
    for which in range(3):
        shows(10, str(error.value), which)
    assert "step-000006/adapter_model.safetensors" in error.value.what
    assert "step-000003/MANIFEST.json is missing" in error.value.what
    assert sorted(p for p in run.rglob("*") if p.name not in ("run.lock", ".reserve")) == [
        p for p in before if p.name not in ("run.lock", ".reserve")
    ]


def test_row_10_control_a_good_one_among_them_is_used(run: Path, clean: Path) -> None:
    flip(run / "checkpoints" / "step-000006" / "adapter_model.safetensors")
    assert resume(run)[0].resumed == ("after step 3",)


class _Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_row_11_a_pickle_in_a_checkpoint_is_refused_and_never_opened(run: Path, clean: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (run / "checkpoints" / "step-000006" / "optimizer.pt").write_bytes(pickle.dumps(_Canary(canary)))
    record, said = resume(run)
    shows(11, said, 0)
    assert record.resumed == ("after step 3",)
    assert not canary.exists()
    assert same_adapter(run, clean)


def test_row_11_a_model_of_pickles_is_refused_and_never_opened(small: Path, tmp_path: Path) -> None:
    base, canary = Path(shutil.copytree(small / "base", tmp_path / "base")), tmp_path / "canary"
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(_Canary(canary)))
    with pytest.raises(IntegrityError) as error:
        story.tune(load_recipe(values_of(small, tmp_path / "run", model={"name_or_path": str(base)})))
    shows(11, str(error.value), 1)
    assert not canary.exists()


def test_row_11_control_the_canary_does_run_when_opened(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def change_recipe(run: Path, **sections: dict[str, Any]) -> None:
    import yaml

    values = yaml.safe_load((run / "recipe.yaml").read_text())
    for name, keys in sections.items():
        values[name] |= keys
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))


def test_row_12_another_recipe_is_shown_key_by_key_and_refused_unless_accepted(run: Path, clean: Path) -> None:
    change_recipe(run, train={"learning_rate": 1e-3}, evaluation={"eval_steps": 3})
    with pytest.raises(UsageError) as error:
        resume(run)
    shows(12, str(error.value).replace("; evaluation.eval_steps is 3 and was 2", ""), 0)
    assert "evaluation.eval_steps is 3 and was 2" in error.value.what
    with pytest.raises(UsageError):
        resume(run, accept=["train.learning_rate"])
    record, _ = resume(run, accept=["train.learning_rate", "evaluation.eval_steps"])
    assert record.steps[-1].learning_rate < 1e-3
    assert not same_adapter(run, clean), "the control: it makes a difference"


def test_row_12_another_model_or_other_data_are_refused_unless_accepted(
    server: Server, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    small = tmp_path_factory.mktemp("changing")
    write_base(small / "base", num_hidden_layers=1)
    write_texts(small / "texts", 12)
    run = tmp_path / "run"
    kill = ["kill_in", {"what": "forward", "number": 8}]
    server.run(tmp_path / "out", "tune", write_recipe(small, run), faults=[kill])
    write_texts(small / "texts", 12, seed=3)
    with pytest.raises(IntegrityError) as error:
        resume(run)
    shows(12, str(error.value), 1)
    shows(12, str(error.value), 3)
    assert error.value.exit_code == 8
    weights = small / "base" / "model.safetensors"
    flip(weights)
    with pytest.raises(IntegrityError) as error:
        resume(run, accept=["data"])
    shows(12, str(error.value), 2)
    record, _ = resume(run, accept=["data", "model"])
    assert record.status == "finished"
    assert [point.step for point in record.evaluations].count(0) == 2, "the base model is measured again"


def test_row_12_a_key_to_accept_must_exist(run: Path) -> None:
    with pytest.raises(UsageError, match="there is no such key"):
        resume(run, accept=["train.learning_rat"])


def test_row_13_another_machine_is_allowed_and_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import drawplate.run.resume as module

    real = module.machine

    def other(device: Any) -> Machine:
        import dataclasses

        return dataclasses.replace(real(device), device_name="Another GPU", device_bytes=2**34)

    monkeypatch.setattr(module, "machine", other)
    record, said = resume(run)
    shows(13, said)
    assert "Another GPU" in said
    assert record.status == "finished"
    assert any("no longer promised" in warning for warning in record.warnings)


def test_row_13_control_on_the_same_machine_nothing_is_said(run: Path) -> None:
    assert "no longer promised" not in resume(run)[1]


def test_a_finished_run_and_a_folder_that_is_none_are_refused(clean: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is finished"):
        resume(clean)
    with pytest.raises(UsageError, match=r"is not the folder of a run"):
        resume(tmp_path)


def test_the_command_goes_on_with_a_run(run: Path, clean: Path) -> None:
    from typer.testing import CliRunner

    done = CliRunner().invoke(cli.app, ["resume", str(run)])
    assert done.exit_code == 0, done.stderr
    assert "erplexity" in done.stdout
    assert same_adapter(run, clean)
