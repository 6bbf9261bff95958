"""A recipe from a file or a mapping, and what is said of one that cannot be meant.

Unknown keys are refused with the nearest known one, or with where a key of another library leads; a value that cannot
be is named with its key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from drawplate.errors import UsageError
from drawplate.recipe.elsewhere import lead
from drawplate.recipe.sections import Recipe, Section
from drawplate.recipe.yaml_text import RepeatedKey, read_yaml

_NOTHING = "Nothing was loaded or written."


def load_recipe(source: str | Path | dict[str, Any], overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A recipe from a YAML file or a mapping, with `section.key=value` overrides applied on top.

    Raises:
        UsageError: the file is missing or not YAML, a key is unknown (the nearest known one is named), or a value
            cannot be meant.
    """
    values = source if isinstance(source, dict) else _read_file(source)
    values = {key: dict(part) if isinstance(part, dict) else part for key, part in values.items()}
    for override in overrides:
        _apply_override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        where = "the recipe" if isinstance(source, dict) else str(source)
        raise UsageError(
            f"{where}: " + _explain(error.errors()),
            safe=_NOTHING,
            next_step="Change that in the recipe; `drawplate recipe` lists every key with its meaning.",
        ) from None


def _read_file(source: str | Path) -> dict[str, Any]:
    if source == "":
        raise UsageError("The recipe's path is empty.", safe=_NOTHING, next_step="Name a recipe file.")
    path = Path(source)
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"The recipe {path} cannot be read: {error.strerror}.",
            safe=_NOTHING,
            next_step="Name a recipe file, for example examples/climate-demo.yaml.",
        ) from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not a text.", safe=_NOTHING, next_step="Name a recipe file.") from None
    except RepeatedKey as error:
        raise UsageError(
            f"{path}: {error}.", safe=_NOTHING, next_step="Keep one of them; put the keys of one section together."
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place, why = (f"line {mark.line + 1}: " if mark else ""), getattr(error, "problem", None) or error
        raise UsageError(f"{path} is not YAML: {place}{why}.", safe=_NOTHING, next_step="Change that line.") from None
    if not isinstance(values, dict):
        raise UsageError(
            f"{path} contains no settings.", safe=_NOTHING, next_step="Start from examples/climate-demo.yaml."
        )
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, _, text = override.partition("=")
    if not text.strip() or not path.strip():
        raise UsageError(
            f"--set {override} has no value.",
            safe=_NOTHING,
            next_step="Write --set section.key=value; null leaves a key open. Is a variable of the shell not set?",
        )
    section, _, key = path.strip().rpartition(".")
    try:
        value = read_yaml(text)
    except RepeatedKey as error:
        raise UsageError(f"--set {override}: {error}.", safe=_NOTHING, next_step="Keep one of them.") from None
    except (yaml.YAMLError, ValueError):
        value = text
    if isinstance(value, str) and " #" in text and not text.lstrip().startswith(("'", '"')):
        value = text.strip()  # to YAML a comment; on a command line nobody writes one
    if not section:
        values[key] = value
        return
    part = values.setdefault(section, {})
    if not isinstance(part, dict):
        raise UsageError(
            f"--set {override}: {section} is not a section.", safe=_NOTHING, next_step=_known_keys_hint(section)
        )
    part[key] = value


def known_keys() -> dict[str, str]:
    """Every key of a recipe in dotted form, with its description."""
    keys: dict[str, str] = {}
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            for inner, inner_field in section.model_fields.items():
                keys[f"{name}.{inner}"] = inner_field.description or ""
        else:
            keys[name] = field.description or ""
    return keys


def _known_keys_hint(wrong: str) -> str:
    keys = list(known_keys())
    sections = sorted({key.split(".")[0] for key in keys})
    leaf = wrong.rpartition(".")[2]
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(keys)}
    likely = [(sections, wrong), (keys, wrong)] if "." not in wrong else [(keys, wrong), (sections, wrong)]
    for candidates, name in (*likely, (list(by_leaf), leaf)):
        near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
        if near:
            return f"did you mean {by_leaf.get(near[0], near[0])}?"
    return f"known sections are {', '.join(sections)}"


def _explain(problems: Iterable[Any]) -> str:
    """A clause for each key, in however many ways it is wrong."""
    words = {word for key in known_keys() for word in key.split(".")}
    by_key: dict[str, list[Any]] = {}
    for problem in problems:
        unknown = problem["type"] in ("extra_forbidden", "missing")
        parts = [str(part) for part in problem["loc"] if unknown or part in words]
        by_key.setdefault(".".join(parts), []).append(problem)
    return "; ".join(_explain_key(key, found) for key, found in by_key.items())


def _explain_key(key: str, problems: list[Any]) -> str:
    kind, given = problems[0]["type"], problems[0]["input"]
    if kind == "extra_forbidden":
        elsewhere = lead(key)
        return f"there is no key {key}: {elsewhere}" if elsewhere else f"unknown key {key}, {_known_keys_hint(key)}"
    if kind == "missing":
        return f"{key} is missing"
    if given is None:
        return f"{key} has no value"
    if kind in ("model_type", "dict_type") and key in Recipe.model_fields:
        first_key = next(name for name in known_keys() if name.startswith(f"{key}."))
        return f"{key} is a section with keys of its own, such as {first_key}, and no value (got {given!r})"
    first, *others = [str(problem["msg"]).removeprefix("Value error, ") for problem in problems]
    message = " or ".join([first, *(other.removeprefix("Input should be ") for other in others)])
    if isinstance(given, dict):  # keys of a section disagree, and the message names them
        return message
    return f"{key}: {message}" + (f" (got {given!r})" if repr(given) not in message else "")
