"""The property ``strategy`` in all its forms, and the parameters of those that it names."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from recbole_cl import schema
from recbole_cl.config.components import ComponentDefaults
from recbole_cl.config.values import parse_property
from recbole_cl.errors import ConfigError, nearest
from recbole_cl.registry import strategies


def asked_strategies(asked: Any) -> list[tuple[str, dict[str, Any]]]:
    """Returns (registered name, own parameters) of each strategy that the property ``strategy`` asks for.

    Raises:
        ConfigError: If the property has no such form, a name is unknown, or one stands twice.
    """
    schema.SCHEMA["strategy"].check("strategy", asked)
    found = [(_name_of(name), own) for name, own in _pairs(asked)]
    names = [name for name, _ in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"property 'strategy' names {twice!r} twice; keep one")
    return found


def _name_of(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise ConfigError(f"a {strategies.kind} is named by text, not by {name!r}")
    return strategies.name_of(name)


def _pairs(asked: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Returns (name, own parameters) for every form that the property may have."""
    if isinstance(asked, str):
        return [(asked, {})]
    if isinstance(asked, dict):
        pairs = []
        for name, own in asked.items():
            if own is not None and not isinstance(own, dict):
                raise ConfigError(
                    f"property 'strategy' gives {name!r} the parameters {own!r}; write {{{name}: {{parameter: value}}}}"
                )
            pairs.append((name, dict(own or {})))
        return pairs
    found: list[tuple[Any, dict[str, Any]]] = []
    for entry in asked:
        if not isinstance(entry, str | dict) or not entry:
            raise ConfigError(f"property 'strategy' lists {entry!r}; list names or {{name: {{parameter: value}}}}")
        found += _pairs(entry)
    return found


def refuse_contradictions(layers: Iterable[ComponentDefaults], asked: Container[str]) -> None:
    """Refuses two strategies that set a general property to different values, unless it was ``asked`` for.

    Raises:
        ConfigError: Naming both and the property.
    """
    general: dict[str, tuple[str, Any]] = {}  # who set it, to what
    for layer in layers:
        for key, value in layer.values.items():
            if key in asked or key in layer.own.values():
                continue
            other, theirs = general.setdefault(key, (layer.name, value))
            if theirs != value:
                raise ConfigError(
                    f"strategy: {other} sets the property {key!r} to {theirs!r}, {layer.name} to {value!r}; say which "
                    f"with --{key}=..."
                )


def settle_parameters(
    final: dict[str, Any], asked: Iterable[tuple[str, Mapping[str, Any]]], own: Mapping[str, Mapping[str, str]]
) -> tuple[list[tuple[str, dict[str, Any]]], set[str]]:
    """Merges each strategy's own parameters: flat properties, and over them those of the dict form.

    Args:
        final: The effective properties; a flat one follows its dict form, so that there is one truth.
        asked: (name, parameters of the dict form) of each strategy.
        own: Name to {parameter: property}.

    Returns:
        (name, parameters) of each strategy, and the properties that dict forms set.

    Raises:
        ConfigError: If a strategy has no such parameter, or it is given twice.
    """
    specs: list[tuple[str, dict[str, Any]]] = []
    given: set[str] = set()
    for name, parameters in asked:
        flat = own[name]
        names = {key: parameter for parameter, key in flat.items()}
        warned: set[str] = set()
        for key, value in parameters.items():
            parameter = key if key in flat else names.get(key)
            if parameter is None:
                known = f" Known: {', '.join(sorted(flat))}" if flat else f" {name} has no parameters"
                hint = nearest(key, [*flat, *names]) or "."
                raise ConfigError(f"unknown parameter {key!r} of strategy {name!r}{hint}{known}")
            if parameter in warned:
                raise ConfigError(f"strategy {name!r} is given the parameter {parameter!r} twice; keep one")
            warned.add(parameter)
            final[flat[parameter]] = parse_property(parameter, value)
            given.add(flat[parameter])
        specs.append((name, {parameter: final[key] for parameter, key in flat.items()}))
    return specs, given
