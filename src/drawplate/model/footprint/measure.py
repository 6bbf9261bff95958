"""What a decoder layer's function holds in memory, from running the real layer without data.

    template layer (transformers' own, with FrozenLinear) -- shapes only, no data --> Footprint: numbers

As the layer will be run. **Eager** (here): the layer runs on tensors without data, forward and backward, under a mode
that sees every storage come and go; exact. **Compiled** (model/footprint/compiled.py): by the compiler's own graphs.

A GPU is stood in for by the meta device, so that planning for one needs none; a CPU by fake tensors. One run is enough
for all sizes: the number of tokens in it is prime, so a tensor grows with the tokens if and only if its size is a
multiple of it.

Left out: the blocks of soft-capped or windowed attention beyond the traced length, and what kernels take for themselves
while they run, but for the one that matters: attention's backward (`kernel_lines`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils import _pytree as pytree

from drawplate.layout.footprint import INPUT, Footprint, LayerShape, LinearShape, Mode
from drawplate.model.base.precision import PLAIN_DTYPES, Storage
from drawplate.model.footprint.body import measure_outer
from drawplate.model.footprint.compiled import Graphs, compiled_footprint
from drawplate.model.footprint.recorder import Recorder, Watch
from drawplate.model.footprint.trial import Trial, frozen_layer, unused_of
from drawplate.model.layer import attention
from drawplate.model.layer.anatomy import Anatomy
from drawplate.model.layer.frozen_linear import FrozenLinear
from drawplate.model.layer.functions import kind_of
from drawplate.model.load.fill_layer import trained_shapes
from drawplate.model.support.targets import target_names

PLAIN_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in PLAIN_DTYPES.items()}


def layer_shapes(anatomy: Anatomy, lora: LoraConfig) -> tuple[tuple[LayerShape, ...], tuple[int, ...]]:
    """The different decoder layers in numbers, and for each layer which of them it is.

    Footprints are measured when they are first asked for, which takes about a second each.

    Args:
        anatomy: of the base model, its linear layers not yet frozen; it is left as it is.
        lora: which linear layers have adapters.
    """
    targets = target_names(lora, anatomy)
    kinds: dict[str, int] = {}
    shapes: list[LayerShape] = []
    of_layer = []
    for i, layer in enumerate(anatomy.layers):
        path = f"{anatomy.layers_path}.{i}."
        adapted = sorted(name.removeprefix(path) for name in targets if name.startswith(path))
        kind = f"{kind_of(layer)}\n{adapted}"
        if kind not in kinds:
            kinds[kind] = len(shapes)
            shapes.append(_layer_shape(anatomy, i, lora, targets))
        of_layer.append(kinds[kind])
    return tuple(shapes), tuple(of_layer)


def _layer_shape(anatomy: Anatomy, index: int, lora: LoraConfig, targets: set[str]) -> LayerShape:
    layer, path = anatomy.layers[index], f"{anatomy.layers_path}.{index}"
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    weights = {id(module.weight) for module in linears.values()}
    others = [*layer.parameters(), *layer.buffers()]
    trained = trained_shapes(frozen_layer(anatomy, index, lora, Storage("bf16")), lora)
    return LayerShape(
        linears=tuple(
            LinearShape(
                out_features=module.out_features,
                in_features=module.in_features,
                rank=lora.r if f"{path}.{name}" in targets else 0,
                again=name not in unused_of(anatomy, index),
            )
            for name, module in linears.items()
        ),
        plain=tuple(tensor.numel() for tensor in others if id(tensor) not in weights),
        trained=tuple(torch.Size(shape).numel() for shape in trained.values()),
        footprints=_Footprints(Measured(anatomy, index, lora)),
    )


def outer_footprints(anatomy: Anatomy) -> tuple[Mapping[Mode, Footprint], Mapping[Mode, Footprint]]:
    """(opening, closing) of the body, measured when they are first asked for."""
    measured = functools.cache(functools.partial(measure_outer, anatomy))
    return _Footprints(lambda mode: measured(mode)[0]), _Footprints(lambda mode: measured(mode)[1])


class _Footprints(Mapping[Mode, Footprint]):
    """Measured when asked for, each mode once."""

    def __init__(self, measure: Callable[[Mode], Footprint]) -> None:
        self._measure = functools.cache(measure)

    def __getitem__(self, mode: Mode) -> Footprint:
        return self._measure(mode)

    def __iter__(self) -> Iterator[Mode]:
        return iter(())

    def __len__(self) -> int:
        return 0


@dataclass
class Measured:
    """The footprints of one decoder layer."""

    anatomy: Anatomy
    index: int
    lora: LoraConfig
    _graphs: dict[Mode, Graphs] = field(default_factory=dict)

    def __call__(self, mode: Mode) -> Footprint:
        """The layer's footprint, run as `mode` says."""
        attention.register()
        with FakeTensorMode(allow_non_fake_inputs=True) if mode.device == "cpu" else nullcontext():
            trial = self._trial(mode)
            found = compiled_footprint(trial, self._graphs_of(mode)) if mode.compiled else _eager_footprint(trial)
        return replace(found, keys=len(trial.keys) if mode.dropout else 0)

    def _graphs_of(self, mode: Mode) -> Graphs:
        """Once dequantized, a layer is computed as one that was never quantized; and where its products dequantize,
        int8's are those of nf4 with other scratch."""
        like = mode._replace(stored="", whole=False) if mode.whole else mode
        if like.stored in ("int8", "fp4"):
            like = like._replace(stored="nf4")
        if like not in self._graphs:
            self._graphs[like] = Graphs.of(self._trial(like))
        return self._graphs[like]

    def _trial(self, mode: Mode) -> Trial:
        storage = Storage(mode.stored or PLAIN_NAMES[mode.compute_dtype])
        layer = frozen_layer(self.anatomy, self.index, self.lora, storage)
        with unset_fake_temporarily():  # fills bitsandbytes' caches, with numbers
            storage.decode(list(storage.encode(torch.zeros(64, 64)).values()), (64, 64), torch.float32)
        return Trial.of(layer, self.anatomy, self.index, self.lora, mode)


