"""What the plan predicts against what a GPU does: seconds of optimizer steps, on random weights of real shapes.

    python bench/plan_choice.py OUT.json probe
    python bench/plan_choice.py OUT.json time SHAPE:PRECISION:WEIGHTS:ACTIVATIONS:TOKENS/LENGTH[:packed][:r=N][:all] ...
    python bench/plan_choice.py OUT.json choose SHAPE:GIB,GIB,... ... [sweep=SHAPE:GIB,GIB,...] [seconds=N]
    python bench/plan_choice.py OUT.json again CHOSEN.json OTHER.json      what was chosen, predicted once more (no GPU)

`time` loads each case, takes a few optimizer steps of one micro-batch each (TOKENS tokens in documents of LENGTH), and
writes the seconds of its parts on the GPU's clock beside the host's. `choose` asks the plan what it would do with each
budget and takes optimizer steps of two packed micro-batches each; for the budgets of `sweep` it also measures the best
choices of other precisions and micro-batches, so that the plan's own can be compared. Cases share a process and nothing
else; `seconds` ends it before a time limit does. `again` predicts what CHOSEN.json measured with OTHER.json's launch of
a small operation, where the probe before the choices was disturbed.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
import time
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

STEPS = 4


def timed_steps(model: Any, batch: Any, steps: int = STEPS) -> dict[str, Any]:
    """Seconds of whole optimizer steps of one micro-batch, split at the ends of body, head and backward."""
    import torch

    from drawplate.recipe import TrainSection
    from drawplate.train import make_optimizer

    torch._dynamo.reset()
    optimizer = make_optimizer(model.adapter.parameters(), TrainSection())
    events: list[torch.cuda.Event] = []

    def mark() -> None:
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()

    body = type(model).hidden_states

    def marked(*args: Any, **kwargs: Any) -> Any:
        out = body(model, *args, **kwargs)
        mark()
        return out

    model.hidden_states = marked

    def step(number: int) -> None:
        mark()
        loss, _ = model.sum_nats(batch, scale=1 / batch.counted_tokens, dropout_seed=(0, number))
        mark()
        loss.backward()
        mark()
        optimizer.step()
        optimizer.zero_grad()
        mark()

    began = time.monotonic()
    step(0)
    torch.cuda.synchronize()
    first_seconds = time.monotonic() - began
    step(1)
    torch.cuda.synchronize()
    rows, issued = [], []
    torch.cuda.reset_peak_memory_stats()
    for i in range(steps):
        events.clear()
        began = time.monotonic()
        step(2 + i)
        issued.append(time.monotonic() - began)
        torch.cuda.synchronize()
        rows.append([time.monotonic() - began, *(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events))])
    middle = sorted(rows)[len(rows) // 2]
    names = ("step", "body_forward", "head", "backward", "optimizer")
    return {
        "tokens": batch.tokens,
        "tokens_per_second": round(batch.tokens / middle[0], 1),
        "seconds": {name: round(value, 5) for name, value in zip(names, middle, strict=True)},
        "all_step_seconds": [round(r[0], 4) for r in rows],
        "issue_seconds": round(sorted(issued)[len(issued) // 2], 5),
        "first_step_seconds": round(first_seconds, 2),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def time_case(case: str) -> dict[str, Any]:
    """One case of `time`."""
    import torch

    from drawplate.data.batches import cut_packed, cut_padded
    from drawplate.model.causal_lm import Placement
    from drawplate.model.storage import Storage

    shape, precision, weights, activations, size, *options = case.split(":")
    flags = dict(o.partition("=")[::2] for o in options)
    placement = Placement(
        device=torch.device("cuda", 0),
        storage=Storage(precision),
        compute_dtype=torch.bfloat16,
        weights=weights,
        activations=activations,
        head_rows=int(flags.get("head", 0)),
        compiled=True,
        dequantize=flags.get("dequantize", "layer"),
    )
    targets = "all-linear" if "all" in flags else ["q_proj", "v_proj"]
    lora = {"r": int(flags.get("r", 8)), "lora_alpha": 32, "target_modules": targets}
    lora["lora_dropout"] = float(flags.get("dropout", 0.0))
    began = time.monotonic()
    model = random_model(shape, placement, lora)
    torch.cuda.synchronize()
    loaded = time.monotonic() - began
    tokens, length = (int(n) for n in size.split("/"))
    sequences = random_sequences([length] * (tokens // length), model.anatomy.config.vocab_size)
    batch = (
        cut_packed(sequences, tokens, 16, 0)[0]
        if "packed" in flags
        else cut_padded(sequences, len(sequences), 16, 0)[0]
    )
    return {"load_seconds": round(loaded, 2), **timed_steps(model, batch)}


DOCUMENT_TOKENS = 512
STEP_DOCUMENTS = 256
ALTERNATIVES = 5


def search_over(shape: str, speed: Any) -> tuple[Any, Any]:
    """The plan's search for a shape on this machine, and what a budget of device bytes is."""
    import torch

    from bench.shapes import shape_config
    from drawplate.device import machine, memory_sample
    from drawplate.model.anatomy import build_anatomy
    from drawplate.plan import choose
    from drawplate.prepare import model_shape
    from drawplate.recipe import load_recipe

    recipe = load_recipe(
        {
            "model": {"name_or_path": "random"},
            "data": {"files": ["random"]},
            "lora": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
            "train": {"effective_batch_size": STEP_DOCUMENTS},
        }
    )
    situation = choose.Situation(
        recipe=recipe,
        machine=machine(torch.device("cuda", 0)),
        model=model_shape(build_anatomy(shape_config(shape)), recipe),
        base_bytes=memory_sample().process_bytes,
        speed=speed,
    )
    corpus = choose.CorpusShape(lengths=(DOCUMENT_TOKENS,) * 4 * STEP_DOCUMENTS)
    batch = choose.batch_of(situation, corpus, {})
    search = choose.search_of(situation, corpus, "bfloat16", batch)
    return search, lambda device_bytes: replace(situation.budget, device_bytes=device_bytes)


