"""Which models there are, and who answers to a model's name."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re

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
# RecBole's models that import a package only when constructed or trained, after the data has been read.
_LATE_IMPORTS = {"KGAT": "dgl", "KGIN": "torch_scatter", "MCCLK": "torch_scatter", "NCL": "faiss"}
# RecBole's models that cannot be taken through a stream, and why.
_REFUSED = {
    "FEARec": "it reads RecBole's table of augmented sequences, which a stream does not make; use SASRec",
    "RippleNet": "it cannot score a user without training interactions, whom a stream always has; use KGCN",
}


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
    if class_name in _REFUSED:
        raise ConfigError(f"model {class_name!r} cannot be trained in stages: {_REFUSED[class_name]}")
    package = _LATE_IMPORTS.get(class_name)
    if package is None or importlib.util.find_spec(package) is not None:
        try:
            return getattr(importlib.import_module(module), class_name)
        except ImportError as error:
            package = error.name or str(error)
    raise ConfigError(
        f"model {class_name!r} needs the package {package!r}, which is not installed; install it (`pip install "
        f"{package.replace('_', '-')}`) or use another model"
    )


USER_BATCH_MODELS = {
    "MultiDAE", "MultiVAE", "MacridVAE", "CDAE", "ENMF", "RaCT", "RecVAE", "DiffRec", "LDiffRec",
}  # fmt: skip
"""RecBole's models that train on whole users (its ``UserDataLoader``)."""
