"""One case of the plan's accuracy: what it is, what it takes, and what the ledger says of it.

A case is SHAPE:PRECISION:TIERS:POLICY:SIZES:RANK:TARGETS:DROPOUT:PACKING[:option=value ...], like
`3b:nf4:streamed:offload:2x2048,1x1024:8:qv:0.1:padded:head=8192`. TIERS is resident, dequantized, streamed or partial
(the first half on the device); POLICY keep, recompute, offload or mixed (the last quarter keeps, the others recompute);
with :host=N the first N layers keep their activations in host memory.
Each size runs one evaluation micro-batch, three optimizer steps, a save of the adapter, another evaluation and two more
steps, as a run does, so that what can be captured is captured twice: gradients in one run of memory, micro-steps
captured where the placement allows it (not with :launched), layers compiled (not with :eager).
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

STEPS, STEPS_AGAIN = 3, 2
OUTSIDE = ("CUDA context", "allocator: rounding and gaps")


def parse(case: str) -> dict[str, Any]:
    """The case's parts by name."""
    names = ("shape", "precision", "tiers", "policy", "sizes", "rank", "targets", "dropout", "packing")
    parts = case.split(":")
    values: dict[str, Any] = dict(zip(names, parts, strict=False))
    values["options"] = dict(option.partition("=")[::2] for option in parts[len(names) :])
    return values


