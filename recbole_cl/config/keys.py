"""Which names of properties mean something, and what becomes of the others."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recbole.utils import argument_list

from recbole_cl.config.files import PACKAGE, RECBOLE, properties_dir
from recbole_cl.config.recbole_properties import check_recbole
from recbole_cl.errors import ConfigError
from recbole_cl.registry import COMPONENTS

# Keys that the program or RecBole itself sets or reads without declaring a default anywhere.
_HIDDEN_KEYS = (
    "model",
    "dataset",
    "config_files",
    "saved",
    "wandb_project",
    "nproc",
    "world_size",
    "ip",
    "port",
    "offset",
)

_READS = re.compile(r"config\[\s*[\"'](\w+)[\"']\s*\]")
_KEYS = re.compile(r"^([A-Za-z_]\w*)\s*:", re.MULTILINE)


def _keys_of(files: Iterable[Path], pattern: re.Pattern[str]) -> set[str]:
    found: set[str] = set()
    for file in files:
        found.update(pattern.findall(file.read_text(encoding="utf-8", errors="replace")))
    return found


@functools.lru_cache(maxsize=1)
def base_keys() -> frozenset[str]:
    """Keys that mean something to every run: RecBole's argument lists and its and our general properties."""
    lists = (getattr(argument_list, name) for name in dir(argument_list) if name.endswith("_arguments"))
    files = [
        RECBOLE / "properties" / "overall.yaml",
        RECBOLE / "properties" / "dataset" / "sample.yaml",
        properties_dir() / "overall.yaml",
    ]
    return frozenset(key for keys in lists for key in keys) | _keys_of(files, _KEYS) | {*_HIDDEN_KEYS}


@functools.lru_cache(maxsize=1)
def library_keys() -> frozenset[str]:
    """Keys that anything in RecBole or here declares in a properties file or reads as ``config["key"]``."""
    declared = _keys_of((RECBOLE / "properties").rglob("*.yaml"), _KEYS) | _keys_of(
        properties_dir().rglob("*.yaml"), _KEYS
    )
    read = _keys_of([*RECBOLE.rglob("*.py"), *PACKAGE.rglob("*.py")], _READS)
    return base_keys() | declared | read


def check_keys(asked: Mapping[str, Any], defaults: Iterable[str], *classes: type) -> list[str]:
    """Refuses a key that looks like a slip of a known one, or one of RecBole's that asks for what is not done here.

    Args:
        asked: Properties that were given.
        defaults: Keys that this run's layers of defaults hold.
        classes: The model's class and that of the model inside it; what their sources read is known too.

    Returns:
        Warnings: keys without an effect, as those of a strategy or part that is not used, and unknown keys, which are
        kept.

    Raises:
        ConfigError: If a key is a slip or its value is refused; the message has the right one.
    """
    warnings = check_recbole(asked)
    held = set(defaults)
    known = {*library_keys(), *held}
    for cls in (base for given in classes for base in given.__mro__):
        if cls.__module__.partition(".")[0] not in ("recbole", "torch", "builtins", "typing"):
            with contextlib.suppress(TypeError, OSError):
                known.update(_READS.findall(inspect.getsource(inspect.getmodule(cls) or cls)))
    idle = {
        key: f"{registry.kind} {file.stem!r}"
        for registry in COMPONENTS
        for file in (properties_dir() / str(registry.folder)).glob("*.yaml")
        for key in _keys_of([file], _KEYS)
    }
    for key in asked:
        if key in known:
            if key in idle and key not in held and key not in base_keys():
                warnings.append(f"property {key!r} has no effect: it belongs to the {idle[key]}, which is not used")
            continue
        close = difflib.get_close_matches(key.lower(), {k.lower() for k in known}, n=1, cutoff=0.8)
        if close:
            right = next(k for k in sorted(known) if k.lower() == close[0])
            raise ConfigError(f"unknown property {key!r}; did you mean {right!r}?")
        warnings.append(f"unknown property {key!r} is kept, but nothing here reads it")
    return warnings
