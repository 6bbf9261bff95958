"""Every `auto` decided with a reason, nothing that the user set changed, and the plan fits by its own ledger."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from drawplate.errors import DoesNotFit, UsageError
from drawplate.model.placement import policies_of, tiers_of
from drawplate.planner.advise import SHORT
from drawplate.planner.budget import DEVICE_MARGIN, HOST_MARGIN
from drawplate.planner.choose import PRECISION_TOLERANCE, choose
from drawplate.planner.seconds.gpus import gpu_named
from drawplate.planner.shape import ModelShape
from drawplate.planner.situation import CorpusShape, Obstacles, Situation, choose_compute_dtype, choose_max_length
from drawplate.recipe import Recipe, load_recipe
from drawplate.records import Machine, Plan, from_json, to_json
from drawplate.units import GIB

LLAMA_3B = ModelShape(
    parameters=3_212_749_824,
    layers=28,
    linear_parameters=2_818_572_288,
    outside_parameters=394_177_536,
    hidden=3072,
    intermediate=8192,
    vocab=128_256,
    attention_width=5120,
    trained_parameters=2_293_760,
    max_positions=131_072,
)
TINY = ModelShape(
    parameters=95_808,
    layers=2,
    linear_parameters=73_728,
    outside_parameters=22_080,
    hidden=64,
    intermediate=128,
    vocab=340,
    attention_width=128,
    trained_parameters=8192,
    max_positions=128,
)


def machine_of(device: str = "cuda", device_bytes: int = 80 * GIB, *, bf16: bool = True) -> Machine:
    return Machine(
        platform="Linux", python="3.11", cpu="a CPU", cores=2, ram_bytes=64 * GIB, bf16_native=bf16,
        device=device, device_bytes=device_bytes if device == "cuda" else 0,
    )  # fmt: skip


def recipe_of(**sections: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {"model": {"name_or_path": "m"}, "data": {"files": ["a.txt"]}}
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes}
    return load_recipe(values)


def plan_of(
    recipe: Recipe, *, lengths: tuple[int, ...] = (512,) * 1000, model: ModelShape = LLAMA_3B, **situation: Any
) -> Plan:
    machine = situation.pop("machine", machine_of())
    whole = Situation(recipe=recipe, machine=machine, model=model, **situation)
    return choose(whole, CorpusShape(lengths=lengths), max(lengths))


SLOW = settings(deadline=None, max_examples=25)


def plan_or_skip(*args: Any, **kwargs: Any) -> Plan:
    """A property of plans says nothing of what does not fit."""
    try:
        return plan_of(*args, **kwargs)
    except DoesNotFit:
        assume(False)
        raise


# --- what the user set stays ------------------------------------------------------------------------------------

maybe = lambda strategy: st.one_of(st.none(), strategy)  # noqa: E731
settings_given = st.fixed_dictionaries(
    {
        "micro": maybe(st.integers(1, 40)),
        "accumulation": maybe(st.integers(1, 300)),
        "groups": maybe(st.integers(1, 40)),
        "packing": maybe(st.booleans()),
        "precision": maybe(st.sampled_from(["nf4", "fp4", "int8", "fp8", "bf16", "fp16", "fp32"])),
        "double_quant": maybe(st.booleans()),
        "compute": maybe(st.sampled_from(["float16", "bfloat16", "float32"])),
        "rate": maybe(st.floats(1e-6, 1.0)),
        "epochs": st.floats(0.1, 10),
        "max_steps": maybe(st.integers(1, 1000)),
        "weights": maybe(st.sampled_from(["device", "dequantized", "host"])),
        "activations": maybe(st.sampled_from(["keep", "recompute", "offload"])),
        "compile": maybe(st.booleans()),
        "eval_batch": maybe(st.integers(1, 40)),
    }
)
machines = st.builds(machine_of, st.sampled_from(["cuda", "cpu"]), st.integers(2 * GIB, 200 * GIB), bf16=st.booleans())
corpora = st.lists(st.integers(2, 4096), min_size=1, max_size=60).map(tuple)


def recipe_with(given_: dict[str, Any], effective: int | None) -> Recipe:
    def section(**keys: Any) -> dict[str, Any]:
        return {name: value for name, value in keys.items() if value is not None}

    return recipe_of(
        model=section(compile=given_["compile"]),
        data=section(packing=given_["packing"]),
        quantization=section(
            precision=given_["precision"],
            bnb_4bit_use_double_quant=given_["double_quant"],
            bnb_4bit_compute_dtype=given_["compute"],
        ),
        train=section(
            per_device_train_batch_size=given_["micro"],
            gradient_accumulation_steps=given_["accumulation"],
            effective_batch_size=effective,
            learning_rate=given_["rate"],
            num_train_epochs=given_["epochs"],
            max_steps=given_["max_steps"],
        ),
        evaluation=section(per_device_eval_batch_size=given_["eval_batch"]),
        memory=section(weights=given_["weights"], activations=given_["activations"]),
    )


@SLOW
@given(settings_given, machines, corpora)
def test_nothing_that_the_user_set_is_changed(
    given_: dict[str, Any], machine: Machine, lengths: tuple[int, ...]
) -> None:
    micro, accumulation, groups = given_["micro"], given_["accumulation"], given_["groups"]
    effective = None if groups is None or (micro and accumulation) else groups * (accumulation or 1)
    recipe = recipe_with(given_, effective)
    plan = plan_or_skip(recipe, lengths=lengths, machine=machine)
    asked = {
        "packing": "packing",
        "precision": "precision",
        "double_quant": "double_quant",
        "compute": "compute_dtype",
        "rate": "learning_rate",
        "epochs": "epochs",
        "weights": "weights",
        "activations": "activations",
        "compile": "compiled",
        "eval_batch": "eval_batch_sequences",
        "micro": "micro_batch_sequences",
    }
    for key, field in asked.items():
        if given_[key] is not None:
            assert getattr(plan, field) == given_[key], key
    if effective is not None:
        assert plan.effective_batch_size == effective
    if micro and accumulation:
        assert plan.effective_batch_size == micro * accumulation
    if accumulation and plan.gradient_accumulation_steps != accumulation:
        assert plan.packing
        assert "gradient_accumulation_steps" in plan.reasons
    assert plan.optimizer_steps <= (given_["max_steps"] or math.inf)


@SLOW
@given(settings_given, machines, corpora)
def test_a_plan_is_whole_consistent_and_survives_json(
    given_: dict[str, Any], machine: Machine, lengths: tuple[int, ...]
) -> None:
    plan = plan_or_skip(recipe_with({**given_, "accumulation": None}, None), lengths=lengths, machine=machine)
    assert from_json(Plan, json.loads(json.dumps(to_json(plan)))) == plan
    targets = [length - 1 for length in lengths]
    full = sum(tokens >= min(SHORT, sum(targets) // len(targets) // 4) for tokens in targets)
    steps = math.ceil(math.ceil(full / plan.effective_batch_size) * plan.epochs)
    assert plan.optimizer_steps == max(1, min(steps, given_["max_steps"] or steps))
    assert plan.micro_batch_tokens >= max(lengths)
    assert plan.gradient_accumulation_steps >= 1
    if not plan.packing:
        assert (plan.gradient_accumulation_steps - 1) * plan.micro_batch_sequences < plan.effective_batch_size
        assert plan.gradient_accumulation_steps * plan.micro_batch_sequences >= plan.effective_batch_size
    decided = {"precision", "activations", "weights", "learning_rate"}
    known = {"precision": "precision", "activations": "activations", "weights": "weights", "learning_rate": "rate"}
    assert all(name in plan.reasons for name in decided if given_[known[name]] is None), "each auto has its reason"
    assert all(line.bytes >= 0 and line.formula for line in plan.ledger)
    assert plan.predicted_bytes("device") * (1 + DEVICE_MARGIN) <= machine.device_bytes
    assert plan.predicted_bytes("host") * (1 + HOST_MARGIN) <= machine.ram_bytes
    assert plan.predicted_bytes("host") > 0
    assert len(tiers_of(plan)) == len(policies_of(plan)) == LLAMA_3B.layers
    assert plan.times is not None
    assert plan.times.step_seconds == pytest.approx(sum(line.seconds for line in plan.times.lines))


@pytest.mark.parametrize(
    ("train", "effective", "micro", "accumulation"),
    [
        ({"per_device_train_batch_size": 7, "gradient_accumulation_steps": 2048}, 14_336, 7, 2048),
        ({"per_device_train_batch_size": 4, "effective_batch_size": 10}, 10, 4, 3),
        ({"gradient_accumulation_steps": 4, "effective_batch_size": 12}, 12, 3, 4),
    ],
)
def test_the_arithmetic_of_the_effective_batch(
    train: dict[str, int], effective: int, micro: int, accumulation: int
) -> None:
    plan = plan_of(recipe_of(train=train, data={"packing": False}))
    assert plan.effective_batch_size == effective
    assert (plan.micro_batch_sequences, plan.gradient_accumulation_steps) == (micro, accumulation)
    assert plan.micro_batch_tokens == micro * 512


def test_a_small_step_need_not_be_cut() -> None:
    plan = plan_of(recipe_of(train={"effective_batch_size": 7}, data={"packing": False}))
    assert (plan.micro_batch_sequences, plan.gradient_accumulation_steps) == (7, 1), "80 GiB keep all of it"


def test_packed_rows_hold_what_was_asked_for() -> None:
    asked = {"per_device_train_batch_size": 7, "effective_batch_size": 70}
    assert plan_of(recipe_of(train=asked, data={"packing": True})).micro_batch_tokens == 7 * 512


def test_no_row_is_longer_than_a_step_nor_shorter_than_the_longest_document() -> None:
    small = plan_of(recipe_of(train={"effective_batch_size": 2}))
    assert small.micro_batch_tokens <= 1024
    long = plan_of(recipe_of(train={"effective_batch_size": 64}), lengths=(4096,) + (300,) * 500)
    assert long.micro_batch_tokens >= 4096


# --- warnings ----------------------------------------------------------------------------------------------------


def test_patience_without_evaluations_is_said_to_do_nothing() -> None:
    train = {"effective_batch_size": 10}
    plan = plan_of(recipe_of(train=train, evaluation={"early_stopping_patience": 3}))
    assert "evaluation.eval_steps, for example to 20" in plan.warnings[0]
    assert plan_of(recipe_of(train=train, evaluation={"early_stopping_patience": 3, "eval_steps": 20})).warnings == ()
    assert plan_of(recipe_of(train=train, evaluation={"early_stopping_patience": 3, "eval_steps": 300})).warnings


# --- the choices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "quantization", "machine", "want"),
    [
        ({}, {}, machine_of(bf16=True), "bfloat16"),
        ({}, {}, machine_of(bf16=False), "float16"),
        ({}, {}, machine_of("cpu", bf16=True), "bfloat16"),
        ({}, {}, machine_of("cpu", bf16=False), "float32"),
        ({"fp16": True}, {}, machine_of(), "float16"),
        ({"bf16": True}, {}, machine_of("cpu", bf16=False), "bfloat16"),
        ({}, {"bnb_4bit_compute_dtype": "float32"}, machine_of(), "float32"),
        ({}, {"precision": "fp32"}, machine_of(), "float32"),
        ({}, {"precision": "fp32", "bnb_4bit_compute_dtype": "bfloat16"}, machine_of(), "bfloat16"),
        ({"bf16": True}, {"precision": "fp32"}, machine_of(), "bfloat16"),
        ({}, {"precision": "bf16"}, machine_of(), "bfloat16"),
    ],
)
def test_arithmetic_is_what_the_machine_is_good_at(
    train: dict, quantization: dict, machine: Machine, want: str
) -> None:
    dtype, reason = choose_compute_dtype(recipe_of(train=train, quantization=quantization), machine)
    assert dtype == want
    assert reason


def test_weights_are_quantized_only_where_memory_forces_it() -> None:
    assert plan_of(recipe_of()).precision == "bf16"
    assert plan_of(recipe_of(memory={"vram": "1700MiB"})).precision == "nf4", "a cap rehearses a smaller card"
    assert plan_of(recipe_of(memory={"ram": "5264MiB", "vram": "3584MiB"})).precision == "int8", (
        "host memory may force it too"
    )
    assert plan_of(recipe_of(memory={"ram": "3584MiB", "vram": "3584MiB"})).precision == "nf4"


def test_layers_that_do_not_fit_are_streamed_and_no_more_than_that() -> None:
    nf4 = {"precision": "nf4"}
    small = plan_of(recipe_of(quantization=nf4, memory={"vram": "2GiB"}))
    assert small.host_layers > 0
    resident = plan_of(recipe_of(quantization=nf4, memory={"vram": "60GiB"}))
    assert resident.host_layers == 0


def test_an_embedding_makes_room_for_what_is_worth_more() -> None:
    untied = replace(LLAMA_3B, tied=False, parameters=3_606_752_256, outside_parameters=788_180_000)
    words = {"quantization": {"precision": "nf4"}, "train": {"effective_batch_size": 8}}
    small, large = (plan_of(recipe_of(**words, memory={"vram": vram}), model=untied) for vram in ("9GiB", "60GiB"))
    assert (small.embedding, small.head_rows, small.graphs) == ("host", 0, True)
    assert "rows" in small.reasons["embedding"]
    assert large.embedding == "device"
    assert "embedding" not in large.reasons


def test_streamed_layers_are_spread_over_the_walk_and_kept_ones_come_last() -> None:
    plan = replace(
        plan_of(recipe_of()), dequantized_layers=2, device_layers=6, host_layers=3, kept_layers=4, policy="offload"
    )
    assert tiers_of(plan) == (*["dequantized"] * 2, *["device", "device", "host"] * 3)
    assert policies_of(plan) == (*["offload"] * 7, *["keep"] * 4)
    assert policies_of(replace(plan, host_kept_layers=3)) == (*["host"] * 3, *["offload"] * 4, *["keep"] * 4)
    assert tiers_of(replace(plan, dequantized_layers=0, device_layers=0)) == ("host",) * 3


def test_activations_are_kept_while_they_fit() -> None:
    small = {"per_device_train_batch_size": 1, "effective_batch_size": 16}
    assert plan_of(recipe_of(train=small)).activations == "keep"
    tight = plan_of(
        recipe_of(train={"per_device_train_batch_size": 8, "effective_batch_size": 16}, memory={"vram": "4GiB"})
    )
    assert tight.kept_layers < 28
    assert plan_of(recipe_of(train={**small, "gradient_checkpointing": True})).activations == "recompute"
    kept = {"train": {**small, "gradient_checkpointing": False}, "memory": {"vram": "6GiB"}}
    assert plan_of(recipe_of(**kept)).activations == "keep"


H100 = gpu_named("H100").speed("bfloat16")
TIGHT = {"train": {"per_device_train_batch_size": 8, "effective_batch_size": 16}, "memory": {"vram": "12GiB"}}


def test_steps_of_somebody_elses_loop_are_planned_as_launched() -> None:
    """And keep nothing in host memory, which a loop that goes forward twice before it goes back could not have."""
    ours, theirs = (plan_of(recipe_of(**TIGHT), speed=H100, launched=launched) for launched in (False, True))
    assert (ours.graphs, theirs.graphs) == (True, False)
    assert ours.host_kept_layers > theirs.host_kept_layers == 0


def test_an_idle_bus_carries_activations_to_host_memory_and_back() -> None:
    plan = plan_of(recipe_of(**TIGHT), speed=H100)
    layers = LLAMA_3B.layers
    assert 0 < plan.host_kept_layers < layers - plan.kept_layers
    assert plan.kept_layers >= 2, "into whose place the others come back"
    assert policies_of(plan).count("host") == plan.host_kept_layers
    assert f"{plan.host_kept_layers} in host memory" in plan.reasons["activations"]
    assert f"{layers - plan.kept_layers - plan.host_kept_layers} of {layers}" in plan.reasons["activations"]
    assert plan.activations.endswith("partly on the host")
    locked = next(line.bytes for line in plan.ledger if line.name == "activations kept in host memory")
    slow = plan_of(recipe_of(**TIGHT), speed=replace(H100, to_host_rate=1e7))
    assert slow.host_kept_layers == 0, "a slow bus carries nothing for nothing"
    assert slow.times is not None
    assert plan.times is not None
    assert plan.times.step_seconds < slow.times.step_seconds
    tight = {**TIGHT, "memory": {"vram": "12GiB", "ram": plan.predicted_bytes("host") - locked // 2}}
    assert plan_of(recipe_of(**tight), speed=H100).predicted_bytes("host") < plan.predicted_bytes("host")


@pytest.mark.parametrize("activations", ["recompute", "offload"])
def test_activations_that_are_decided_do_not_go_to_host_memory(activations: str) -> None:
    asked = recipe_of(train=TIGHT["train"], memory={**TIGHT["memory"], "activations": activations})
    again = recipe_of(train={**TIGHT["train"], "gradient_checkpointing": True}, memory=TIGHT["memory"])
    assert plan_of(asked, speed=H100).host_kept_layers == plan_of(again, speed=H100).host_kept_layers == 0


def test_without_a_gpu_or_need_all_activations_stay() -> None:
    assert plan_of(recipe_of(), speed=H100).host_kept_layers == 0
    assert plan_of(recipe_of(memory={"ram": "20GiB"}), machine=machine_of("cpu")).host_kept_layers == 0


def test_what_the_user_set_and_does_not_fit_is_refused_with_the_change_that_mends_it() -> None:
    train = {"per_device_train_batch_size": 16, "effective_batch_size": 16}
    asked = recipe_of(train=train, memory={"vram": "6GiB", "activations": "keep"})
    with pytest.raises(DoesNotFit) as error:
        plan_of(asked)
    assert error.value.next_step.startswith("Set memory.activations: auto (it is keep)")
    mended = recipe_of(train=train, memory={"vram": "6GiB"})
    assert plan_of(mended).micro_batch_sequences == 16


def test_where_nothing_fits_the_nearest_miss_and_the_least_budget_are_named() -> None:
    with pytest.raises(DoesNotFit) as error:
        plan_of(recipe_of(memory={"vram": "1GiB"}))
    assert "weights: host, activations: offload" in error.value.what
    allowed = error.value.next_step.split("Allow ")[1].split(" with")[0].replace(" ", "")
    assert plan_of(recipe_of(memory={"vram": allowed})).host_layers > 0, "and with that it fits"


@SLOW
@given(st.integers(1, 40), st.integers(0, 60), st.sampled_from(["bf16", "nf4"]), st.integers(1, 64))
def test_more_memory_is_never_predicted_to_be_slower(small: int, more: int, precision: str, batch: int) -> None:
    def seconds(vram: int) -> float:
        recipe = recipe_of(
            memory={"vram": vram * GIB},
            quantization={"precision": precision},
            train={"effective_batch_size": batch},
        )
        times = plan_or_skip(recipe, lengths=(2048, *(400,) * 60), speed=gpu_named("H100").speed("bfloat16")).times
        assert times is not None
        return times.step_seconds

    assert seconds(small + more) <= seconds(small)


def test_the_frontier_rises_and_ends_where_more_is_of_no_use() -> None:
    points = plan_of(recipe_of(train={"effective_batch_size": 64}), frontier=True).frontier
    assert 6 <= len(points) <= 14
    budgets, speeds = [p.vram_bytes for p in points], [p.tokens_per_second for p in points]
    assert budgets == sorted(set(budgets))
    assert all(b >= a / PRECISION_TOLERANCE for a, b in itertools.pairwise(speeds)), "a better precision may cost that"
    assert all(p.device_bytes * (1 + DEVICE_MARGIN) <= p.vram_bytes for p in points)
    with pytest.raises(DoesNotFit):
        plan_of(recipe_of(train={"effective_batch_size": 64}, memory={"vram": points[0].vram_bytes * 9 // 10}))


def test_a_quantized_checkpoint_decides_what_was_left_open() -> None:
    plan = plan_of(recipe_of(), stored_precision="nf4", stored_double_quant=False)
    assert (plan.precision, plan.double_quant) == ("nf4", False)
    with pytest.raises(UsageError, match="already quantized to nf4, and bf16 is asked for"):
        plan_of(recipe_of(quantization={"precision": "bf16"}), stored_precision="nf4", stored_double_quant=False)
    assert plan_of(recipe_of(quantization={"precision": "nf4"})).double_quant is True


def test_a_window_is_never_longer_than_the_model_was_made_for() -> None:
    assert choose_max_length(recipe_of(), 131_072) == 2048
    assert choose_max_length(recipe_of(), 512) == 512
    assert choose_max_length(recipe_of(data={"max_length": 8192}), 131_072) == 8192
    with pytest.raises(UsageError, match=r"data\.max_length: 8192 .* 2048"):
        choose_max_length(recipe_of(data={"max_length": 8192}), 2048)


def test_a_whole_layer_is_dequantized_at_once_unless_it_is_very_large() -> None:
    nf4 = recipe_of(
        quantization={"precision": "nf4"}, memory={"weights": "device"}, train={"gradient_checkpointing": True}
    )
    assert plan_of(nf4).dequantize == "layer"
    large = replace(LLAMA_3B, linear_parameters=LLAMA_3B.linear_parameters * 10)
    assert plan_of(nf4, model=large).dequantize == "product"


def test_documents_that_would_mix_are_padded_or_refused() -> None:
    obstacles = Obstacles(packing="layer 0 carries state from one position to the next")
    plan = plan_of(recipe_of(), obstacles=obstacles)
    assert not plan.packing
    assert plan.reasons["packing"] == "layer 0 carries state from one position to the next"
    with pytest.raises(UsageError, match=r"data\.packing: this model cannot take several documents"):
        plan_of(recipe_of(data={"packing": True}), obstacles=obstacles)


def test_layers_that_share_state_stay_on_the_device() -> None:
    tight = {
        "memory": {"vram": 9 * GIB},
        "quantization": {"precision": "nf4"},
        "train": {"per_device_train_batch_size": 2},
    }
    free, bound = (plan_of(recipe_of(**tight), obstacles=o) for o in (Obstacles(), Obstacles(streaming="layers share")))
    assert (free.weights, free.activations) != ("device", "keep"), "without the obstacle the room is used otherwise"
    assert (bound.weights, bound.activations, bound.host_layers) == ("device", "keep", 0)
    assert "layers share" in bound.reasons["weights"]
    assert (free.compiled, bound.compiled) == (True, False), "a compiler would take each layer by itself"
    with pytest.raises(UsageError, match=r"model\.compile: true, but .* are not compiled: layers share"):
        plan_of(recipe_of(**tight, model={"compile": True}), obstacles=Obstacles(streaming="layers share"))


def test_an_adapter_on_the_host_leaves_the_device_a_visit() -> None:
    asked = {"vram": 12 * GIB, "weights": "host", "activations": "offload"}
    near, far = (plan_of(recipe_of(memory={**asked, "adapter": home})) for home in ("device", "host"))
    assert (near.adapter, far.adapter) == ("device", "host")
    assert far.predicted_bytes("device") < near.predicted_bytes("device")
    assert not {line.name for line in far.ledger if line.where == "device"} & {"optimizer moments", "adapter gradients"}
    on_cpu = plan_of(recipe_of(memory={"adapter": "host"}), model=TINY, machine=machine_of("cpu"))
    assert on_cpu.adapter == "device", "there is no other memory to move it to"


@pytest.mark.parametrize("alone", ["soft-capped", "float32"])
def test_documents_that_a_gpu_attends_to_one_by_one_are_padded_or_not_compiled(alone: str) -> None:
    model = replace(LLAMA_3B, one_by_one=alone == "soft-capped")
    asked = {"bnb_4bit_compute_dtype": "float32" if alone == "float32" else "bfloat16"}
    plan = plan_of(recipe_of(quantization=asked), model=model)
    assert (plan.packing, plan.compiled) == (False, True)
    assert "one document after the other" in plan.reasons["packing"]
    packed = plan_of(recipe_of(quantization=asked, data={"packing": True}), model=model)
    assert (packed.packing, packed.compiled) == (True, False)
    compiled = recipe_of(quantization=asked, data={"packing": True}, model={"compile": True})
    assert plan_of(compiled, model=model).compiled, "what the user set stays"
    assert plan_of(recipe_of(quantization=asked), model=model, machine=machine_of("cpu")).packing
