"""What passes from one decoder layer to another beside the hidden states.

A layer that is recomputed, or whose weights come and go, must be a function of what it is given. It is not where it
writes into something that another layer reads (an argument that all layers get, an object that two layers hold), or
where it is given a tensor that an earlier layer made: recomputing it would lose that tensor's gradient, and the loss
would still be right. So each call of a layer is watched: everything reachable from its arguments, and everything that
more than one layer can reach, is looked at before and after it, by identity and, for tensors, by version.

Left out: what hides in a closure, in a module's global variables, or in the fields of an object that is written in C.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from torch import Tensor, nn

DEEPEST = 12
"""Containers within containers; what lies deeper is not looked at."""
_CONSTANTS = (str, bytes, int, float, complex, bool, type(None))
_CODE = (types.ModuleType, types.FunctionType, types.MethodType)
_MACHINERY = frozenset(vars(nn.Module()))


class Watched:
    """What some objects, and all that they hold, look like now.

    Args:
        roots: by the names under which they are told.
    """

    def __init__(self, roots: Mapping[str, Any]) -> None:
        # The objects are held, so that no other can get an identity that was seen here.
        self._objects = {key: (name, thing) for key, name, thing in _reachable(roots)}
        self._faces = {key: _face(thing) for key, (_, thing) in self._objects.items()}

    def changed(self) -> str:
        """The name of one of them that looks different now; empty where none does."""
        for key, (name, thing) in self._objects.items():
            if not _same(self._faces[key], _face(thing)):
                return name
        return ""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Those among them that are tensors, by name."""
        for name, thing in self._objects.values():
            if isinstance(thing, Tensor):
                yield name, thing


def shared_by(layers: Sequence[nn.Module]) -> dict[str, Any]:
    """What more than one of these layers can reach and change, by name: modules, containers, objects, classes."""
    reached: dict[int, int] = {}
    shared: dict[str, Any] = {}
    for i, layer in enumerate(layers):
        for key, name, thing in _reachable({f"layer {i}": layer}):
            if reached.setdefault(key, i) != i and not isinstance(thing, Tensor):
                shared[name.partition(".")[2] or name] = _Alone(thing)
    own = {kind for layer in layers for module in layer.modules() for kind in type(module).__mro__}
    return shared | {
        kind.__name__: _Alone(kind) for kind in own if not kind.__module__.startswith(("torch", "builtins"))
    }


class _Alone:
    """An object by itself, without what its parts hold."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing


def _reachable(roots: Mapping[str, Any]) -> Iterator[tuple[int, str, Any]]:
    """(identity, name, object) of everything that the roots hold, each once."""
    seen: set[int] = set()
    waiting = [(name, thing, 0) for name, thing in reversed(list(roots.items()))]
    while waiting:
        name, thing, depth = waiting.pop()
        if id(thing) in seen or isinstance(thing, (*_CONSTANTS, *_CODE)):
            continue
        seen.add(id(thing))
        yield id(thing), name, thing
        if depth < DEEPEST and not isinstance(thing, (Tensor, _Alone, type)):
            waiting += [(f"{name}{step}", part, depth + 1) for step, part in _parts(thing)]


def _parts(thing: Any) -> list[tuple[str, Any]]:
    """What an object holds: (how it is reached, the part)."""
    if isinstance(thing, nn.Module):
        held = {**thing._parameters, **thing._buffers, **thing._modules}
        own = {name: part for name, part in vars(thing).items() if name not in _MACHINERY}
        return [(f".{name}", part) for name, part in (held | own).items()]
    parts: list[tuple[str, Any]] = []
    if isinstance(thing, Mapping):
        parts += [(f"[{key!r}]", thing[key]) for key in list(thing)]
    elif isinstance(thing, (Sequence, Set)):
        parts += [(f"[{i}]", part) for i, part in enumerate(thing)]
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ()) if hasattr(thing, name)]
    named = {**{name: getattr(thing, name) for name in slots}, **(getattr(thing, "__dict__", None) or {})}
    return parts + [(f".{name}", part) for name, part in named.items() if not name.startswith("__")]


def _face(thing: Any) -> tuple[Any, ...]:
    """What an object is now: a tensor's version, anything else by what it holds."""
    if isinstance(thing, Tensor):
        return (thing._version,)
    parts = _parts(thing.thing if isinstance(thing, _Alone) else thing)
    return tuple((step, part, part._version if isinstance(part, Tensor) else 0) for step, part in parts)


def _same(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    if len(before) != len(now) or not before or not isinstance(before[0], tuple):
        return before == now
    return all(
        a[0] == b[0] and a[2] == b[2] and (a[1] is b[1] or _equal_constants(a[1], b[1]))
        for a, b in zip(before, now, strict=True)
    )


def _equal_constants(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, _CONSTANTS) and bool(a == b)
