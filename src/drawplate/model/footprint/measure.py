"""What a decoder layer's function holds in memory, from running the real layer, alone.

    template layer (transformers' own, with FrozenLinear) -- run once forward and backward --> Footprint: numbers

A **compiled** layer is compiled and run on the GPU that the run will use, with weights of zeros, and its blocks are
those of the allocator's own history (model/footprint/compiled.py). An **uncompiled** one needs no data: it runs on the
meta device (a CPU's on fake tensors) under a mode that sees every storage come and go; exact. Where the GPU is not here
(`drawplate plan --gpu`), the uncompiled layer stands in for the compiled one, which holds less (planner/budget.py).

One run is enough for all sizes: the number of tokens in it is prime, so a tensor grows with the tokens if and only if
its size is a multiple of it.

Left out: the blocks of soft-capped or windowed attention beyond the traced length; without data also what kernels take
for themselves while they run, but for the one that matters: attention's backward (`kernel_lines`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from drawplate.layout.footprint import Footprint, LayerShape, LinearShape, Mode
from drawplate.model.base.precision import PLAIN_DTYPES, Storage
from drawplate.model.footprint.body import measure_outer, stand_in
from drawplate.model.footprint.compiled import bounded, compiled_footprint, remembered, with_whole_weights
from drawplate.model.footprint.passes import uncompiled_footprint
from drawplate.model.footprint.trial import Trial, frozen_layer, unused_of
from drawplate.model.layer import attention
from drawplate.model.layer.anatomy import Anatomy
from drawplate.model.layer.frozen_linear import FrozenLinear
from drawplate.model.layer.functions import kind_of
from drawplate.model.load.fill_layer import trained_shapes
from drawplate.model.support.targets import target_names

TRYING = "Compiling a decoder layer to measure what it holds on this GPU; later plans of this model need not."
NO_ROOM = (
    "There is no room on this GPU to try a compiled layer. Planned for is an uncompiled one, whose activations take up "
    "to 40 % more."
)
Tell = Callable[[str], None]


def unheard(_: str) -> None:
    """Nobody is told."""


PLAIN_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in PLAIN_DTYPES.items()}


def layer_shapes(
    anatomy: Anatomy,
    lora: LoraConfig,
    device: torch.device | None = None,
    tell: Tell = unheard,
    most_bytes: int | None = None,
) -> tuple[tuple[LayerShape, ...], tuple[int, ...]]:
    """The different decoder layers in numbers, and for each layer which of them it is.

    Footprints are measured when they are first asked for, which takes about a second each.

    Args:
        anatomy: of the base model, its linear layers not yet frozen; it is left as it is.
        lora: which linear layers have adapters.
        device: that the run will use, where it is here: compiled layers are tried on a GPU.
        tell: told once, before the first of them is.
        most_bytes: of the device that trying a layer may take; None for all that is free.
    """
    tell = _once(tell)
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
            shapes.append(_layer_shape(Measured(anatomy, i, lora, device, tell, most_bytes), targets))
        of_layer.append(kinds[kind])
    return tuple(shapes), tuple(of_layer)


def _once(tell: Tell) -> Tell:
    """The same sentence to whoever hears it is said once."""
    return functools.cache(tell)


def _layer_shape(measured: Measured, targets: set[str]) -> LayerShape:
    anatomy, index, lora = measured.anatomy, measured.index, measured.lora
    layer, path, footprints = anatomy.layers[index], f"{anatomy.layers_path}.{index}", _Footprints(measured)
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
        footprints=footprints,
        stand_ins=_StandIns(footprints, replace(measured, device=None)) if measured.device else None,
    )


def outer_footprints(anatomy: Anatomy) -> tuple[Mapping[Mode, Footprint], Mapping[Mode, Footprint]]:
    """(opening, closing) of the body, measured when they are first asked for."""
    measured = functools.cache(functools.partial(measure_outer, anatomy))
    return _Footprints(lambda mode: measured(mode)[0]), _Footprints(lambda mode: measured(mode)[1])


class _Footprints(Mapping[Mode, Footprint]):
    """Measured when asked for, each mode once."""

    def __init__(self, measure: Callable[[Mode], Footprint]) -> None:
        self._measure = measure
        self.made: dict[Mode, Footprint] = {}

    def __getitem__(self, mode: Mode) -> Footprint:
        if mode not in self.made:
            self.made[mode] = self._measure(mode)
        return self.made[mode]

    def __iter__(self) -> Iterator[Mode]:
        return iter(self.made)

    def __len__(self) -> int:
        return len(self.made)


class _StandIns(_Footprints):
    """What has been measured so far, and without data what has not."""

    def __init__(self, measured: _Footprints, measure: Callable[[Mode], Footprint]) -> None:
        super().__init__(measure)
        self._measured = measured

    def __getitem__(self, mode: Mode) -> Footprint:
        return self._measured.made.get(mode) or super().__getitem__(mode)


@dataclass(frozen=True)
class Measured:
    """The footprints of one decoder layer.

    Attributes:
        device: that the run will use, None for one that is not here.
        tell: told before a layer is compiled and run there.
        most_bytes: of the device that it may take.
    """

    anatomy: Anatomy
    index: int
    lora: LoraConfig
    device: torch.device | None
    tell: Tell = unheard
    most_bytes: int | None = None

    def __call__(self, mode: Mode) -> Footprint:
        """The layer's footprint, run as `mode` says."""
        attention.register()
        device = self.device if mode.compiled and self.device and self.device.type == mode.device == "cuda" else None
        if device and mode.whole:
            linears = [m for m in self.layer(mode).modules() if isinstance(m, FrozenLinear)]
            size = getattr(torch, mode.compute_dtype).itemsize
            weights = [linear.out_features * linear.in_features * size for linear in linears]
            return with_whole_weights(self(mode._replace(stored="", whole=False)), weights)
        layer = self.layer(mode)
        if device:
            try:
                return remembered(layer, mode, device, lambda: self._tried(layer, mode, device))
            except torch.OutOfMemoryError:
                self.tell(NO_ROOM)
        with FakeTensorMode(allow_non_fake_inputs=True) if mode.device == "cpu" else nullcontext():
            return uncompiled_footprint(self.trial(layer, mode, stand_in(mode)))

    def _tried(self, layer: nn.Module, mode: Mode, device: torch.device) -> Footprint:
        self.tell(TRYING)
        with bounded(device, self.most_bytes):
            return compiled_footprint(self.trial(layer, mode, device), device)

    def layer(self, mode: Mode) -> nn.Module:
        """The layer, as it is run so."""
        storage = Storage(mode.stored or PLAIN_NAMES[mode.compute_dtype])
        # Fills bitsandbytes' caches, with numbers.
        storage.decode(list(storage.encode(torch.zeros(64, 64)).values()), (64, 64), torch.float32)
        return frozen_layer(self.anatomy, self.index, self.lora, storage, again=mode.use == "again")

    def trial(self, layer: nn.Module, mode: Mode, device: torch.device) -> Trial:
        """The layer and what it is called with, on a device."""
        return Trial.of(layer, self.anatomy, self.index, self.lora, mode, device)
