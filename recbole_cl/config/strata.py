"""Which strata results are told for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recbole_cl.errors import ConfigError
from recbole_cl.registry import strata


def make_strata(asked: str | Sequence[str] | Mapping[str, Any] | None) -> list[Any]:
    """Returns the strata that were asked for.

    Args:
        asked: A name, names, or name to parameters (``~`` for the defaults).

    Raises:
        ConfigError: If a name or a parameter is unknown, or a name comes twice.
    """
    if isinstance(asked, str):
        asked = [asked]
    given = list(asked.items()) if isinstance(asked, Mapping) else [(name, None) for name in asked or ()]
    names = [strata.name_of(name) for name, _ in given]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"property 'strata' names {name!r} twice; name it once")
    found = []
    for name, parameters in given:
        if parameters is not None and not isinstance(parameters, Mapping):
            raise ConfigError(f"strata: {name} has the parameters {parameters!r}; give {{parameter: value}}")
        found.append(strata.get(name)(**(parameters or {})))
    return found
