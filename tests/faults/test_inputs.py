"""What is refused before a run begins, and what no run may leave behind (rows 24 to 27, 35 and 36)."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import drawplate.run.tune as story
from drawplate.errors import DataError, EnvironmentProblem, IntegrityError, NeedsNetwork, StorageError, UserError
from drawplate.recipe import load_recipe
from drawplate.run.folder import RunFolder
from tests.faults.conftest import values_of
from tests.faults.hub import REPOSITORY, Hub, serving
from tests.faults.rows import shows
from tests.tiny import recipe_values, write_base, write_texts


def plan(small: Path, **sections: Any) -> Any:
    return story.plan(load_recipe(values_of(small, Path("unused"), **sections)))


def test_row_24_a_second_run_in_a_folder_is_refused_and_a_stale_lock_is_not_believed(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(values_of(small, tmp_path / "run"))
    first = RunFolder(tmp_path / "run")
    first.claim()
    first.write_text("recipe.yaml", recipe.to_yaml())
    for again in (lambda: story.tune(recipe), lambda: story.resume(tmp_path / "run")):
        with pytest.raises(StorageError) as error:
            again()
        shows(24, str(error.value))
        assert f"process {os.getpid()} on " in error.value.what
    lock = json.loads((tmp_path / "run" / "run.lock").read_text())
    (tmp_path / "run" / "run.lock").write_text(json.dumps({**lock, "started": "1"}))
    assert story.resume(tmp_path / "run").status == "finished", "that process is gone: its number was given away"


def test_row_24_control_without_the_lock_the_second_begins(small: Path, tmp_path: Path) -> None:
    recipe = load_recipe(values_of(small, tmp_path / "run"))
    first = RunFolder(tmp_path / "run")
    first.claim()
    first.write_text("recipe.yaml", recipe.to_yaml())
    (tmp_path / "run" / "run.lock").unlink()
    assert story.resume(tmp_path / "run").status == "finished"


def test_row_25_without_a_network_the_command_to_fetch_is_named_at_once(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    began = time.monotonic()
    with pytest.raises(NeedsNetwork) as error:
        plan(small, model={"name_or_path": "nobody/no-model"})
    assert time.monotonic() - began < 5
    assert error.value.exit_code == 9
    shows(25, str(error.value), 0)
    shows(25, str(error.value), 1)


@pytest.fixture
def own_hub(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the tiny model, an empty cache, and no waiting between attempts."""
    cache = tmp_path / "hub-cache"
    with serving(small / "base") as hub:
        constants = "huggingface_hub.constants"
        monkeypatch.setattr(f"{constants}.ENDPOINT", hub.url)
        monkeypatch.setattr(
            f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(cache))
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
        for module in (constants, "datasets.config"):
            monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(f"{constants}.DOWNLOAD_CHUNK_SIZE", 4096)
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        yield hub


@pytest.mark.parametrize(
    ("answer", "code", "which"),
    [
        ((404, "RepoNotFound"), 4, 2),
        ((401, "RepoNotFound"), 4, 2),
        ((401, "GatedRepo"), 9, 3),
        ((403, "GatedRepo"), 9, 3),
    ],
    ids=["missing", "missing, for who has not logged in", "gated, for who has not logged in", "gated"],
)
def test_row_25_a_dataset_that_does_not_exist_is_no_fault_of_the_network(
    answer: tuple[int, str], code: int, which: int, own_hub: Hub, small: Path
) -> None:
    own_hub.unknown = answer
    values = {**values_of(small, Path("unused")), "data": {"dataset": "nobody/no-set"}}
    with pytest.raises(UserError) as error:
        story.plan(load_recipe(values))
    assert error.value.exit_code == code
    shows(25, str(error.value), which)


def test_row_25_a_download_that_is_cut_is_taken_up_where_it_ended(own_hub: Hub, small: Path, tmp_path: Path) -> None:
    recipe = load_recipe(values_of(small, tmp_path / "run", model={"name_or_path": REPOSITORY}))
    own_hub.cut_after = 0  # headers, and then nothing: the client gives up after some attempts
    with pytest.raises(NeedsNetwork) as error:
        story.tune(recipe)
    shows(25, str(error.value), 0)
    shows(25, str(error.value), 1)
    assert not list((tmp_path / "hub-cache").rglob("*.safetensors")), "nothing half-written under a final name"
    assert not (tmp_path / "run").exists()
    own_hub.cut_after, own_hub.ranges = 100_000, []
    assert story.tune(recipe).status == "finished"
    assert own_hub.ranges[:2] == [0, 98_304], "the next attempt asks for what was missing, in whole chunks"
    (whole,) = (tmp_path / "hub-cache").rglob("*.safetensors")
    assert whole.read_bytes() == (small / "base" / "model.safetensors").read_bytes()