def _eager_footprint(trial: Trial) -> Footprint:
    """Run it, forward and backward, and see."""
    found = _eager_pass(trial)
    for path, module in trial.layer.named_modules():
        if isinstance(module, FrozenLinear):
            module.output_used = path not in trial.unused
    return replace(found, again=_eager_pass(trial, again=True))


def _eager_pass(trial: Trial, *, again: bool = False) -> Footprint:
    """With `again` its output is let go of before its backward."""
    known = [*trial.tensors.values(), *_tensors(trial.arguments)]
    inference = Recorder()
    with torch.no_grad(), Watch(inference, [*known, trial.hidden]) as watch:
        out = trial.run(trial.hidden)
        names = {watch.name_of(out): "out"}
        made = inference.cut(0, None, names)
    recorder, trained = Recorder(), [tensor.requires_grad_() for tensor in trial.trained.values()]
    grad_out = torch.empty_like(trial.hidden)
    with Watch(recorder, [*known, grad_out]) as watch:
        leaf = torch.empty_like(trial.hidden).requires_grad_()
        hidden = leaf * 1  # not a leaf: those are kept by autograd itself
        name, edge = watch.name_of(hidden), get_gradient_edge(hidden)
        of_input, saved = {watch.name_of(leaf), name}, dict[str, None]()

        def see(tensor: Tensor) -> Tensor:
            saved[watch.name_of(tensor)] = None
            return tensor

        with saved_tensors_hooks(see, lambda tensor: tensor):
            out = trial.run(hidden)
        del hidden
        names = {watch.name_of(out): "out"}
        end = get_gradient_edge(out)
        if again:
            del out
        turn = len(recorder.events)
        # A module that its layer never calls leaves its adapter unused.
        grad_in, *gradients = torch.autograd.grad(end, [edge, *trained], grad_out, allow_unused=True)  # type: ignore[arg-type]
        names |= {watch.name_of(g): f"grad:{i}" for i, g in enumerate(gradients) if g is not None}
        names[watch.name_of(grad_in)] = "grad_in"
        events = recorder.cut(0, None, names)
    kept = name not in {block for block, line in recorder.events[:turn] if line is None}
    beside = [event for event in events if event[0] not in of_input]
    ahead = sum(block not in of_input for block, _ in events[:turn])
    return Footprint(
        inference=made,
        forward=tuple(beside[:ahead]),
        backward=tuple(beside[ahead:]),
        keeps_input=kept,
        saved=tuple(INPUT if block == name else names.get(block, block) for block in saved if block),
    )


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
