"""The rehearsal: worst batches first, nothing of it stays, and what does not hold stops the run or plans it anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import drawplate.run.rehearse as rehearsal
import drawplate.run.tune as story
from drawplate.errors import DoesNotFit
from drawplate.machine.memory import DeviceContext
from drawplate.model.causal_lm import CausalLM
from drawplate.model.load.assemble import assemble
from drawplate.model.placement import placement_of
from drawplate.model.support.targets import lora_config
from drawplate.records import RehearsedPhase
from drawplate.run.prepare import Prepared, prepare, train_cutting
from drawplate.units import GIB
from tests.tiny import Notes, tiny_recipe

SECTIONS: dict[str, dict[str, Any]] = {
    "data": {"heldout_fraction": 0.3},
    "train": {"max_steps": 3, "effective_batch_size": 4},
}


def prepared_of(base: Path, corpus: Path, folder: Path, **memory: Any) -> Prepared:
    return prepare(tiny_recipe(base, corpus, folder, **SECTIONS, lora={"lora_dropout": 0.1}, memory=memory))


def load(prepared: Prepared) -> CausalLM:
    section, checkpoint = prepared.recipe.lora, prepared.checkpoint
    return assemble(
        checkpoint, placement_of(prepared.plan, prepared.device),
        lambda anatomy: lora_config(section, anatomy, checkpoint.name, None), seed=0,
    )  # fmt: skip


def phase_of(name: str, host: int, predicted: int = GIB) -> RehearsedPhase:
    return RehearsedPhase(
        phase=name, device_predicted_bytes=0, device_bytes=0, host_predicted_bytes=predicted, host_bytes=host
    )


def test_a_run_is_bit_for_bit_the_same_with_and_without(base: Path, corpus: Path, tmp_path: Path) -> None:
    records = {}
    for word in ("auto", "off"):
        recipe = tiny_recipe(
            base, corpus, tmp_path / word, **SECTIONS, lora={"lora_dropout": 0.2}, memory={"rehearsal": word}
        )
        records[word] = story.tune(recipe)
    ours, theirs = (load_file(tmp_path / word / "adapter" / "adapter_model.safetensors") for word in ("auto", "off"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert [s.loss for s in records["auto"].steps] == [s.loss for s in records["off"].steps]
    assert [p.phase for p in records["auto"].rehearsal] == ["baseline evaluation", "training", "checkpoint"]
    assert all(p.host_bytes > 0 and p.host_predicted_bytes > 0 for p in records["auto"].rehearsal)
    assert records["off"].rehearsal == ()


def test_nothing_of_it_stays(base: Path, corpus: Path, tmp_path: Path) -> None:
    prepared = prepared_of(base, corpus, tmp_path / "run")
    model = load(prepared)
    before = {name: tensor.clone() for name, tensor in model.adapter.state().items()}
    generator = torch.get_rng_state()
    phases, failed = rehearsal.rehearse(prepared, model, tmp_path)
    assert (len(phases), failed) == (3, "")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.adapter.state().items())
    assert all(parameter.grad is None for parameter in model.adapter.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert list(tmp_path.iterdir()) == []


def test_the_training_rehearsed_really_trains(base: Path, corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Negative control of the test above: without putting the adapter back it would have moved."""
    prepared = prepared_of(base, corpus, tmp_path / "run")
    model = load(prepared)
    before = {name: tensor.clone() for name, tensor in model.adapter.state().items()}
    made = rehearsal.make_optimizer
    monkeypatch.setattr(rehearsal, "make_optimizer", lambda p, s: made([{"params": p, "lr": 1e-3}], s))
    rehearsal._train(prepared, model)
    assert not all(torch.equal(tensor, before[name]) for name, tensor in model.adapter.state().items())


def test_the_worst_batch_holds_the_longest_document(base: Path, corpus: Path, tmp_path: Path) -> None:
    prepared = prepared_of(base, corpus, tmp_path / "run")
    longest = max(prepared.train.sequences, key=len)
    worst = rehearsal.worst_batch(prepared.train.sequences, train_cutting(prepared), 4)
    assert longest.document in worst.documents
    assert worst.max_seqlen >= len(longest)


