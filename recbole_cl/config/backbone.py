"""The model inside a model: which may stand there, what it brings, and a type that follows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recbole.utils import ModelType

from recbole_cl.config.files import component_defaults
from recbole_cl.config.models import get_model_class, recbole_models
from recbole_cl.errors import ConfigError

EXAMPLES = {
    ModelType.GENERAL: "BPR",
    ModelType.SEQUENTIAL: "SASRec",
    ModelType.CONTEXT: "DeepFM",
    ModelType.KNOWLEDGE: "CKE",
}
_WORDS = {ModelType.CONTEXT: "context-aware", ModelType.KNOWLEDGE: "knowledge-based"}


@dataclass(frozen=True)
class Backbone:
    """The model inside a model.

    Attributes:
        component: Its class.
        values: Its own defaults.
        declared: The types that its file declares.
    """

    component: type
    values: dict[str, Any]
    declared: dict[str, tuple[str, ...]]


def find_backbone(model: str, model_class: Any, asked: Mapping[str, Any]) -> Backbone | None:
    """Finds the backbone that a model's class names by ``backbone_property``.

    Args:
        model: Name of the model.
        model_class: Its class; ``backbone_types`` says what may stand there.
        asked: Properties that were given.

    Returns:
        The backbone, or ``None`` for a model without one.

    Raises:
        ConfigError: If there is no such model, or it cannot be the backbone.
    """
    key = getattr(model_class, "backbone_property", None)
    if key is None:
        return None
    name = asked.get(key, component_defaults(model_class, model, "model")[0].get(key))
    inner = get_model_class(str(name))
    types = frozenset(getattr(model_class, "backbone_types", ())) or frozenset({ModelType.SEQUENTIAL})
    kind: Any = getattr(inner, "type", None)
    if kind not in types or getattr(inner, "backbone_property", None) is not None:
        fits = sorted((t for t in EXAMPLES if t in types), key=lambda t: t.value)
        words = " or ".join(f"{_WORDS.get(t, t.name.lower())} model, as {EXAMPLES[t]}" for t in fits)
        raise ConfigError(f"{key}: {name!r} cannot be the backbone of {model}; name a {words}")
    return Backbone(inner, *component_defaults(inner, inner.__name__, "model"))


def recbole_names(*classes: type) -> list[str]:
    """Returns the names of classes and of those of RecBole's models that they derive from, nearest first.

    A subclass of one of RecBole's models starts from that model's file and quick start.
    """
    ancestors = (
        cls.__name__
        for given in classes
        for cls in given.__mro__[1:]
        if cls.__module__.startswith("recbole.model.") and cls.__name__.lower() in recbole_models()
    )
    return [*(cls.__name__ for cls in classes), *ancestors]


class _LossDecides:
    """In place of a class's ``input_type``: RecBole then takes that of the property ``loss_type``."""

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        raise AttributeError("input_type follows from loss_type")


def typed(model_class: type, backbone: type) -> type:
    """Returns a model's class with the type of its backbone: what a wrapper is follows from what it wraps.

    RecBole, the loaders, the evaluation and the strategies read ``type`` and ``input_type`` of the class.
    """
    given: Any = backbone
    namespace = {
        "type": given.type,
        "input_type": getattr(given, "input_type", _LossDecides()),
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
        "__doc__": model_class.__doc__,
    }
    return type(model_class.__name__, (model_class,), namespace)