def test_row_25_control_a_model_that_is_here_needs_none(small: Path) -> None:
    assert plan(small).optimizer_steps == 9


def test_row_26_a_missing_gpu_is_named_with_its_cure_before_anything_is_loaded(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("drawplate.machine.device.nvidia_driver", lambda: None)
    monkeypatch.setattr("drawplate.run.prepare.open_checkpoint", lambda section: pytest.fail("the model was opened"))
    with pytest.raises(EnvironmentProblem) as error:
        plan(small, model={"device_map": "cuda"})
    assert error.value.exit_code == 3
    shows(26, str(error.value), 0)
    shows(26, str(error.value), 1)
    monkeypatch.undo()
    assert plan(small, model={"device_map": "cpu"}).device == "cpu", "the control"


@pytest.mark.parametrize("key", ["auto_map", "_attn_implementation"])
def test_row_27_a_configuration_that_asks_for_code_is_refused_and_not_imported(
    small: Path, tmp_path: Path, key: str
) -> None:
    base = write_base(tmp_path / "base", num_hidden_layers=1)
    canary = tmp_path / "canary"
    (base / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    config = json.loads((base / "config.json").read_text())
    asked = {
        "auto_map": {"auto_map": {"AutoConfig": "modeling_evil.Evil"}, "model_type": "evil"},
        "_attn_implementation": {"_attn_implementation": "nobody/kernel"},
    }
    (base / "config.json").write_text(json.dumps({**config, **asked[key]}))
    with pytest.raises(IntegrityError) as error:
        plan(small, model={"name_or_path": str(base)})
    shows(27, str(error.value))
    assert not canary.exists()
    (base / "config.json").write_text(json.dumps(config))
    assert plan(small, model={"name_or_path": str(base)}), "the control"


def test_row_35_no_file_of_a_run_holds_a_secret(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a document, in the environment; after an interruption, a warning that names documents, and a resume."""
    canary = "hf_CANARYcanary0123456789"
    monkeypatch.setenv("HF_TOKEN", canary)
    texts = write_texts(tmp_path / "texts", 12)
    for path in texts.iterdir():
        path.write_text(path.read_text() + f" password {canary}")
    train = {"effective_batch_size": 2, "max_steps": 4, "save_steps": 1, "keep_checkpoints": True}
    recipe = load_recipe(recipe_values(small / "base", texts, tmp_path / "run", train=train))
    on_step = story.Journal.on_step

    def interrupt(self: Any, record: Any, progress: float) -> None:
        on_step(self, record, progress)
        if record.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(story.Journal, "on_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            story.tune(recipe)
    story.resume(tmp_path / "run")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 15
    holding = [path for path in files if canary.encode() in path.read_bytes()]
    assert not holding
    (tmp_path / "run" / "control").write_text(canary)
    assert any(canary.encode() in path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file())


def test_row_36_too_few_documents_are_a_data_error(small: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as error:
        plan(small, data={"files": [str(tmp_path / "empty")]})
    assert error.value.exit_code == 4
    same = tmp_path / "same"
    same.mkdir()
    for i in range(5):
        (same / f"{i}.txt").write_text("the sea level rises over the land and the coasts of all people each year")
    for folder in (same, write_texts(tmp_path / "one", 1)):
        with pytest.raises(DataError):
            plan(small, data={"files": [str(folder)]})


def test_row_36_training_documents_that_repeat_held_out_ones_are_set_aside_and_counted(
    small: Path, tmp_path: Path
) -> None:
    texts = write_texts(tmp_path / "texts", 12)
    for path in sorted(texts.iterdir()):
        (texts / f"again-{path.name}").write_text(path.read_text() + " again")
    recipe = recipe_values(small / "base", texts, tmp_path / "run", train={"max_steps": 1})
    record = story.tune(load_recipe(recipe))
    assert record.data.leaks is not None
    recipe["output_dir"], recipe["data"]["near_duplicates"] = str(tmp_path / "control"), "keep"
    kept = story.tune(load_recipe(recipe))
    assert record.data.train_documents <= kept.data.train_documents
