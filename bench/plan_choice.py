"""What the plan chooses and predicts against what a GPU does: seconds of steps on random weights of real shapes.

    python bench/plan_choice.py OUT.json [sweep=SHAPE:GIB,GIB,...] ... [SHAPE:GIB,GIB,...] ... [seconds=N] [rivals=N]
    python bench/plan_choice.py --again CHOSEN.json OUT.json [OTHER.json]     predicted once more (no GPU)

Asks the plan what it would do with each budget, in the order given, and takes optimizer steps of two packed
micro-batches each. For the budgets of `sweep` it also measures the most promising of all other choices that fit: of
each precision, place of the weights, policy for activations and micro-batch the fastest, as far as they are predicted
to be within an eighth of the best, not more than `rivals` (10), and not more than ALIKE that differ in the micro-batch
alone. What is compared are tokens/s of a whole step: its micro-batches as measured, and the update.

Cases share a process and nothing else; `seconds` ends it before a time limit does, and the file is written after every
case. `--again` predicts what CHOSEN.json measured with the formulas of today, with OTHER.json's launch of a small
operation where the probe before the choices was disturbed.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

from bench.about import about  # noqa: E402
from bench.random_models import random_model, random_sequences  # noqa: E402

DOCUMENT_TOKENS = 512
STEP_DOCUMENTS = 256
MICRO_BATCHES = 2
RIVALS, ALIKE, RIVAL_SECONDS = "10", 3, 1.125
"""At most so many rivals, so many of them alike but for the micro-batch, within so many times the best's seconds."""
QUIET_LAUNCH_SECONDS, PROBES = 15e-6, 4
LORA = {"r": 8, "target_modules": ["q_proj", "v_proj"]}


def model_of(shape: str) -> tuple[Any, Any]:
    """A shape's numbers, and the recipe of all cases."""
    from bench.shapes import shape_config
    from drawplate.model.layer.anatomy import build_anatomy
    from drawplate.recipe import load_recipe
    from drawplate.run.planning import model_shape

    train = {"effective_batch_size": STEP_DOCUMENTS}
    values = {"model": {"name_or_path": "random"}, "data": {"files": ["random"]}, "lora": LORA, "train": train}
    recipe = load_recipe(values)
    return model_shape(build_anatomy(shape_config(shape)), recipe), recipe


def search_over(shape: str, speed: Any) -> tuple[Any, Any]:
    """The plan's search for a shape on this machine, and what a budget of device bytes is."""
    import torch

    from drawplate.machine.device import machine
    from drawplate.machine.memory import memory_sample
    from drawplate.planner import choose

    model, recipe = model_of(shape)
    situation = choose.Situation(
        recipe=recipe,
        machine=machine(torch.device("cuda", 0)),
        model=model,
        base_bytes=memory_sample().process_bytes,
        speed=speed,
    )
    corpus = choose.CorpusShape(lengths=(DOCUMENT_TOKENS,) * 4 * STEP_DOCUMENTS)
    batch = choose.batch_of(situation, corpus, {})
    search = choose.search_of(situation, corpus, "bfloat16", batch)
    return search, lambda device_bytes: replace(situation.budget, device_bytes=device_bytes)


def placement_of(choice: Any, model: Any) -> Any:
    """Where a choice puts the layers, as a run does."""
    import torch

    from drawplate.model.base.precision import Storage
    from drawplate.model.placement import Placement, policies_of, tiers_of

    layers = model.layers
    counts = SimpleNamespace(
        dequantized_layers=choice.dequantized_layers,
        device_layers=choice.device_layers,
        host_layers=choice.host_layers(layers),
        kept_layers=choice.kept_layers,
        host_kept_layers=choice.on_host(layers),
        policy=choice.policy,
        layers=layers,
    )
    return Placement(
        device=torch.device("cuda", 0),
        storage=Storage(choice.precision),
        compute_dtype=torch.bfloat16,
        weights=tiers_of(counts),  # type: ignore[arg-type]
        activations=policies_of(counts),  # type: ignore[arg-type]
        slots=choice.slots,
        head_rows=choice.head_rows,
        embedding=choice.embedding,
        compiled=choice.compiled,
        dequantize=choice.dequantize,
        graphs=choice.captured(model),
    )


