"""What is measured of a cell's finished model, beside what the run itself records.

A preset asks for one with ``probe: {name: {parameter: value}}``. A probe is a function of the finished
:class:`recbole_cl.training.runner.Runner` and its parameters; what it returns is kept as ``probe.json`` in the cell's
folder::

    {"metric": "accuracy", "task": "age", "variants": {"prompts": {"accuracy": 0.41, "epochs": 12, "curve": [...]}}}

The numbers of a variant are columns of the table, and its curve (a value an epoch) is drawn by the plot ``probe``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from recbole_cl.errors import ConfigError, nearest
from recbole_cl.schema import Rule, boolean, integer, positive
from recbole_cl.study.universal import universal

PROBES: dict[str, Callable[..., dict[str, Any]]] = {"universal": universal}
PARAMETERS: dict[str, dict[str, tuple[Any, Rule]]] = {
    "universal": {
        "hidden": (64, integer(1)),
        "epochs": (100, integer(1)),
        "learning_rate": (0.001, positive()),
        "batch_size": (64, integer(1)),
        "one_hot": (True, boolean()),
    }
}
"""Default and rule of every parameter."""


def read_probe(asked: Any, where: str) -> dict[str, Any] | None:
    """Returns ``{"name": ..., **parameters}`` with defaults filled in, or ``None`` for no probe.

    Raises:
        ConfigError: If the probe or a parameter is unknown, or a value makes no sense.
    """
    if asked is None:
        return None
    given = {asked: {}} if isinstance(asked, str) else asked
    if not isinstance(given, Mapping) or len(given) != 1:
        raise ConfigError(f"{where}: probe is {asked!r}; give a name, or {{name: {{parameter: value}}}}")
    name, parameters = next(iter(given.items()))
    if name not in PROBES:
        raise ConfigError(f"{where}: unknown probe {name!r}{nearest(str(name), PROBES)} Known: {', '.join(PROBES)}")
    known = PARAMETERS[name]
    if not isinstance(parameters or {}, Mapping):
        raise ConfigError(f"{where}: probe {name} has {parameters!r}; give {{parameter: value}}")
    for key, value in (parameters or {}).items():
        if key not in known:
            raise ConfigError(
                f"{where}: probe {name} has no parameter {key!r}{nearest(str(key), known)} It has {', '.join(known)}"
            )
        try:
            known[key][1].check(key, value)
        except ConfigError as error:
            raise ConfigError(f"{where}: probe {name}: {error}") from error
    return {"name": name, **{key: default for key, (default, _) in known.items()}, **(parameters or {})}


def run_probe(probe: Mapping[str, Any], runner: Any) -> dict[str, Any]:
    """Returns what a probe finds; ``runner`` has finished."""
    parameters = dict(probe)
    return PROBES[parameters.pop("name")](runner, **parameters)
