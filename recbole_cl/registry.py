"""Who answers to this name: one registry class for every kind of component.

A component is added by a decorator here or, from another package, by an entry point of the registry's group.
Look-up ignores case, a second component of the same name raises, an unknown name suggests the nearest.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any, TypeVar

from recbole_cl.errors import ConfigError, nearest

T = TypeVar("T")
IMPORTED: list[str] = []
"""Modules that a command was asked to import (``--import``); processes that it starts import them, too."""


class Registry:
    """Maps names to classes or functions.

    Args:
        kind: What the members are, for messages (``"strategy"``).
        group: Entry-point group that other packages use (``"recbole_cl.strategies"``).
        package: Dotted package whose modules register the built-in members when imported.
        folder: Folder below ``properties`` that holds the defaults of our own members (``"strategy"``).
        reads_folders: Name of the member that answers to the path of a folder; it has a parameter ``folder``.
    """

    def __init__(
        self, kind: str, group: str, package: str, folder: str | None = None, reads_folders: str | None = None
    ) -> None:
        self.kind = kind
        self.group = group
        self.package = package
        self.folder = folder
        self.reads_folders = reads_folders
        self._members: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        self._loaded = False

    def register(self, name: str | None = None) -> Callable[[T], T]:
        """Returns a decorator that adds a component under ``name`` (default: its ``__name__``).

        Raises:
            ConfigError: If another component has this name.
        """

        def add(component: T) -> T:
            self._add(name or component.__name__, component)  # type: ignore[attr-defined]
            return component

        return add

    def _add(self, name: str, component: Any) -> None:
        key = name.lower()
        have = self._members.get(key)
        # A module that is imported twice (an entry point naming a built-in) defines the same component again.
        if have is not None and (have.__module__, have.__qualname__) != (
            component.__module__,
            component.__qualname__,
        ):
            raise ConfigError(
                f"two {self.kind} components are named {name!r}: {have.__module__}.{have.__qualname__} and "
                f"{component.__module__}.{component.__qualname__}; rename one of them"
            )
        self._members[key] = component
        self._names[key] = name

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True  # also while it loads: the members' modules ask this registry
        try:
            self._load_members()
        except BaseException:
            self._loaded = False  # who asks again hears the same, and not that a name is unknown
            raise

    def _load_members(self) -> None:
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        for point in entry_points(group=self.group):
            try:
                component = point.load()
            except Exception as error:  # whatever another package's import may raise
                raise ConfigError(
                    f"the {self.kind} {point.name!r} of the entry point {point.value!r} cannot be imported: "
                    f"{type(error).__name__}: {error}; mend or uninstall the package that declares it"
                ) from error
            self._add(point.name, component)

    def get(self, name: str) -> Any:
        """Returns the component called ``name``, whatever its case.

        Raises:
            ConfigError: If nobody answers to it; the message suggests the nearest name.
        """
        self._load()
        component = self._members.get(str(name).lower())
        if component is None:
            hint = nearest(name, self.names()) or "."
            raise ConfigError(f"unknown {self.kind} {name!r}{hint} Known: {', '.join(self.names())}")
        return component

    def name_of(self, name: str) -> str:
        """Returns the registered spelling of ``name``."""
        self.get(name)
        return self._names[str(name).lower()]

    def __contains__(self, name: object) -> bool:
        self._load()
        return str(name).lower() in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def names(self) -> list[str]:
        """Returns the registered names in alphabetical order."""
        self._load()
        return sorted(self._names.values(), key=str.lower)


strategies = Registry("strategy", "recbole_cl.strategies", "recbole_cl.strategy", "strategy")
schedulers = Registry("scheduler", "recbole_cl.schedulers", "recbole_cl.stream.schedulers", "stream")
strata = Registry("stratum", "recbole_cl.strata", "recbole_cl.evaluation.strata", "stratum")
models = Registry("model", "recbole_cl.models", "recbole_cl.model", "model")
encoders = Registry(
    "encoder", "recbole_cl.encoders", "recbole_cl.llm.encoders", "encoder", reads_folders="sentence_transformers"
)
llm_clients = Registry("LLM client", "recbole_cl.llm_clients", "recbole_cl.llm.clients", "llm_client")
tokenisers = Registry("tokeniser", "recbole_cl.tokenisers", "recbole_cl.generative.tokenisers", "tokeniser")
aggregators = Registry("aggregator", "recbole_cl.aggregators", "recbole_cl.federated.aggregators", "aggregator")
engines = Registry("engine", "recbole_cl.engines", "recbole_cl.federated.engines", "engine")
commands = Registry("command", "recbole_cl.commands", "recbole_cl.commands")

COMPONENTS = (strategies, encoders, llm_clients, tokenisers, aggregators, engines)
"""What a run has only if it is asked for, with properties of its own."""
