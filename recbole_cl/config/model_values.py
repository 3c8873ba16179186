"""What the properties of one of RecBole's models may be: of the kind of their defaults, and no refusal of PyTorch's.

RecBole hands them on unchecked. Those that mean the same in every model have ranges (``MODEL_SCHEMA``); each of the
others has the type that its line in RecBole's file declares or that of its default there. What is left, such as widths
that do not go together, shows when the model is made.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from recbole_cl import schema
from recbole_cl.config.backbone import recbole_names
from recbole_cl.config.files import RECBOLE
from recbole_cl.config.values import read_properties
from recbole_cl.errors import ConfigError, RecBoleCLError


@functools.cache
def _kinds(model: str) -> dict[str, tuple[str, Any]]:
    """Returns, for each property in the file of one of RecBole's models, its kind and its default."""
    file = RECBOLE / "properties" / "model" / f"{model}.yaml"
    if not file.is_file():
        return {}
    declared = schema.declared_types(file)
    found = {}
    for key, default in read_properties(file).items():
        if isinstance(default, bool):
            kind = "bool"
        elif isinstance(default, int) and "float" not in declared.get(key, ()):
            kind = "int"
        elif isinstance(default, int | float):
            kind = "float"
        else:
            text = isinstance(default, str) or declared.get(key) == ("str", "none")
            kind = "list" if isinstance(default, list) else "str" if text else ""
        found[key] = (kind, default)
    return found


def _accepts(kind: str, default: Any, value: Any) -> bool:
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "int":
        return schema.is_integer(value) and abs(value) <= schema.LARGEST and (value >= 0 or default < 0)
    if kind == "float":
        return schema.is_number(value)
    if kind == "str":
        return isinstance(value, str) or (value is None and default is None)
    if kind == "list":
        same = (int, float) if default and isinstance(default[0], int | float) else str
        return (
            isinstance(value, list | tuple)
            and (not default or len(value) > 0)
            and (not default or all(isinstance(one, same) and not isinstance(one, bool) for one in value))
            and all(one > 0 for one in value if isinstance(one, int) and default and isinstance(default[0], int))
        )
    return True


_WORDS = {
    "bool": "True or False",
    "int": "an integer of at least 0",
    "float": "a number",
    "str": "a text",
    "list": "a list, not empty, of such values",
}


def check_model_values(asked: Mapping[str, Any], classes: Sequence[type]) -> None:
    """Checks the properties of RecBole's model that were given, which have no range of their own.

    Args:
        asked: Properties that were given.
        classes: The model's class, and that of the model inside it.

    Raises:
        ConfigError: If one is of another kind than its default.
    """
    for name in recbole_names(*classes):
        for key, (kind, default) in _kinds(name).items():
            if key not in asked or key in schema.RECBOLE_SCHEMA or asked[key] == default:
                continue
            if not _accepts(kind, default, asked[key]):
                raise ConfigError(
                    f"property {key!r} is {asked[key]!r}; it must be {_WORDS[kind]}, as RecBole's default of "
                    f"{name}, {default!r}"
                )


@contextlib.contextmanager
def told_with_properties(config: Any, classes: Sequence[type]) -> Iterator[None]:
    """A context in which a model of RecBole's is made: what it dies of is told with the properties it was given.

    Args:
        config: The run's configuration.
        classes: The model's class, and that of the model inside it.

    Raises:
        ConfigError: If making it fails and one of its own properties was given.
    """
    try:
        yield
    except RecBoleCLError:
        raise
    except Exception as error:
        own = {key for name in recbole_names(*classes) for key in _kinds(name)}
        own |= schema.MODEL_SCHEMA.keys() | {"MAX_ITEM_LIST_LENGTH"}
        given = getattr(config, "external_config_dict", {})
        properties = ", ".join(f"{key}: {given[key]!r}" for key in sorted(own & given.keys()))
        if not properties:
            raise
        raise ConfigError(
            f"model {config['model']!r} cannot be made with {properties} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); change what does not go together, or leave it out"
        ) from error