def load(case: str) -> tuple[Any, dict[str, Any]]:
    """The case's model in its placement, and what loading took."""
    import torch

    from bench.shapes import random_checkpoint, shape_config
    from drawplate.model.base.precision import Storage
    from drawplate.model.load.assemble import assemble
    from drawplate.model.placement import Placement
    from drawplate.model.support.targets import lora_config
    from drawplate.recipe import LoraSection

    facts = parse(case)
    options = facts["options"]
    layers = int(options.get("layers", 0)) or shape_config(facts["shape"]).num_hidden_layers
    half = layers // 2
    tiers = {
        "resident": ("device",) * layers,
        "dequantized": ("dequantized",) * layers,
        "streamed": ("host",) * layers,
        "partial": ("device",) * half + ("host",) * (layers - half),
    }[facts["tiers"]]
    torch.manual_seed(0)
    placement = Placement(
        device=torch.device("cuda", torch.cuda.current_device()),
        storage=Storage(facts["precision"]),
        compute_dtype=torch.bfloat16,
        weights=tiers,
        activations=policies_of(facts, layers),
        head_rows=int(options.get("head", 0)),
        embedding=options.get("embedding", "device"),
        compiled="eager" not in options,
        dequantize=options.get("dequantize", "product" if facts["shape"] == "70b" else "layer"),
        graphs="launched" not in options,
        adapter=options.get("adapter", "device"),
    )
    section = LoraSection(
        r=int(facts["rank"]),
        lora_alpha=32,
        target_modules="all-linear" if facts["targets"] == "all" else ["q_proj", "v_proj"],
        lora_dropout=float(facts["dropout"]),
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    checkpoint = random_checkpoint(facts["shape"], layers=layers)
    model = assemble(checkpoint, placement, lambda a: lora_config(section, a, "random", None), seed=0)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    return model, {"seconds": round(time.monotonic() - began, 2), **peaks()}


def policies_of(facts: dict[str, Any], layers: int) -> tuple[str, ...]:
    """What becomes of each layer's activations."""
    kept = {"keep": layers, "mixed": layers // 4}.get(facts["policy"], 0)
    on_host = min(int(facts["options"].get("host", 0)), layers - kept)
    policy = "offload" if facts["policy"] == "offload" else "recompute"
    return ("host",) * on_host + (policy,) * (layers - kept - on_host) + ("keep",) * kept


def batch_of(model: Any, size: str, packing: str) -> Any:
    """Random tokens in rows of one length: a row each, or end to end in one row."""
    from bench.random_models import random_sequences
    from drawplate.data.batches import cut_packed, cut_padded

    rows, length = (int(n) for n in size.split("x"))
    sequences = random_sequences([length] * rows, model.anatomy.config.vocab_size)
    if packing == "packed":
        return cut_packed(sequences, rows * length, 16, 0)[0]
    return cut_padded(sequences, rows, 16, 0)[0]


def run_size(model: Any, size: str, packing: str, tracing: Callable[[], Any] | None = None) -> dict[str, Any]:
    """Evaluation, optimizer steps, evaluation, steps; the peaks of each, and what `tracing` makes is told."""
    import torch

    from drawplate.recipe import TrainSection
    from drawplate.train.loop import make_optimizer

    torch.cuda.empty_cache()
    torch._dynamo.reset()
    batch, found = batch_of(model, size, packing), {}
    parameters = model.adapter.parameters()
    optimizer = make_optimizer(parameters, TrainSection())

    def evaluate() -> float:
        with torch.no_grad():
            return float(model.sum_nats(batch)[0]) / batch.counted_tokens

    def step(number: int) -> float:
        model.adapter.zero_gradients()
        nats = model.add_gradients(batch, scale=1 / batch.counted_tokens, dropout_seed=(0, number))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return float(nats) / batch.counted_tokens

    def evaluate_again() -> float:
        model.forget_graphs()
        return evaluate()

    def checkpoint() -> float:
        with tempfile.TemporaryDirectory() as folder:
            model.adapter.save(Path(folder))
        return 0.0

    steps = {f"step{i}": lambda i=i: step(i) for i in range(STEPS)}
    again = {f"again{i}": lambda i=i: step(STEPS + i) for i in range(STEPS_AGAIN)}
    stages = {"baseline": evaluate} | steps | {"checkpoint": checkpoint, "final": evaluate_again} | again
    trace = tracing() if tracing else None
    for name, stage in stages.items():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        value = stage()
        torch.cuda.synchronize()
        found[name] = {"loss": value, "seconds": round(time.monotonic() - began, 4), **peaks()}
        if trace:
            trace.mark(name)
    if trace:
        found["trace"] = trace.events()
    return found


def peaks() -> dict[str, int]:
    """What the process holds now and held at most, of the device and the host."""
    import torch

    from drawplate.machine.memory import own_device_bytes

    free, total = torch.cuda.mem_get_info()
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "allocated_bytes": torch.cuda.memory_allocated(),
        "reserved_bytes": torch.cuda.memory_reserved(),
        "outside_allocator_bytes": total - free - torch.cuda.memory_reserved(),
        "own_device_bytes": own_device_bytes(torch.device("cuda", torch.cuda.current_device())),
        "host_bytes": resident_bytes("VmRSS"),
        "host_peak_bytes": resident_bytes("VmHWM"),
        "host_locked_bytes": resident_bytes("VmPin"),
    }


def resident_bytes(name: str) -> int:
    """One of the kernel's counts of this process, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)


def shape_of(facts: dict[str, Any]) -> Any:
    """The case's model in numbers."""
    from bench.shapes import shape_config
    from drawplate.model.layer.anatomy import build_anatomy
    from drawplate.recipe import load_recipe
    from drawplate.run.planning import model_shape

    anatomy = build_anatomy(shape_config(facts["shape"], layers=int(facts["options"].get("layers", 0)) or None))
    targets = "all-linear" if facts["targets"] == "all" else ["q_proj", "v_proj"]
    lora = {"r": int(facts["rank"]), "lora_dropout": float(facts["dropout"]), "target_modules": targets}
    return model_shape(
        anatomy, load_recipe({"model": {"name_or_path": "random"}, "data": {"files": ["none"]}, "lora": lora})
    )


def choice_of(facts: dict[str, Any], layers: int) -> Any:
    """The case as the ledger says it."""
    from drawplate.planner.shape import Choice

    options, policies = facts["options"], policies_of(facts, layers)
    rows, length = (int(n) for n in facts["sizes"].split("x"))
    packed = facts["packing"] == "packed"
    return Choice(
        precision=facts["precision"],
        double_quant=True,
        compute_dtype="bfloat16",
        device="cuda",
        dequantized_layers=layers if facts["tiers"] == "dequantized" else 0,
        device_layers={"resident": layers, "partial": layers // 2}.get(facts["tiers"], 0),
        kept_layers=policies.count("keep"),
        host_kept_layers=policies.count("host"),
        policy="offload" if facts["policy"] == "offload" else "recompute",
        micro_batch_tokens=rows * length,
        rows=1 if packed else rows,
        packing=packed,
        documents=rows if packed else 1,
        micro_batches=1,
        head_rows=int(options.get("head", 0)),
        embedding=options.get("embedding", "device"),  # type: ignore[arg-type]
        compiled="eager" not in options,
        dequantize=options.get("dequantize", "product" if facts["shape"] == "70b" else "layer"),  # type: ignore[arg-type]
        dropout=float(facts["dropout"]),
        adapter=options.get("adapter", "device"),  # type: ignore[arg-type]
        launched="launched" in options,
    )


def predict(case: str, around: dict[str, int]) -> dict[str, Any]:
    """The ledger of a case: peaks by phase and place, and the lines of the largest phase."""
    from drawplate.planner.bytes.ledger import ledger
    from drawplate.planner.shape import Surroundings

    facts = parse(case)
    shape = shape_of(facts)
    made = ledger(shape, choice_of(facts, shape.layers), Surroundings(**around))
    return {
        "phases": {
            p.phase: {
                "moment": p.moment,
                "device": p.bytes("device"),
                "alloc": sum(x.bytes for x in p.lines if x.where == "device" and x.name not in OUTSIDE),
                "host": p.bytes("host"),
            }
            for p in made.phases
        },
        "device": made.peak("device"),
        "host": made.peak("host"),
        "lines": {
            where: {line.name: line.bytes for line in made.largest(where).lines if line.where == where}
            for where in ("device", "host")
        },
    }
