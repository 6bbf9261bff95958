"""What a compiled decoder layer holds: it is compiled, run on the device, and its allocator's history is read.

Measured once and kept on the disk: for a layer of these shapes on this GPU, with these versions of torch, Triton,
transformers and of the files here that run a layer. What the compiler makes of it differs between its versions.
"""

from __future__ import annotations

import functools
import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pydantic
import torch
import transformers
from torch import nn

from drawplate.durable import write_whole
from drawplate.layout.footprint import TRIAL, Footprint, Line, Mode, Trace
from drawplate.machine.caches import FOOTPRINTS_NAME
from drawplate.model.footprint.allocator_events import RealWatch
from drawplate.model.footprint.passes import inference_pass, training_pass
from drawplate.model.footprint.recorder import TRACED_BORDERS, TRACED_TOKENS, Recorder, Sizes
from drawplate.model.footprint.trial import Trial
from drawplate.model.layer.frozen_linear import FrozenLinear
from drawplate.model.layer.functions import compiled_functions, kind_of
from drawplate.recipe import cache_folder

RUN_BY = ("layout", "kernels", "model/layer", "model/footprint")
"""The folders whose files decide what a layer does to memory."""


def compiled_footprint(trial: Trial, device: torch.device) -> Footprint:
    """Compiled and run on the device, which takes some seconds.

    It runs twice. The first time the compiler tries its kernels; by how much more it holds then is kept with the traces
    of the second (`TRIAL`)."""
    _warm(trial)
    (function,), sizes = compiled_functions([trial.layer]), _sizes_of(trial)

    def once() -> Footprint:
        watch = RealWatch(Recorder(), device, sizes)
        if trial.mode.use == "inference":
            return Footprint(inference=inference_pass(trial, function, watch), keys=trial.dropout_keys)
        return training_pass(trial, function, watch)

    first, second = once(), once()
    return replace(
        second,
        inference=with_trial(second.inference, first.inference, device),
        forward=with_trial(second.forward, first.forward, device),
        backward=with_trial(second.backward, first.backward, device),
    )


@contextmanager
def bounded(device: torch.device, most_bytes: int | None) -> Iterator[None]:
    """Within, torch's allocator holds no more than that of a GPU; what it cached for reuse goes back at the end."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (most_bytes or total) / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        gc.collect()
        torch.cuda.empty_cache()


def with_whole_weights(footprint: Footprint, weights: Sequence[int]) -> Footprint:
    """The footprint of a layer whose weights are dequantized before it is called, from one that comes dequantized.

    They are let go of when its function has returned, or autograd has used them.

    Args:
        footprint: of the layer in its compute dtype, not kept.
        weights: bytes of each dequantized weight.
    """
    come: Trace = tuple((f"w{i}", Line(size, 0)) for i, size in enumerate(weights))
    go: Trace = tuple((name, None) for name, _ in come)
    if footprint.inference:
        return replace(footprint, inference=(*come, *footprint.inference, *go))
    return replace(footprint, forward=(*come, *footprint.forward), backward=(*footprint.backward, *go))


def with_trial(trace: Trace, first: Trace, device: torch.device) -> Trace:
    """A trace with what its first run held beyond it, as a block named TRIAL at its highest moment.

    A block of the size of the device's L2 cache, which the compiler clears between runs of a kernel, does not grow with
    the tokens; the rest are copies of what a kernel writes in place.
    """
    (_, most_first), (at, most) = highest(first), highest(trace)
    more = most_first - most
    if more <= 0:
        return trace
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    line = Line(min(more, cache), max(0, more - cache) / TRACED_TOKENS)
    return (*trace[: at + 1], (TRIAL, line), (TRIAL, None), *trace[at + 1 :])


def highest(trace: Trace) -> tuple[int, int]:
    """(which event has the most bytes held after it, those bytes), of the traced size; what goes without having come
    was there before."""
    held, best, sizes = 0, (-1, 0), dict[str, int]()
    for i, (name, line) in enumerate(trace):
        if line is not None:
            sizes[name] = line.bytes(TRACED_TOKENS, TRACED_BORDERS - 1)
        held += sizes[name] if line is not None else -sizes.pop(name, 0)
        best = max(best, (i, held), key=lambda found: found[1])
    return best


def _warm(trial: Trial) -> None:
    """Each thread that multiplies takes a workspace, which it keeps: before anything is recorded."""
    square = torch.zeros(64, 64, dtype=trial.hidden.dtype, device=trial.hidden.device, requires_grad=True)
    (square @ square).sum().backward()


def _sizes_of(trial: Trial) -> Sizes:
    """Weights, as they are stored and in every width in which they may be computed with, do not grow."""
    linears = [module for module in trial.layer.modules() if isinstance(module, FrozenLinear)]
    counts = [linear.out_features * linear.in_features for linear in linears]
    counts += [tensor.numel() for tensor in trial.trained.values()]
    return Sizes(frozenset(count * width for count in counts for width in (1, 2, 4)))


def remembered(layer: nn.Module, mode: Mode, device: torch.device, measure: Callable[[], Footprint]) -> Footprint:
    """A layer's footprint from the disk, or measured and kept there.

    Args:
        layer: frozen, as it will be run.
        mode: how.
        device: a GPU that is here.
        measure: it, now.
    """
    facts = (torch.__version__, transformers.__version__, _sources())
    facts += (torch.cuda.get_device_name(device), tuple(mode), kind_of(layer))  # type: ignore[assignment]
    path = cache_folder() / FOOTPRINTS_NAME / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:24]}.json"
    kept = pydantic.TypeAdapter(Footprint)
    with suppress(OSError, ValueError):
        return kept.validate_json(path.read_bytes())
    found = measure()
    torch._dynamo.reset()  # what it compiled is on the disk; here it would only take room
    with suppress(OSError):  # without it the layer is measured again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, kept.dump_json(found).decode())
    return found


@functools.cache
def _sources() -> str:
    """Of the files that decide what a layer does to memory, one hash."""
    root, found = Path(__file__).parents[2], hashlib.sha256()
    for file in sorted(path for folder in RUN_BY for path in (root / folder).glob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()