@pytest.mark.parametrize("word", ["auto", "replan"])
def test_a_budget_that_does_not_hold_stops_the_run_or_plans_it_anew(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: Any, word: str
) -> None:
    prepared = prepared_of(base, corpus, tmp_path / "run", ram="8GiB", rehearsal=word)
    first, asked = load(prepared), []
    answers = iter([((phase_of("training", 9 * GIB),), ""), ((phase_of("training", 7 * GIB),), "")])
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_: next(answers))

    def smaller(recipe: Any, *_: Any) -> Any:
        asked.append(recipe.memory.ram)
        return replace(prepared.plan, micro_batch_tokens=16)

    monkeypatch.setattr(rehearsal, "plan_for_lengths", smaller)
    models, notes = [first], Notes()
    if word == "auto":
        with pytest.raises(DoesNotFit) as error:
            rehearsal.rehearsed(prepared, models, tmp_path, notes, load)
        assert "training needs 9.00 GiB on the host, where 8.00 GiB are allowed" in error.value.what
        assert "Its largest line that comes with this phase is" in error.value.what
        assert "memory.rehearsal: replan" in error.value.next_step
        return
    made, phases = rehearsal.rehearsed(prepared, models, tmp_path, notes, load)
    assert made.plan.micro_batch_tokens == 16
    assert made.recipe == prepared.recipe, "the budget stays the user's"
    assert models[0] is not first
    assert phases[0].host_bytes == 7 * GIB
    assert asked[0] < 8 * GIB
    assert "planned anew" in notes.warnings[0]


def test_running_out_of_memory_names_the_phase_and_a_line(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    prepared = prepared_of(base, corpus, tmp_path / "run")

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rehearsal, "_train", fail)
    with pytest.raises(DoesNotFit, match=r"The rehearsal of training ran out of memory\. Its largest line"):
        rehearsal.rehearsed(prepared, [load(prepared)], tmp_path, Notes(), load)


def test_another_error_is_not_taken_for_one_of_memory(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    prepared = prepared_of(base, corpus, tmp_path / "run")

    def fail(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(rehearsal, "_train", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        rehearsal.rehearse(prepared, load(prepared), tmp_path)


def test_a_surprise_that_fits_is_said_and_the_run_goes_on() -> None:
    assert "It fits all the same" in rehearsal.surprise(phase_of("training", 2 * GIB))
    assert rehearsal.surprise(phase_of("training", int(1.04 * GIB))) == ""
    [line] = rehearsal.described((phase_of("training", 2 * GIB),))
    assert line == "Rehearsal of training: 2.00 GiB on the host (1.00 GiB predicted, +100.0 %)"


def test_the_word_off_may_be_written_as_yaml_reads_it(base: Path, corpus: Path, tmp_path: Path) -> None:
    assert tiny_recipe(base, corpus, tmp_path, memory={"rehearsal": False}).memory.rehearsal == "off"


@pytest.mark.parametrize(
    ("vram", "wanted", "room"),
    [
        (None, GIB, 2 * GIB),
        (None, 4 * GIB, 9 * GIB),
        (None, 20 * GIB, 9 * GIB),
        ("3GiB", GIB, 2 * GIB),
        ("3GiB", 4 * GIB, 2 * GIB),
    ],
    ids=["within the plan", "beyond the plan", "beyond the device", "within the cap", "beyond the cap"],
)
def test_a_check_has_the_free_memory_of_the_device_where_nobody_set_a_cap(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: Any, vram: str | None, wanted: int, room: int
) -> None:
    """A device of 10 GiB; the plan needs 3, of which the model holds 1 and CUDA none."""
    prepared = prepared_of(base, corpus, tmp_path / "run", **({"vram": vram} if vram else {}))
    planned = replace(prepared, device=torch.device("cuda"))
    monkeypatch.setattr(type(prepared.plan), "predicted_bytes", lambda *_: 3 * GIB)
    monkeypatch.setattr(rehearsal, "_let_go", lambda *_: None)
    monkeypatch.setattr(rehearsal, "measure_context", lambda *_: DeviceContext())
    bounds: list[float] = []
    device = SimpleNamespace(
        get_device_properties=lambda _: SimpleNamespace(total_memory=10 * GIB),
        set_per_process_memory_fraction=lambda share, _: bounds.append(share),
        mem_get_info=lambda _: (9 * GIB, 10 * GIB),
        memory_reserved=lambda _: GIB,
    )
    monkeypatch.setattr(rehearsal.torch, "cuda", device)
    told: list[str] = []
    with rehearsal.room_for_check(planned, wanted, told.append) as found:
        assert found == room
        assert bounds[-1] == pytest.approx((room + GIB) / (10 * GIB))
    assert bounds[-1] == pytest.approx(0.3 if vram else 1.0), "the recipe's cap again"
    assert bool(told) == (room == 9 * GIB and wanted <= room)
