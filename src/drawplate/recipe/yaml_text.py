"""YAML as a recipe means it: words stay words, and a key that is given twice is an error.

YAML 1.1 reads `no` as False, `0123456` as an octal number and `2024-01-01` as a date. In a recipe these are a column's
name, a commit and a branch. Only `true` and `false` are truth values here, and only decimal and hexadecimal numbers
are numbers; the type of a key decides what its text becomes (values.py).
"""

from __future__ import annotations

import re
from typing import Any

import yaml


class RepeatedKey(Exception):
    """A mapping gives a key more than once; the text names each such key with its lines."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with fewer surprises."""


_OWN = ("bool", "int", "timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] not in _OWN]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)\Z"), list("-+0123456789")
)


def read_yaml(text: str) -> Any:
    """The one value that a YAML text holds.

    Raises:
        RepeatedKey: a key is given twice.
        yaml.YAMLError: it is not YAML.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if repeated := list(_repeated(node, "", set())):
            raise RepeatedKey("; ".join(repeated))
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    finally:
        loader.dispose()


def _repeated(node: yaml.Node, path: str, seen: set[int]) -> Any:
    """`lora.r is given twice, in lines 5 and 9` for each key that is."""
    if id(node) in seen or isinstance(node, yaml.ScalarNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _repeated(child, path, seen)
        return
    lines: dict[str, list[int]] = {}
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            lines.setdefault(key.value, []).append(key.start_mark.line + 1)
            yield from _repeated(value, f"{path}{key.value}.", seen)
    for key, found in lines.items():
        if len(found) > 1 and key != "<<":
            yield f"{path}{key} is given {_times(len(found))}, in {_places(found)}"


def _times(count: int) -> str:
    return "twice" if count == 2 else f"{count} times"


def _places(lines: list[int]) -> str:
    if len(set(lines)) == 1:
        return f"line {lines[0]}"
    return f"lines {', '.join(map(str, lines[:-1]))} and {lines[-1]}"
