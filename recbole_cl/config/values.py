"""Values as people write them: YAML files, ``--key=value`` arguments, single texts. Nothing is ever evaluated."""

from __future__ import annotations

import copy
import enum
import inspect
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from recbole_cl.errors import ConfigError

# Intervals such as "[5,10]" would read as a YAML list; RecBole wants the text.
INTERVALS = (
    "user_inter_num_interval",
    "item_inter_num_interval",
    "entity_kg_num_interval",
    "relation_kg_num_interval",
)
# Names stay text, also one that looks like a number (--dataset=2020).
_TEXTS = (
    "model",
    "dataset",
    "scheduler",
    "output_dir",
    "data_path",
    "text_cache",
    "state",
    "gpu_id",
    "checkpoint_dir",
    "period_field",
)


class Loader(yaml.SafeLoader):
    """Safe YAML as RecBole's users write it: 1e-4 is a float, None is none, dates stay text.

    A key that stands twice in a mapping is refused, and so are anchors that hold themselves or that, written out, make
    a short text a huge one.
    """

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            distinct: dict[int, int] = {}
            written_out = _written_out(node, distinct, set())
            if written_out > 10_000 + 10 * len(distinct):
                raise _refusal(f"its anchors, written out, make {written_out} values of {len(distinct)}", node)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            own: dict[Any, Any] = {}
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if (key.tag, key.value) in own:
                        first = own[key.tag, key.value].line + 1
                        raise _refusal(f"the key {key.value!r} stands twice, first in line {first}; keep one", key)
                    own[key.tag, key.value] = key.start_mark
        return super().construct_mapping(node, deep)


def _refusal(words: str, node: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, words, node.start_mark)


def _written_out(node: Any, distinct: dict[int, int], inside: set[int]) -> int:
    """Returns how many values a node is without anchors, each distinct one looked at once."""
    if id(node) in inside:
        raise _refusal("an anchor holds itself", node)
    if id(node) not in distinct:
        parts: list[Any] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        size = 1 + sum(_written_out(part, distinct, inside | {id(node)}) for part in parts)
        distinct[id(node)] = size
    return distinct[id(node)]


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Builds the table of implicit types for :class:`Loader` alone; PyYAML's own classes are not touched.

    YAML 1.1 reads 1e-4 as text, 2011-06-01 as a date object (which no JSON can hold) and 12:30 as 750.
    """
    table = {
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag.rsplit(":", 1)[-1] not in ("float", "int", "timestamp", "null")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    number = re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    )
    whole = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")
    none = re.compile(r"^(?:~|null|Null|NULL|None|)$")
    for pattern, tag, firsts in (
        (number, "float", "-+0123456789."),
        (whole, "int", "-+0123456789"),
        (none, "null", "~nN"),
    ):
        for first in [*firsts, *([""] if tag == "null" else [])]:
            table.setdefault(first, []).append((f"tag:yaml.org,2002:{tag}", pattern))
    return table


Loader.yaml_implicit_resolvers = _resolvers()


def read_properties(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a YAML file of properties.

    Args:
        path: The file.

    Returns:
        Its mapping; empty for an empty file.

    Raises:
        ConfigError: If it cannot be read, is no YAML, or is not a mapping of names.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
        values = yaml.load(content, Loader=Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the config file {str(path)!r}: {reason}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        where = " ".join(str(error).split())
        raise ConfigError(f"the config file {str(path)!r} is not valid YAML: {where}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"the config file {str(path)!r} must hold lines of the form 'property: value'")
    return values


def parse_value(text: str, *, unquote: bool = False) -> Any:
    """Reads the text of one value: ``5``, ``1e-4``, ``True``, ``None``, ``[5, 10]``, ``{rating: 4}``; else the text.

    Nothing is evaluated. Only one-line scalars, lists and mappings in brackets count: ``a: b`` and ``# x`` stay text.

    Args:
        text: What a person wrote.
        unquote: Whether ``"'5'"`` means the text ``5``, as on a command line.

    Returns:
        The value.
    """
    stripped = text.strip()
    if not stripped:
        return text
    try:
        value = yaml.load(stripped, Loader=Loader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return text
    if isinstance(value, str):
        return value if unquote and stripped[0] in "'\"" and stripped[-1] == stripped[0] else text
    if isinstance(value, list | dict):
        return value if stripped[0] in "[{" else text
    if value is None:
        return None if stripped in ("~", "null", "Null", "NULL", "None") else text
    return value if isinstance(value, bool | int | float) else text


def parse_property(key: str, value: Any, *, unquote: bool = False) -> Any:
    """Reads a property that was given as text; any other value is copied."""
    if not isinstance(value, str):
        return copy.deepcopy(value)
    parsed = parse_value(value, unquote=unquote)
    # A text that looks like a number stays one where a name is asked for.
    keeps_text = key in INTERVALS or key in _TEXTS or key.endswith("_FIELD")
    return value if keeps_text and not (parsed is None or isinstance(parsed, str)) else parsed


def parse_arguments(args: Iterable[str] | None) -> dict[str, Any]:
    """Reads ``--key=value`` strings.

    Args:
        args: The strings; the value may hold ``=``, a flag without one means True.

    Returns:
        Properties by name.

    Raises:
        ConfigError: If a string is not of this form, or one property is given two values.
    """
    values: dict[str, Any] = {}
    for arg in args or ():
        key, equals, raw = str(arg)[2:].partition("=")
        if not str(arg).startswith("--") or not re.fullmatch(r"[\w.-]+", key):
            raise ConfigError(f"cannot read the argument {arg!r}; properties are written --name=value")
        value = parse_property(key, raw, unquote=True) if equals else True
        if key in values and values[key] != value:
            raise ConfigError(f"property {key!r} is given twice, as {values[key]!r} and as {value!r}; keep one")
        values[key] = value
    return values


def plain(value: Any) -> Any:
    """Returns a JSON-able stand-in for a setting, without anything that differs from process to process."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, type) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist())
    # An object's default text holds its address.
    return str(value) if type(value).__str__ is not object.__str__ else type(value).__qualname__
