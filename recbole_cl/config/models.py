"""Which models there are, who answers to a model's name, and how some of RecBole's differ from all others.

What a stream has to know of a model beyond its type stands in one table, :data:`TRAITS`, and is looked up by the
model's class: a subclass of RecBole's DIEN is a DIEN, whatever it is called, and a class of another package that is
called ``DIEN`` is none. A model that holds another one (``backbone_property``) has the traits of the inner one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from recbole.model.abstract_recommender import AbstractRecommender

from recbole_cl.config.files import RECBOLE
from recbole_cl.errors import ConfigError, nearest
from recbole_cl.registry import models

_MODEL_FAMILIES = (
    "general_recommender",
    "context_aware_recommender",
    "sequential_recommender",
    "knowledge_aware_recommender",
    "exlib_recommender",
)


@dataclass(frozen=True)
class Traits:
    """How a model differs from what a stream takes for granted; the defaults hold for every model without a row.

    Attributes:
        refused: Why it cannot be taken through a stream, and what to use instead.
        package: Package that it imports only when it is constructed or trained, after the data has been read.
        user_batches: It trains on whole users (RecBole's ``UserDataLoader``): there are no rows of interactions.
        negative_lists: It reads an item that was not taken beside each item of a history (``neg_item_id_list``), also
            where it only scores. RecBole's dataset of the model, which draws them once for all, is not used.
        counts: It has no gradient, and training accumulates what RecBole's ``other_parameter`` returns: it is carried
            from stage to stage. Other memory-based models compute theirs from the data whenever they are made.
        e_step_every: Property that tells every how many epochs ``e_step()`` runs before an epoch, as in the loop of
            RecBole's trainer of the model.
    """

    refused: str | None = None
    package: str | None = None
    user_batches: bool = False
    negative_lists: bool = False
    counts: bool = False
    e_step_every: str | None = None


_USERS = Traits(user_batches=True)

TRAITS: dict[str, Traits] = {
    "CDAE": _USERS,
    "DIEN": Traits(negative_lists=True),
    "DiffRec": _USERS,
    "ENMF": _USERS,
    "FEARec": Traits(
        refused="it reads RecBole's table of augmented sequences, which a stream does not make; use SASRec"
    ),
    "KGAT": Traits(package="dgl"),
    "KGIN": Traits(package="torch_scatter"),
    "LDiffRec": _USERS,
    "MCCLK": Traits(package="torch_scatter"),
    "MacridVAE": _USERS,
    "MultiDAE": _USERS,
    "MultiVAE": _USERS,
    "NCL": Traits(package="faiss", e_step_every="m_step"),
    "Pop": Traits(counts=True),
    "RaCT": _USERS,
    "RecVAE": _USERS,
    "RippleNet": Traits(
        refused="it cannot score a user without training interactions, whom a stream always has; use KGCN"
    ),
}
"""Traits by the class name of a RecBole model; ask :func:`traits_of` or :func:`configured_traits`, not the table."""


def _own_traits(model_class: type) -> Traits | None:
    """Returns the traits of a class: what it says itself in ``recbole_traits``, else its nearest row of the table."""
    for cls in model_class.__mro__:
        said = vars(cls).get("recbole_traits")
        if isinstance(said, Traits):
            return said
        if cls.__module__.startswith("recbole.model.") and cls.__name__ in TRAITS:
            return TRAITS[cls.__name__]
    return None


def traits_of(model: Any) -> Traits:
    """Returns the traits of a model.

    Args:
        model: A model or the class of one. Of a model that holds another one, the inner one is asked, too; a class
            alone does not tell which one that will be (see :func:`configured_traits`).
    """
    model_class = model if isinstance(model, type) else type(model)
    found = _own_traits(model_class)
    if found is None and model is not model_class and getattr(model_class, "backbone_property", None):
        inner = (_own_traits(type(part)) for part in model.children() if isinstance(part, AbstractRecommender))
        found = next((traits for traits in inner if traits is not None), None)
    return found or Traits()


def configured_classes(config: Any) -> Iterator[type]:
    """Yields the class of the configured model, then that of the model inside it, where there is one.

    Args:
        config: The run's configuration: ``model_class``, and the property that ``backbone_property`` names.
    """
    yield config.model_class
    key = getattr(config.model_class, "backbone_property", None)
    if key:
        yield get_model_class(str(config[key]))


def configured_traits(config: Any) -> Traits:
    """Returns the traits of the model that a configuration asks for, or of the one inside it."""
    found = (_own_traits(model_class) for model_class in configured_classes(config))
    return next((traits for traits in found if traits is not None), Traits())


def reads(model_class: type, name: str) -> bool:
    """Tells whether the loss of one of RecBole's models reads a field (``LABEL``, ``NEG_ITEM_ID``).

    A loss of another package's may read and mean what it likes. Ours stand before those of RecBole's models.
    """
    for cls in model_class.__mro__:
        if "calculate_loss" in vars(cls) and not cls.__module__.startswith("recbole_cl.model."):
            own = cls.__module__.startswith("recbole.model.")
            return own and re.search(rf"\bself\.{name}\b", inspect.getsource(vars(cls)["calculate_loss"])) is not None
    return False


def recbole_name(model_class: type) -> str:
    """Returns the name under which RecBole keeps what belongs to a model (``KGATTrainer``, ``KSRDataset``).

    It is that of the first RecBole model among the class and its ancestors, or the class's own without any.
    """
    for cls in model_class.__mro__:
        name, module = recbole_models().get(cls.__name__.lower(), ("", ""))
        if (cls.__name__, cls.__module__) == (name, module):
            return name
    return model_class.__name__


@functools.lru_cache(maxsize=1)
def recbole_models() -> dict[str, tuple[str, str]]:
    """Maps lower-case names of RecBole's models to (class name, dotted module), read from the files, not imported."""
    found: dict[str, tuple[str, str]] = {}
    for family in _MODEL_FAMILIES:
        for file in sorted((RECBOLE / "model" / family).glob("*.py")):
            for name in re.findall(r"^class\s+(\w+)", file.read_text(encoding="utf-8"), re.MULTILINE):
                if name.lower() == file.stem:
                    found[file.stem] = (name, f"recbole.model.{family}.{file.stem}")
    return found


def list_models() -> list[str]:
    """Returns the names of all models that can be trained in stages, ours and RecBole's, in alphabetical order.

    A RecBole model that needs a package which is not installed is listed too.
    """
    names = {name.lower(): name for name, module in recbole_models().values() if "exlib" not in module}
    names.update({name.lower(): name for name in models})
    return sorted(names.values(), key=str.lower)


def list_recbole_models() -> list[str]:
    """Returns those of :func:`list_models` that RecBole brings, also where ours stands in for one of them."""
    return [name for name in list_models() if name.lower() in recbole_models()]


def get_model_class(name: str) -> type:
    """Returns the model called ``name``, whatever its case: ours first, then RecBole's.

    Raises:
        ConfigError: If nobody answers to the name, the model needs a package that is not installed or something that
            streams do not make, or it is a decision tree, which is fitted once and cannot go on from stage to stage.
    """
    if name in models:
        return models.get(name)
    known = recbole_models().get(str(name).lower())
    if known is None:
        hint = nearest(name, list_models()) or "; 'recbole-cl list models' tells all"
        raise ConfigError(f"unknown model {name!r}{hint}")
    class_name, module = known
    if "exlib" in module:
        raise ConfigError(
            f"model {class_name!r} is a decision tree: it is fitted once and cannot be trained in stages; "
            "use a context-aware model such as 'DeepFM'"
        )
    traits = TRAITS.get(class_name, Traits())
    _check(class_name, traits)
    try:
        return getattr(importlib.import_module(module), class_name)
    except ImportError as error:
        raise _lacks_package(class_name, error.name or str(error)) from error


def check_class(model_class: type) -> None:
    """Refuses a class that was given itself, not by a name, where its traits do.

    Raises:
        ConfigError: If it, or the RecBole model that it derives from, cannot be taken through a stream or needs a
            package that is not installed.
    """
    _check(model_class.__name__, traits_of(model_class))


def _check(name: str, traits: Traits) -> None:
    if traits.refused is not None:
        raise ConfigError(f"model {name!r} cannot be trained in stages: {traits.refused}")
    if traits.package is not None and importlib.util.find_spec(traits.package) is None:
        raise _lacks_package(name, traits.package)


def _lacks_package(name: str, package: str) -> ConfigError:
    return ConfigError(
        f"model {name!r} needs the package {package!r}, which is not installed; install it (`pip install "
        f"{package.replace('_', '-')}`) or use another model"
    )