def measure_found(shape: str, search: Any, found: Any) -> dict[str, Any]:
    """Predicted and measured tokens/s and peak of one choice within a budget."""
    import torch

    from drawplate.data.batches import cut_packed
    from drawplate.model.causal_lm import Placement
    from drawplate.model.storage import Storage
    from drawplate.plan.cost import step_cost
    from drawplate.prepare import policies_of, tiers_of

    choice, layers = found.choice, search.model.layers
    counts = SimpleNamespace(
        dequantized_layers=choice.dequantized_layers,
        device_layers=choice.device_layers,
        host_layers=choice.host_layers(layers),
        kept_layers=choice.kept_layers,
        policy=choice.policy,
        layers=layers,
    )
    placement = Placement(
        device=torch.device("cuda", 0),
        storage=Storage(choice.precision),
        compute_dtype=torch.bfloat16,
        weights=tiers_of(counts),  # type: ignore[arg-type]
        activations=policies_of(counts),  # type: ignore[arg-type]
        slots=choice.slots,
        head_rows=choice.head_rows,
        compiled=choice.compiled,
        dequantize=choice.dequantize,
        graphs=choice.captured(search.model),
    )
    lora = {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}
    model = random_model(shape, placement, lora)
    sequences = random_sequences(
        [DOCUMENT_TOKENS] * (2 * choice.micro_batch_tokens // DOCUMENT_TOKENS), search.model.vocab
    )
    batches = cut_packed(sequences, choice.micro_batch_tokens, 16, 0)
    timed = timed_accumulation(model, batches)
    predicted = step_cost(search.model, choice, replace(found.batch.work, micro_batches=2), search.speed)
    return {
        "predicted_step_seconds": round(predicted.seconds, 4),
        "predicted_tokens_per_second": round(predicted.tokens_per_second, 1),
        **timed,
        "error_percent": round(100 * (predicted.seconds / timed["step_seconds"] - 1), 1),
        "device_peak_predicted_bytes": found.ledger.peak("device"),
        "device_peak_bytes": timed["peak_reserved_bytes"] + search.around.context_bytes,
        "lines": {line.name: round(line.seconds, 4) for line in predicted.lines},
    }


def timed_accumulation(model: Any, batches: list[Any], steps: int = 3) -> dict[str, Any]:
    """Seconds of optimizer steps over all the batches, and the most that was reserved, loading included."""
    import torch

    from drawplate.recipe import TrainSection
    from drawplate.train import make_optimizer

    torch._dynamo.reset()
    optimizer = make_optimizer(model.adapter.parameters(), TrainSection())
    counted = sum(batch.counted_tokens for batch in batches)
    seconds = []
    for number in range(steps + 2):
        torch.cuda.synchronize()
        began = time.monotonic()
        model.adapter.zero_gradients()
        for batch in batches:
            model.add_gradients(batch, scale=1 / counted, dropout_seed=(0, number))
        torch.nn.utils.clip_grad_norm_(model.adapter.parameters(), 1.0)
        optimizer.step()
        torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
    tokens, middle = sum(batch.tokens for batch in batches), sorted(seconds[2:])[steps // 2]
    return {
        "tokens_per_second": round(tokens / middle, 1),
        "step_seconds": round(middle, 4),
        "all_step_seconds": [round(s, 4) for s in seconds],
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def predict_again(chosen: Path, other: Path, out: Path) -> None:
    """Seconds of what was chosen and measured, with the launch of a small operation that another file's probe found."""
    from bench.shapes import shape_config
    from drawplate.model.anatomy import build_anatomy
    from drawplate.plan.cost import step_cost
    from drawplate.plan.work import Cut, step_work
    from drawplate.prepare import model_shape
    from drawplate.recipe import load_recipe
    from drawplate.records import DeviceSpeed, from_json

    stored = json.loads(chosen.read_text())
    launch = json.loads(other.read_text())["speed"]["launch_seconds"]
    speed = replace(from_json(DeviceSpeed, stored["speed"]), launch_seconds=launch)
    lora = {"r": 8, "target_modules": ["q_proj", "v_proj"]}
    recipe = load_recipe({"model": {"name_or_path": "random"}, "data": {"files": ["random"]}, "lora": lora})
    shapes = {r["shape"] for r in stored["results"]}
    models = {shape: model_shape(build_anatomy(shape_config(shape)), recipe) for shape in shapes}
    for result in stored["results"]:
        if "step_seconds" not in result:
            continue
        model, tokens = models[result["shape"]], result["micro_batch_tokens"]
        cut = Cut(packing=True, tokens=tokens, sequences=STEP_DOCUMENTS, multiple=16)
        work = replace(step_work((DOCUMENT_TOKENS,) * 4 * STEP_DOCUMENTS, STEP_DOCUMENTS, cut), micro_batches=2)
        cost = step_cost(model, choice_of(result, model.layers), work, speed)
        error = round(100 * (cost.seconds / result["step_seconds"] - 1), 1)
        result["again"] = {"predicted_step_seconds": round(cost.seconds, 4), "error_percent": error}
        print(f"{result['shape']} {result['gib']:5} {result['kind']:7} {result['error_percent']:8} % -> {error} %")
    out.write_text(json.dumps({**stored, "again_with_launch_seconds": launch}, indent=1) + "\n")


def choice_of(result: dict[str, Any], layers: int) -> Any:
    """The choice that a result describes."""
    from drawplate.plan.ledger import Choice

    host = result["host_layers"]
    return Choice(
        precision=result["precision"],
        double_quant=True,
        compute_dtype="bfloat16",
        device="cuda",
        dequantized_layers=result["dequantized_layers"],
        device_layers=layers - host - result["dequantized_layers"],
        kept_layers=result["kept_layers"],
        policy="offload" if "offload" in result["activations"] else "recompute",
        micro_batch_tokens=result["micro_batch_tokens"],
        head_rows=result["head_rows"],
        compiled=True,
        dequantize=result["dequantize"],
    )


def described(found: Any, layers: int) -> dict[str, Any]:
    """A choice in words."""
    from drawplate.plan.explain import activation_words, weight_words

    choice = found.choice
    return {
        "precision": choice.precision,
        "weights": weight_words(choice, layers),
        "host_layers": choice.host_layers(layers),
        "dequantized_layers": choice.dequantized_layers,
        "activations": activation_words(choice, layers),
        "kept_layers": choice.kept_layers,
        "micro_batch_tokens": choice.micro_batch_tokens,
        "head_rows": choice.head_rows,
        "dequantize": choice.dequantize,
    }


def choose_cases(arguments: list[str], speed: Any) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Every budget of every shape, then every sweep: what is measured, and how."""
    from drawplate.plan.choose import fastest

    for argument in arguments:
        kind, _, rest = argument.rpartition("=")
        shape, _, sizes = rest.partition(":")
        search, budget_of = search_over(shape, speed)
        seen: dict[Any, int] = {}
        for gib in (float(n) for n in sizes.split(",")):
            budget = budget_of(int(gib * 2**30))
            best = fastest(search, budget)
            if best is None:
                yield {"shape": shape, "gib": gib}, lambda: {"does_not_fit": True}
                continue
            tried = [best] if kind != "sweep" else alternatives(search, budget, best)
            for found in tried:
                facts = {"shape": shape, "gib": gib, "kind": kind or "choice", **described(found, search.model.layers)}
                if found.choice in seen:
                    yield facts, lambda gib=seen[found.choice]: {"same_as_gib": gib}  # type: ignore[misc]
                    continue
                seen[found.choice] = int(gib)
                yield facts, lambda f=found, s=search, n=shape: measure_found(n, s, f)  # type: ignore[misc]


def alternatives(search: Any, budget: Any, best: Any) -> list[Any]:
    """The best choice of every other precision and micro-batch, the most promising first."""
    found = [
        other
        for precision in search.space.precisions
        for batch in search.space.batches
        if (other := search.best(precision, budget, tokens=batch.tokens)) and other.choice != best.choice
    ]
    return sorted(found, key=lambda other: other.seconds_per_token)[:ALTERNATIVES]


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


def main() -> None:
    """Run what was asked for; the file is written after every case."""
    import torch

    from drawplate.device import machine
    from drawplate.records import to_json
    from drawplate.speed import probe

    out, mode, arguments = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if mode == "again":
        return predict_again(Path(arguments[0]), Path(arguments[1]), out)
    limit = next((float(a[8:]) for a in arguments if a.startswith("seconds=")), float("inf"))
    arguments = [a for a in arguments if not a.startswith("seconds=")]
    device, began = torch.device("cuda", 0), time.monotonic()
    speed = probe(device, torch.bfloat16, machine(device))
    torch.cuda.empty_cache()
    result = about() | {"probe_seconds": round(time.monotonic() - began, 2), "speed": to_json(speed), "results": []}
    print(json.dumps(result["speed"]), flush=True)
    timed = [({"case": case}, lambda case=case: time_case(case)) for case in arguments if mode == "time"]
    for facts, call in timed or (choose_cases(arguments, speed) if mode == "choose" else ()):
        if time.monotonic() - began > limit:
            break
        measured = {**facts, **emptied(call)}
        result["results"].append(measured)
        out.write_text(json.dumps(result, indent=1))
        print(json.dumps(measured), f"{time.monotonic() - began:.0f} s so far", flush=True)
    out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