def measure_found(shape: str, search: Any, found: Any) -> dict[str, Any]:
    """Predicted and measured tokens/s and peak of one choice within a budget."""
    from drawplate.data.batches import cut_packed
    from drawplate.planner.seconds.cost import step_cost

    choice, work = found.choice, found.batch.work
    began = time.monotonic()
    model = random_model(shape, placement_of(choice, search.model), {**LORA, "lora_alpha": 32, "lora_dropout": 0.0})
    loaded = time.monotonic() - began
    documents = [DOCUMENT_TOKENS] * (MICRO_BATCHES * choice.micro_batch_tokens // DOCUMENT_TOKENS)
    batches = cut_packed(random_sequences(documents, search.model.vocab), choice.micro_batch_tokens, 16, 0)
    timed = timed_accumulation(model, batches)
    predicted = step_cost(search.model, choice, replace(work, micro_batches=len(batches)), search.speed)
    micro_batch = (timed["step_seconds"] - timed["update_seconds"]) / len(batches)
    whole = work.micro_batches * micro_batch + timed["update_seconds"]
    return {
        "whole_step_tokens_per_second": round(work.step_tokens / whole, 1),
        "whole_step_predicted_tokens_per_second": round(1 / found.seconds_per_token, 1),
        "predicted_step_seconds": round(predicted.seconds, 4),
        "predicted_tokens_per_second": round(predicted.tokens_per_second, 1),
        **timed,
        "error_percent": round(100 * (predicted.seconds / timed["step_seconds"] - 1), 1),
        "device_peak_predicted_bytes": found.ledger.peak("device"),
        "device_peak_bytes": timed["peak_reserved_bytes"] + search.around.context_bytes,
        "load_seconds": round(loaded, 2),
        "lines": {line.name: round(line.seconds, 4) for line in predicted.lines},
    }


def timed_accumulation(model: Any, batches: list[Any]) -> dict[str, Any]:
    """Seconds of optimizer steps over all the batches, and the most that was reserved, loading included.

    Five steps, the middle one of the last three; three steps where one takes over a second."""
    import torch

    from drawplate.recipe import TrainSection
    from drawplate.train.loop import make_optimizer

    torch._dynamo.reset()
    optimizer = make_optimizer(model.adapter.parameters(), TrainSection())
    counted = sum(batch.counted_tokens for batch in batches)
    seconds: list[tuple[float, float]] = []
    while len(seconds) < 3 or (len(seconds) < 5 and seconds[-1][0] < 1):
        torch.cuda.synchronize()
        began = time.monotonic()
        model.adapter.zero_gradients()
        for batch in batches:
            model.add_gradients(batch, scale=1 / counted, dropout_seed=(0, len(seconds)))
        torch.cuda.synchronize()
        added = time.monotonic()
        torch.nn.utils.clip_grad_norm_(model.adapter.parameters(), 1.0)
        optimizer.step()
        torch.cuda.synchronize()
        seconds.append((time.monotonic() - began, time.monotonic() - added))
    warm = sorted(seconds[2:])
    tokens, (middle, update) = sum(batch.tokens for batch in batches), warm[len(warm) // 2]
    return {
        "tokens_per_second": round(tokens / middle, 1),
        "step_seconds": round(middle, 4),
        "update_seconds": round(update, 4),
        "all_step_seconds": [round(s, 4) for s, _ in seconds],
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def predict_again(chosen: Path, out: Path, other: Path | None) -> None:
    """Seconds of what was chosen and measured, by the formulas of today."""
    from drawplate.planner.seconds.cost import step_cost
    from drawplate.planner.seconds.work import Cut, step_work
    from drawplate.records import DeviceSpeed, from_json

    stored = json.loads(chosen.read_text())
    speed = from_json(DeviceSpeed, stored["speed"])
    if other:
        speed = replace(speed, launch_seconds=json.loads(other.read_text())["speed"]["launch_seconds"])
    models = {shape: model_of(shape)[0] for shape in {r["shape"] for r in stored["results"]}}
    for result in stored["results"]:
        if "step_seconds" not in result:
            continue
        model, tokens = models[result["shape"]], result["micro_batch_tokens"]
        cut = Cut(packing=True, tokens=tokens, sequences=STEP_DOCUMENTS, multiple=16)
        work = step_work((DOCUMENT_TOKENS,) * 4 * STEP_DOCUMENTS, STEP_DOCUMENTS, cut)
        cost = step_cost(model, choice_of(result, model.layers), replace(work, micro_batches=MICRO_BATCHES), speed)
        error = round(100 * (cost.seconds / result["step_seconds"] - 1), 1)
        lines = {line.name: round(line.seconds, 4) for line in cost.lines}
        result["again"] = {"predicted_step_seconds": round(cost.seconds, 4), "error_percent": error, "lines": lines}
        named = " ".join(str(result[name]) for name in ("shape", "gib", "kind", "precision", "weights", "activations"))
        print(f"{named:60} {tokens:6} {result['error_percent']:8} % -> {error} %")
    out.write_text(json.dumps({**stored, "again_with_launch_seconds": speed.launch_seconds}, indent=1) + "\n")


def choice_of(result: dict[str, Any], layers: int) -> Any:
    """The choice that a result describes."""
    from drawplate.planner.shape import Choice

    host = result["host_layers"]
    return Choice(
        precision=result["precision"],
        double_quant=True,
        compute_dtype="bfloat16",
        device="cuda",
        dequantized_layers=result["dequantized_layers"],
        device_layers=layers - host - result["dequantized_layers"],
        kept_layers=result["kept_layers"],
        host_kept_layers=result.get("host_kept_layers", 0),
        policy="offload" if "offload" in result["activations"] else "recompute",
        micro_batch_tokens=result["micro_batch_tokens"],
        head_rows=result["head_rows"],
        embedding=result.get("embedding", "device"),
        compiled=True,
        dequantize=result["dequantize"],
    )


def described(found: Any, layers: int) -> dict[str, Any]:
    """A choice in words."""
    from drawplate.planner.explain import activation_words, weight_words

    choice = found.choice
    return {
        "precision": choice.precision,
        "weights": weight_words(choice, layers),
        "host_layers": choice.host_layers(layers),
        "dequantized_layers": choice.dequantized_layers,
        "activations": activation_words(choice, layers),
        "kept_layers": choice.kept_layers,
        "host_kept_layers": choice.on_host(layers),
        "micro_batch_tokens": choice.micro_batch_tokens,
        "head_rows": choice.head_rows,
        "embedding": choice.embedding,
        "dequantize": choice.dequantize,
    }


Case = tuple[dict[str, Any], Callable[[], dict[str, Any]]]


def cases_of(arguments: list[str], speed: Any, most_rivals: int) -> Iterator[Case]:
    """Every budget of every argument, in order: what is measured, and how."""
    searches: dict[str, tuple[Any, Any]] = {}
    seen: dict[tuple[str, Any], float] = {}
    for argument in arguments:
        kind, _, rest = argument.rpartition("=")
        shape, _, sizes = rest.partition(":")
        if shape not in searches:
            searches[shape] = search_over(shape, speed)
        for gib in (float(n) for n in sizes.split(",")):
            for case in budget_cases(shape, gib, searches[shape], most_rivals if kind == "sweep" else 0):
                facts, found, call = case
                if found is not None and (shape, found.choice) in seen:
                    yield facts, lambda gib=seen[shape, found.choice]: {"same_as_gib": gib}  # type: ignore[misc]
                    continue
                if found is not None:
                    seen[shape, found.choice] = gib
                yield facts, call


def budget_cases(shape: str, gib: float, searched: tuple[Any, Any], rivals: int) -> Iterator[tuple[Any, Any, Any]]:
    """The choice within a budget, and its rivals where asked for: facts, what was found, and how to measure it."""
    from drawplate.planner.choose import fastest

    search, budget_of = searched
    budget = budget_of(int(gib * 2**30))
    best = fastest(search, budget)
    if best is None:
        yield {"shape": shape, "gib": gib, "kind": "choice"}, None, lambda: {"does_not_fit": True}
        return
    for found in [best, *(rivals_of(search, budget, best)[:rivals] if rivals else ())]:
        kind = "choice" if found is best else "rival"
        facts = {"shape": shape, "gib": gib, "kind": kind, **described(found, search.model.layers)}
        yield facts, found, lambda f=found: measure_found(shape, search, f)


def rivals_of(search: Any, budget: Any, best: Any) -> list[Any]:
    """The most promising of other choices, the best first: the search is told where weights and activations go."""
    from drawplate.planner.search import Search

    limit = best.seconds_per_token * RIVAL_SECONDS
    found: dict[Any, Any] = {}
    for weights in ("device", "dequantized", "host", "auto"):
        for activations in ("keep", "recompute", "offload", "auto"):
            space = replace(search.space, weights=weights, activations=activations)
            told = Search(search.model, search.speed, space, search.fit)
            for precision in search.space.precisions:
                for batch in search.space.batches:
                    if other := told.best(precision, budget, limit=limit, tokens=batch.tokens):
                        found.setdefault(same_work(other, search.model.layers), other)
    found.pop(same_work(best, search.model.layers), None)
    kinds: Counter[Any] = Counter()
    chosen = []
    for work, other in sorted(found.items(), key=lambda item: item[1].seconds_per_token):
        kinds[work[:3]] += 1
        if kinds[work[:3]] <= ALIKE:
            chosen.append(other)
    return chosen


def same_work(found: Any, layers: int) -> tuple[str, ...]:
    """What tells choices apart: whatever was quantized and then dequantized whole is multiplied like bf16."""
    facts = described(found, layers)
    whole = facts["weights"] == "dequantized"
    names = ("weights", "activations", "micro_batch_tokens")
    return (
        "bf16" if whole else facts["precision"],
        "device" if whole else facts["weights"],
        *(facts[n] for n in names[1:]),
    )


def emptied(call: Any) -> dict[str, Any]:
    """A case's result, or how it failed; either way the GPU is empty again."""
    import torch

    try:
        return call()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:600]}"}
    finally:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def quiet_probe(device: Any) -> tuple[Any, list[float]]:
    """The device's speed, and the launch that each probe found: once more where a launch took suspiciously long."""
    import torch

    from drawplate.machine.device import machine
    from drawplate.machine.speed import probe

    launches: list[float] = []
    while not launches or (launches[-1] > QUIET_LAUNCH_SECONDS and len(launches) < PROBES):
        speed = probe(device, torch.bfloat16, machine(device))
        launches.append(speed.launch_seconds)
        print(f"a launch takes {1e6 * launches[-1]:.1f} microseconds", flush=True)
    torch.cuda.empty_cache()
    return replace(speed, launch_seconds=min(launches)), launches


def main() -> None:
    """Measure what was asked for; the file is written after every case."""
    import torch

    from drawplate.records import to_json

    if sys.argv[1] == "--again":
        other = Path(sys.argv[4]) if len(sys.argv) > 4 else None
        return predict_again(Path(sys.argv[2]), Path(sys.argv[3]), other)
    out, arguments = Path(sys.argv[1]), [a for a in sys.argv[2:] if ":" in a]
    options = dict(a.split("=") for a in sys.argv[2:] if ":" not in a)
    limit, most_rivals = float(options.get("seconds", "inf")), int(options.get("rivals", RIVALS))
    began = time.monotonic()
    speed, launches = quiet_probe(torch.device("cuda", 0))
    result = about() | {"probed_launch_seconds": launches, "speed": to_json(speed), "results": []}
    print(json.dumps(result["speed"]), flush=True)
    for facts, call in cases_of(arguments, speed, most_rivals):
        if time.monotonic() - began > limit:
            break
        measured = {**facts, **emptied(call)}
        result["results"].append(measured)
        out.write_text(json.dumps(result, indent=1))
        print(json.dumps(measured), f"{time.monotonic() - began:.0f} s so far", flush=True)
    out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
