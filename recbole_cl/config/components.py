"""Defaults and parameters of components: strategies, and the parts that a model or a strategy names by a property.

A model (a strategy, a part itself) says which of its properties name a part::

    components: ClassVar[Mapping[str, Registry]] = {"pcl_encoder": encoders}

The part that is chosen brings a layer of defaults, as a strategy does: ``properties/<folder>/<Name>.yaml``, or
``<ClassName>.yaml`` beside its module, or its attribute ``defaults``. Its own properties have its ``prefix`` (by
default its name), general ones (``epochs``) keep theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_cl.config.files import component_defaults
from recbole_cl.config.keys import base_keys
from recbole_cl.errors import ConfigError, nearest
from recbole_cl.registry import Registry


@dataclass(frozen=True)
class ComponentDefaults:
    """Defaults of one component as flat properties.

    Attributes:
        name: Its registered name.
        prefix: What its own properties begin with, without the underscore.
        values: Property to default: its own ones with the prefix, general ones as they are.
        declared: Property to the types that its file declares.
        own: Parameter without prefix to property, of its own ones.
    """

    name: str
    prefix: str
    values: dict[str, Any]
    declared: dict[str, tuple[str, ...]]
    own: dict[str, str]

    @classmethod
    def of(cls, name: str, component: Any, folder: str) -> ComponentDefaults:
        """Reads the defaults of a component.

        Args:
            name: Its registered name.
            component: Its class.
            folder: Folder below ``properties`` that our own ones are in.
        """
        defaults, declared = component_defaults(component, name, folder)
        prefix = getattr(component, "prefix", None) or name.lower()
        flat = {key: _flat_key(key, prefix) for key in defaults}
        return cls(
            name,
            prefix,
            {flat[key]: value for key, value in defaults.items()},
            {flat.get(key, key): words for key, words in declared.items()},
            {key.removeprefix(f"{prefix}_"): key for key in flat.values() if key.startswith(f"{prefix}_")},
        )


def _flat_key(key: str, prefix: str) -> str:
    """Returns the property of a component's default: a general one keeps its name, its own ones get the prefix."""
    return key if key.startswith(f"{prefix}_") or key in base_keys() else f"{prefix}_{key}"


@dataclass(frozen=True)
class Chosen:
    """The component that a property names.

    Attributes:
        key: The property.
        registry: Where the component is registered.
        component: Its class or function.
        defaults: Its defaults; ``defaults.name`` is its registered name.
        folder: The path that the property gives in place of a name, if it does.
    """

    key: str
    registry: Registry
    component: Any
    defaults: ComponentDefaults
    folder: str | None = None

    def parameters(self, final: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the component's own parameters, without its prefix.

        Args:
            final: The effective properties.
        """
        found = {parameter: final[key] for parameter, key in self.defaults.own.items()}
        return found if self.folder is None else {**found, "folder": self.folder}


def choose(key: str, registry: Registry, asked: Any) -> Chosen:
    """Finds the component that a property names.

    Args:
        key: The property.
        registry: Where to look.
        asked: Its value: a registered name or, where the registry has a member that reads folders, a folder.

    Raises:
        ConfigError: If nobody answers to the name.
    """
    if not isinstance(asked, str) or not asked.strip():
        raise ConfigError(f"property {key!r} is {asked!r}; it must be the name of a component ({registry.kind})")
    asked, folder = asked.strip(), None
    if asked in registry:
        name = registry.name_of(asked)
    elif registry.reads_folders is not None and Path(asked).expanduser().is_dir():
        name, folder = registry.name_of(registry.reads_folders), asked
    else:
        hint = nearest(asked, registry.names()) or "."
        known = f"Known: {', '.join(registry.names())}" if registry.names() else "None is installed"
        if registry.reads_folders is None:
            raise ConfigError(f"{key}: unknown {registry.kind} {asked!r}{hint} {known}")
        article = "an" if registry.kind[0].lower() in "aeiou" else "a"
        raise ConfigError(f"{key}: {asked!r} is neither {article} {registry.kind}{hint} {known}, nor a folder")
    component = registry.get(name)
    return Chosen(key, registry, component, ComponentDefaults.of(name, component, str(registry.folder)), folder)


def chosen_components(owners: Iterable[tuple[Any, Mapping[str, Any]]], asked: Mapping[str, Any]) -> list[Chosen]:
    """Returns the components that some classes name, and those that these name in turn, each once.

    Args:
        owners: Classes, each with the properties as it sees them; a property that is ``None`` names no component.
        asked: Properties that win over the defaults of a component which names another.

    Raises:
        ConfigError: If nobody answers to a name, or one property is looked up in two registries.
    """
    found: dict[str, Chosen] = {}
    todo = list(owners)
    while todo:
        owner, sees = todo.pop(0)
        for key, registry in dict(getattr(owner, "components", None) or {}).items():
            if key not in found and sees.get(key) is not None:
                part = found[key] = choose(key, registry, sees[key])
                todo.append((part.component, {**part.defaults.values, **asked}))
            elif key in found and found[key].registry is not registry:
                kinds = f"{registry.kind!r} and {found[key].registry.kind!r}"
                raise ConfigError(f"property {key!r} is looked up in two registries, of kind {kinds}; rename one")
    return list(found.values())


def check_parameters(asked: Iterable[str], chosen: Iterable[Chosen], known: Iterable[str]) -> None:
    """Refuses a property that has a chosen component's prefix and that this component does not have.

    Args:
        asked: Properties that were given.
        chosen: The run's components.
        known: Properties that somebody else declares.

    Raises:
        ConfigError: Naming the nearest property that it has.
    """
    others = set(known)
    for part in chosen:
        own = list(part.defaults.own.values())
        for key in asked:
            if key.startswith(f"{part.defaults.prefix}_") and key not in own and key not in others:
                has = f" It has {', '.join(own)}" if own else " It has no properties"
                raise ConfigError(
                    f"unknown property {key!r} of the {part.registry.kind} {part.defaults.name!r}"
                    f"{nearest(key, own) or '.'}{has}"
                )
