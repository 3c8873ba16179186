"""Where properties come from: RecBole's folder, ours, and the file or attribute that a component brings."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import recbole

from recbole_cl import schema
from recbole_cl.config.values import read_properties
from recbole_cl.errors import ConfigError

RECBOLE = Path(recbole.__file__).resolve().parent
PACKAGE = Path(__file__).resolve().parent.parent


def properties_dir() -> Path:
    """Returns the folder of our properties: inside the installed package, or beside it in a checkout.

    Raises:
        ConfigError: If neither is there.
    """
    for folder in (PACKAGE / "properties", PACKAGE.parent / "properties"):
        if (folder / "overall.yaml").is_file():
            return folder
    raise ConfigError("the folder 'properties' with RecBole-CL's defaults is missing; install the package again")


def config_file(asked: str | os.PathLike[str]) -> str:
    """Returns the path of a config file: a file, or a preset by its name (``properties/preset/<name>.yaml``)."""
    path = os.fspath(asked)
    preset = properties_dir() / "preset" / f"{path}.yaml"
    return str(preset) if not Path(path).exists() and Path(path).name == path and preset.is_file() else path


def _file_beside(component: type) -> Path | None:
    """Returns ``<ClassName>.yaml`` beside the module that defines a class, if there is one."""
    with contextlib.suppress(TypeError, OSError):
        file = Path(inspect.getfile(component)).with_name(f"{component.__name__}.yaml")
        if file.is_file():
            return file
    return None


def component_defaults(
    component: type, name: str, folder: str, asked: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """Finds the defaults of a strategy, scheduler or model.

    Args:
        component: Its class.
        name: Its registered name.
        folder: Folder below ``properties`` that our own ones are in.
        asked: Properties that were given; they choose among the class's ``presets``, whose values stand over its own.

    Returns:
        The defaults from ``properties/<folder>/<name>.yaml``, else from ``<ClassName>.yaml`` beside the class's module,
        else from its attribute ``defaults``; and the types that the file's comments declare, or those of the defaults.
    """
    own = properties_dir() / folder / f"{name}.yaml"
    file = own if own.is_file() else _file_beside(component)
    if file is not None:
        defaults, declared = read_properties(file), schema.declared_types(file)
    else:
        defaults = copy.deepcopy(dict(getattr(component, "defaults", None) or {}))
        declared = {key: words for key, value in defaults.items() if (words := _kind(value))}
    for key, layers in getattr(component, "presets", {}).items():
        defaults = {**defaults, **layers.get((asked or {}).get(key, defaults.get(key)), {})}
    return defaults, declared


def _kind(default: Any) -> tuple[str, ...]:
    """Returns the types that a default without a declaration stands for; none where it says nothing."""
    for kind, words in ((bool, ("bool",)), (int | float, ("float",)), (str, ("str",)), (list | tuple, ("list",))):
        if isinstance(default, kind):
            return words
    return ("dict", "none") if isinstance(default, dict) else ()
