"""Before any weight is read: can this architecture be carried out layer by layer, and streamed?

transformers' own body is walked once on the meta device, with a recorder in place of each decoder layer. It shows what
a configuration does not say: how often each layer is called, what it returns beside hidden states, whether layers hand
one another tensors by a side door (model/support/side_doors.py), whether positions meet in our attention only (an
architecture with an attention of its own would not be causal here, a recurrent one would carry state from one packed
document to the next), whether attention is told the documents' borders, and which linear layers are really called as
modules, so that an adapter on them has an effect.
The walk computes nothing and takes some milliseconds a layer.

The meta device has no values. A body that looks at them is given token ids instead of embeddings, or walked on the CPU
with zeros for everything outside of its linear layers and embeddings. Where that fails too nothing is known of it: its
layers stay on the device with their activations, and documents do not share a row.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_map_only

from drawplate.errors import UsageError
from drawplate.model.layer import attention
from drawplate.model.layer.anatomy import Anatomy
from drawplate.model.layer.frozen_linear import FrozenLinear
from drawplate.model.layer.functions import kind_of
from drawplate.model.support.logits_path import require_known_logits
from drawplate.model.support.side_doors import Watched, shared_by
from drawplate.model.support.unused_products import unused_products
from drawplate.model.support.walk_values import with_values

MARK = "drawplate_walk"
"""An argument that only shows whether what the body is given reaches attention."""
PROBE_SHAPE = (2, 8)
"""Rows and positions of the walk: more than one row, so that a lost dimension shows."""


@dataclass(frozen=True)
class Walk:
    """What one walk through the body has shown.

    Attributes:
        extras: for each layer, how many values it returns after the hidden states; None where it returns a bare tensor.
        obstacle: why layers cannot be streamed or recomputed on their own; empty where they can.
        unpackable: why several documents cannot share a row; empty where they can.
        unused: for each layer, the linear layers that need not be computed again for its backward.
        idle: paths, below the list of layers, of the linear layers that are never called as modules.
    """

    extras: tuple[int | None, ...]
    obstacle: str = ""
    unpackable: str = ""
    unused: tuple[tuple[str, ...], ...] = ()
    idle: tuple[str, ...] = ()


class _Recorder(nn.Module):
    """Stands where a decoder layer stood, and calls it on the meta device.

    What the layer returns is marked as having a gradient, and nothing else of the walk has one: a later layer that is
    given such a tensor beside its hidden states is given it by this one.
    """

    def __init__(self, template: nn.Module, shared: Mapping[str, Any], further: list[Tensor]) -> None:
        super().__init__()
        self.calls, self.side_door, self.needs = 0, "", ""
        self.extras: int | None = None
        self.attended = self.told = False
        self.called_with: tuple[Tensor, tuple[Any, ...], dict[str, Any]] | None = None
        object.__setattr__(self, "_template", template)
        object.__setattr__(self, "_shared", shared)
        object.__setattr__(self, "_further", further)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.called_with = (hidden_states, args, kwargs)
        given = {"its hidden states": hidden_states, **{f"argument {i + 1}": a for i, a in enumerate(args)}, **kwargs}
        if hidden_states.dim() != len(PROBE_SHAPE) + 1:
            raise UsageError(
                f"{type(self._template).__name__} takes hidden states of {hidden_states.dim()} dimensions instead of "
                f"{len(PROBE_SHAPE) + 1}, and Drawplate cannot run such layers one at a time.",
                safe="Nothing was loaded or written.",
                next_step="Choose a model such as Llama, Mistral, Qwen, Gemma, Phi, SmolLM or OLMo.",
            )
        before = Watched(given | self._shared)
        self._look_at(before, hidden_states)
        with attention.watched() as calls, torch.enable_grad():
            out = tree_map_only(Tensor, _marked, self._template(hidden_states, *args, **kwargs))
        self.attended = bool(calls)
        self.told = all(MARK in arguments for arguments in calls)
        if changed := before.changed():
            self.side_door = self.side_door or f"changes {changed}"
        if isinstance(out, tuple):
            self.extras = len(out) - 1
            self._further.extend(x for x in out[1:] if isinstance(x, Tensor))
        return out

    def _look_at(self, given: Watched, hidden_states: Tensor) -> None:
        """Whether an earlier layer has made something of what this one is given beside its hidden states."""
        for name, tensor in given.tensors():
            if any(tensor is made for made in self._further):
                self.needs = self.needs or name
            elif tensor.requires_grad and tensor is not hidden_states:
                self.side_door = self.side_door or f"is given {name}, which an earlier layer has made"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._template, name)


def _marked(made: Tensor) -> Tensor:
    return made.detach().requires_grad_() * 1 if made.is_floating_point() else made


def walk(anatomy: Anatomy) -> Walk:
    """Walk the body once on the meta device. Only frozen linear layers are looked at for adapters.

    Raises:
        UsageError: the architecture cannot be carried out layer by layer; it is named, with the reason.
    """
    name = anatomy.architecture
    templates = list(anatomy.layers)
    experts = next(
        (type(m).__name__ for t in templates for m in t.modules() if type(m).__name__.endswith("Experts")), ""
    )
    if experts:
        raise _refused(name, f"{experts} keeps a mixture of experts in one tensor, which is not supported yet")
    require_known_logits(anatomy)
    recorders, called, unknown = _watched_walk(anatomy, templates)
    if unknown:
        return Walk((None,) * len(templates), unknown, unknown)
    calls = {recorder.calls for recorder in recorders}
    if calls != {1}:
        raise _refused(name, f"its layers are not called once each ({min(calls)} to {max(calls)} times)")
    needs = next((f"layer {i} is given {r.needs}" for i, r in enumerate(recorders) if r.needs), "")
    if needs:
        raise _refused(name, f"{needs}, which an earlier layer returns beside its hidden states")
    _dissolve_groups(templates, called)
    idle = tuple(path for path, _ in _linears(templates) if path not in called)
    if without := sorted({path.rpartition(".")[2] for path, _ in _adapted(templates) if path in idle}):
        raise UsageError(
            f"lora.target_modules: {name} never calls {', '.join(without)} as a layer, so an adapter there has no "
            "effect.",
            safe="Nothing was loaded or written.",
            next_step="Name other layers in lora.target_modules.",
        )
    unpackable = _unpackable(name, templates, recorders)
    side_door = next((f"layer {i} {r.side_door}" for i, r in enumerate(recorders) if r.side_door), "")
    extras = tuple(recorder.extras for recorder in recorders)
    obstacle = side_door or _shared_tensors(templates)
    return Walk(extras, obstacle, unpackable, () if obstacle else _unused(templates, recorders), idle)


_walks: weakref.WeakKeyDictionary[nn.Module, Walk] = weakref.WeakKeyDictionary()


def walked(anatomy: Anatomy) -> Walk:
    """What one walk through the body has shown, remembered."""
    if anatomy.body not in _walks:
        with unset_fake_temporarily():
            _walks[anatomy.body] = walk(anatomy)
    return _walks[anatomy.body]


def _watched_walk(anatomy: Anatomy, templates: Sequence[nn.Module]) -> tuple[list[_Recorder], dict[str, Tensor], str]:
    """(each layer's recorder, the linear layers that were called, why nothing is known of the body).

    Raises:
        UsageError: the body does not run without the layers around it.
    """
    shared, why = shared_by(templates), ""
    ways: tuple[tuple[str, str], ...] = (("inputs_embeds", "meta"), ("input_ids", "meta"))
    for given, device in (*ways, ("inputs_embeds", "cpu"), ("input_ids", "cpu")):
        further: list[Tensor] = []
        recorders = [_Recorder(template, shared, further) for template in templates]
        values: AbstractContextManager[None] = with_values(anatomy.body) if device == "cpu" else nullcontext()
        try:
            with values, _in_place_of(anatomy.layers, recorders), _counting_calls(templates) as called:
                anatomy.body(**_walk_inputs(anatomy, given, device))
            return recorders, called, ""
        except UsageError:
            raise
        except Exception as error:  # whatever an architecture's own code may raise
            if not why and not _needs_values(error):
                why = f"its body fails without the layers around it ({_first_line(error)})"
                raise _refused(anatomy.architecture, why) from None
            why = why or f"its body looks at values before they are there ({_first_line(error)})"
    return [], {}, why


def _walk_inputs(anatomy: Anatomy, given: str, device: str) -> dict[str, Any]:
    """What the body is called with: embeddings as model/causal_lm.py gives them, or ids."""
    positions = torch.arange(PROBE_SHAPE[1], device=device).expand(PROBE_SHAPE)
    made = {
        "inputs_embeds": lambda: torch.zeros(*PROBE_SHAPE, anatomy.config.hidden_size, device=device),
        "input_ids": lambda: torch.ones(PROBE_SHAPE, dtype=torch.long, device=device),
    }
    inputs = {given: made[given](), "position_ids": positions, "use_cache": False, "return_dict": True}
    if given == "inputs_embeds" and anatomy.inputs_by_layer:
        inputs["per_layer_inputs"] = torch.zeros(*PROBE_SHAPE, *anatomy.inputs_by_layer, device=device)
    takes_more = any(p.kind is p.VAR_KEYWORD for p in signature(anatomy.body.forward).parameters.values())
    return inputs | ({MARK: True} if takes_more else {})


def _unused(templates: Sequence[nn.Module], recorders: Sequence[_Recorder]) -> tuple[tuple[str, ...], ...]:
    """What each layer's backward can do without, which the frozen linear layers are told."""
    found: dict[str, tuple[str, ...]] = {}
    kinds = [kind_of(template) for template in templates]
    for kind, template, recorder in zip(kinds, templates, recorders, strict=True):
        if kind not in found:
            assert recorder.called_with is not None
            hidden, args, kwargs = recorder.called_with
            try:
                found[kind] = unused_products(template, hidden, args, kwargs)
            except Exception:  # an architecture's own code may not be differentiable on the meta device
                found[kind] = ()
    for kind, template in zip(kinds, templates, strict=True):
        for path, module in template.named_modules():
            if isinstance(module, FrozenLinear):
                module.computed_again = path not in found[kind]
    return tuple(found[kind] for kind in kinds)


def _dissolve_groups(templates: Sequence[nn.Module], called: Mapping[str, Tensor]) -> None:
    """Linear layers of a group that were called with different tensors are computed each by itself."""
    for i, template in enumerate(templates):
        linears = [(f"{i}.{path}", m) for path, m in template.named_modules() if isinstance(m, FrozenLinear)]
        for group in {id(m.group): m.group for _, m in linears if m.group is not None}.values():
            inputs = {id(called.get(path)) for path, m in linears if m.group is group}
            if len(inputs) > 1:
                group.dissolve()


def _unpackable(name: str, templates: Sequence[nn.Module], recorders: Sequence[_Recorder]) -> str:
    """Why documents of one row would mix, empty where they would not."""
    for i, (template, recorder) in enumerate(zip(templates, recorders, strict=True)):
        if recorder.attended and not any(isinstance(module, nn.Conv1d) for module in template.modules()):
            continue
        if recorder.attended:
            return f"layer {i} mixes neighbouring positions in a convolution beside its attention"
        kinds = [type(module).__name__ for module in template.modules()]
        own = next((kind for kind in kinds if "Attention" in kind and "Linear" not in kind), None)
        if own is not None:
            raise _refused(name, f"{own} computes attention in a way of its own, whose mask would be lost")
        return f"layer {i} ({kinds[0]}) carries state from one position to the next"
    untold = next((i for i, recorder in enumerate(recorders) if not recorder.told), None)
    return "" if untold is None else f"layer {untold} does not tell its attention where documents begin"


def require_practical(anatomy: Anatomy) -> None:
    """Refuse what would be right, but takes minutes to plan or a thousand times the memory.

    Raises:
        UsageError: the architecture is named, with the reason.
    """
    config, why = anatomy.config, ""
    if config.model_type in ("mamba", "falcon_mamba"):
        why = "transformers computes its state one token at a time, which takes minutes where others take seconds"
    if anatomy.home.kind is not type(anatomy.skeleton) and anatomy.logit_scale != 1:
        why = f"{anatomy.home.kind.__name__}, which the checkpoint names, does not scale logits as its text model does"
    if config.model_type == "youtu":
        why = "its numbers here are not those of transformers yet (bench/families.py)"
    if why:
        raise _refused(anatomy.architecture, why)


def require_streamable(anatomy: Anatomy, found: Walk, tiers: Sequence[str], policies: Sequence[str]) -> None:
    """Refuse to stream or recompute layers that are not on their own.

    Raises:
        UsageError: the placement streams or recomputes, and the walk has found an obstacle.
    """
    if not found.obstacle or (set(tiers) <= {"device", "dequantized"} and set(policies) == {"keep"}):
        return
    name = anatomy.architecture
    raise UsageError(
        f"{name} can be trained on the device, but its layers can be neither streamed nor recomputed one by one: "
        f"{found.obstacle}.",
        safe="Nothing was loaded or written.",
        next_step="Set memory.weights: device and memory.activations: keep.",
    )


def _refused(name: str, why: str) -> UsageError:
    return UsageError(
        f"{name} cannot be carried out layer by layer: {why}.",
        safe="Nothing was loaded or written.",
        next_step="Choose a model such as Llama, Mistral, Qwen, Gemma, Phi, SmolLM or OLMo.",
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"


def _needs_values(error: Exception) -> bool:
    """Whether the code looked at values, which meta tensors do not have."""
    text = str(error).lower()
    return isinstance(error, (RuntimeError, NotImplementedError)) and ("meta" in text or "data-dependent" in text)


def _shared_tensors(templates: Sequence[nn.Module]) -> str:
    seen: dict[int, int] = {}
    for i, template in enumerate(templates):
        for name, parameter in template.named_parameters():
            if seen.setdefault(id(parameter), i) != i:
                return f"layers {seen[id(parameter)]} and {i} share {name}"
    return ""


def _linears(templates: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Frozen or not, with their paths below the list of layers."""
    for i, template in enumerate(templates):
        for path, module in template.named_modules():
            if isinstance(module, (nn.Linear, FrozenLinear)):
                yield f"{i}.{path}", module


def _adapted(templates: Sequence[nn.Module]) -> Iterator[tuple[str, FrozenLinear]]:
    for i, template in enumerate(templates):
        for path, module in template.named_modules():
            if isinstance(module, FrozenLinear) and module.rank:
                yield f"{i}.{path}", module


@contextmanager
def _in_place_of(layers: nn.ModuleList, recorders: Sequence[nn.Module]) -> Iterator[None]:
    originals = list(layers)
    for i, recorder in enumerate(recorders):
        layers[i] = recorder
    try:
        yield
    finally:
        for i, original in enumerate(originals):
            layers[i] = original


@contextmanager
def _counting_calls(templates: Sequence[nn.Module]) -> Iterator[dict[str, Tensor]]:
    """The linear layers that are called, each with its last input; they give tensors of the right shape."""
    called: dict[str, Tensor] = {}
    names: dict[nn.Module, list[str]] = {}
    for name, module in _linears(templates):
        names.setdefault(module, []).append(name)
    before = [(module, vars(module).get("forward")) for module in names]
    for module, own_names in names.items():
        object.__setattr__(module, "forward", _shape_of_output(own_names, module, called))
    try:
        yield called
    finally:
        for module, own in before:
            if own is None:
                object.__delattr__(module, "forward")
            else:
                object.__setattr__(module, "forward", own)


def _shape_of_output(names: Sequence[str], module: Any, called: dict[str, Tensor]) -> Any:
    def forward(x: Tensor) -> Tensor:
        called.update(dict.fromkeys(names, x))
        return x.new_zeros((*x.shape[:-1], module.out_features))

    return forward
