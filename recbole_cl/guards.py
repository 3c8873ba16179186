"""What RecBole 1.2.1 would run, or unpickle, of a text or a file that somebody gives: each place, and what is done.

RecBole evaluates texts of its configuration (``--teacher='<python>'``), reads weights and tables with pickle, and names
classes by properties. A run takes properties, logs and checkpoints from others, so none of that may run code. The
modules that do such things get stand-ins, the moment they are imported, for the few names that matter: the rest of the
process sees its libraries unchanged. :data:`SITES` tells every call of the kind in RecBole;
``tests/test_security_code.py`` reads RecBole's sources anew and fails where one is not told.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

from recbole_cl.errors import ConfigError, DataError, nearest

LITERALS = "guarded: numbers, texts, lists and the like are read; any other text stays text, or is refused"
NAMES = "guarded: one of RecBole's own teacher networks, looked up by its name"
TENSORS = "guarded: tensors and plain values are read (torch's weights_only), anything else is refused"
ARRAYS = "guarded: arrays of numbers are read (allow_pickle=False), anything else is refused"
SAFE_YAML = "guarded: PyYAML's safe loader with tuples, which makes no objects"
REFUSED = "refused: such a file cannot be read without running what it holds"
FIXED = "harmless: the module is one of RecBole's, whatever the configuration says"
NOT_TAKEN = "harmless: no model of the kind is taken through a stream"
NO_DOWNLOAD = "harmless: a stream never downloads, and a comparison with RecBole is given its files"
OWN_FILE = "guarded as all YAML, and a file of RecBole's own"

_MODEL = "model/general_recommender"
SITES: dict[tuple[str, str, str], str] = {
    ("config/configurator.py", "Config._convert_config_dict", "eval"): LITERALS,
    ("config/configurator.py", "Config._load_config_files", "yaml.load"): SAFE_YAML,
    ("config/configurator.py", "Config._update_internal_config_dict", "yaml.load"): SAFE_YAML,
    ("data/dataset/dataset.py", "Dataset._download", "download_url"): NO_DOWNLOAD,
    ("data/dataset/dataset.py", "Dataset._download", "extract_zip"): NO_DOWNLOAD,
    ("data/dataset/dataset.py", "Dataset._get_download_url", "yaml.load"): OWN_FILE,
    ("data/dataset/kg_dataset.py", "KnowledgeBasedDataset._download", "download_url"): NO_DOWNLOAD,
    ("data/dataset/kg_dataset.py", "KnowledgeBasedDataset._download", "extract_zip"): NO_DOWNLOAD,
    ("data/utils.py", "create_dataset", "importlib.import_module"): FIXED,
    ("data/utils.py", "create_dataset", "pickle.load"): REFUSED,
    ("data/utils.py", "load_split_dataloaders", "pickle.load"): REFUSED,
    ("model/context_aware_recommender/kd_dagfm.py", "KD_DAGFM.__init__", "eval"): NAMES,
    ("model/context_aware_recommender/kd_dagfm.py", "KD_DAGFM.__init__", "torch.load"): TENSORS,
    ("model/exlib_recommender/lightgbm.py", "LightGBM.load_state_dict", "lgb.Booster"): NOT_TAKEN,
    ("model/exlib_recommender/xgboost.py", "XGBoost.load_state_dict", "self.load_model"): NOT_TAKEN,
    (f"{_MODEL}/convncf.py", "ConvNCF.__init__", "torch.load"): TENSORS,
    (f"{_MODEL}/ldiffrec.py", "LDiffRec.__init__", "np.load"): ARRAYS,
    (f"{_MODEL}/nais.py", "NAIS._load_pretrain", "torch.load"): TENSORS,
    (f"{_MODEL}/neumf.py", "NeuMF.load_pretrain", "torch.load"): TENSORS,
    (f"{_MODEL}/ract.py", "RaCT.__init__", "torch.load"): TENSORS,
    ("model/sequential_recommender/s3rec.py", "S3Rec.__init__", "torch.load"): TENSORS,
    ("quick_start/quick_start.py", "load_data_and_model", "torch.load"): REFUSED,
    ("trainer/hyper_tuning.py", "HyperTuning._build_space_from_file", "eval"): LITERALS,
    ("trainer/trainer.py", "LightGBMTrainer.__init__", "__import__"): FIXED,
    ("trainer/trainer.py", "LightGBMTrainer.evaluate", "self.lgb.Booster"): NOT_TAKEN,
    ("trainer/trainer.py", "Trainer.evaluate", "torch.load"): TENSORS,
    ("trainer/trainer.py", "Trainer.resume_checkpoint", "torch.load"): TENSORS,
    ("trainer/trainer.py", "XGBoostTrainer.__init__", "__import__"): FIXED,
    ("trainer/trainer.py", "XGBoostTrainer.evaluate", "self.model.load_model"): NOT_TAKEN,
    ("utils/url.py", "decide_download", "ur.urlopen"): NO_DOWNLOAD,
    ("utils/url.py", "download_url", "ur.urlopen"): NO_DOWNLOAD,
    ("utils/url.py", "extract_zip", "f.extractall"): NO_DOWNLOAD,
    ("utils/utils.py", "get_model", "importlib.import_module"): FIXED,
    ("utils/utils.py", "get_trainer", "importlib.import_module"): FIXED,
}
"""Calls in RecBole that could run what they are given: (file, function, call) to what is done about it."""

TEACHERS = ("CrossNet", "CIN", "DAGFM")
"""Networks of RecBole's KD_DAGFM that ``teacher`` may name."""


class StandIn:
    """Stands for a module within one of RecBole's: some of its functions are ours, all else is the module's.

    Args:
        module: The module.
        own: Functions in place of the module's.
    """

    def __init__(self, module: Any, **own: Any) -> None:
        self.__dict__.update(own, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


# -- texts ----------------------------------------------------------------------------------------------------------


def literal(text: str) -> Any:
    """Reads a text as RecBole's ``Config`` evaluates it, if it is a literal: ``[64, 32]``, ``1e-3``, ``True``, ``'x'``.

    Raises:
        SyntaxError: If it is anything else; RecBole then keeps the text.
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise SyntaxError(f"{text[:80]!r} is no literal") from None


def choices(text: str) -> Any:
    """Reads the values of a ``choice`` in a file of RecBole's hyper-parameter search.

    Raises:
        ConfigError: If they are no literal.
    """
    try:
        return literal(text)
    except SyntaxError:
        raise ConfigError(
            f"params_file: the choice {text[:80]!r} is no list of values and is not evaluated; write values only, such "
            f"as [0.01,0.001] or ['[64]','[32]']"
        ) from None


def check_teacher(name: Any) -> str:
    """Returns the name of a teacher network of KD_DAGFM.

    Raises:
        ConfigError: If it is none.
    """
    if name not in TEACHERS:
        raise ConfigError(
            f"property 'teacher' is {str(name)[:80]!r}, which is none of {', '.join(TEACHERS)}"
            f"{nearest(name, TEACHERS) or '; name one of them, no text is evaluated'}"
        )
    return str(name)


def _teacher(module: ModuleType) -> Callable[[str], Any]:
    return lambda name: vars(module)[check_teacher(name)]


def check(model_classes: Sequence[type], final: Mapping[str, Any]) -> None:
    """Refuses, before a log is read, a property that RecBole would evaluate when it makes one of these models.

    Raises:
        ConfigError: If there is one.
    """
    known = {f"{cls.__module__}.{cls.__name__}" for given in model_classes for cls in given.__mro__}
    if "recbole.model.context_aware_recommender.kd_dagfm.KD_DAGFM" in known:
        check_teacher(final.get("teacher"))


# -- files ----------------------------------------------------------------------------------------------------------


def _only_tensors(*properties: str, weights: bool = True) -> Callable[..., Any]:
    """Returns a ``torch.load`` that reads tensors and plain values only.

    Args:
        properties: The properties that name the file, for messages.
        weights: The file must hold a ``state_dict`` or be one.
    """
    named = " or ".join(properties)

    def load(file: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        if file is None:
            raise ConfigError(f"{named}: no file is named; give the file with the weights")
        given = {key: value for key, value in kwargs.items() if key not in ("weights_only", "pickle_module")}
        try:
            found = torch.load(file, *args[:1], **given, weights_only=True)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise ConfigError(f"{named}: {str(file)!r} is no file; give the file with the weights") from error
        except Exception as error:
            raise ConfigError(
                f"{named}: {str(file)!r} is not read, for it does not hold tensors and plain values alone, and "
                f"anything else could run code ({' '.join(str(error).split())[:120]}). Where you trust the file, write "
                f"its weights into another one: torch.save({{'state_dict': loaded['state_dict']}}, path)"
            ) from error
        if weights and not (isinstance(found, Mapping) and isinstance(found.get("state_dict", found), Mapping)):
            raise ConfigError(f"{named}: {str(file)!r} holds no weights; give a file with a 'state_dict'")
        if weights and "state_dict" not in found:
            return {"state_dict": found}
        return found

    return load


def _only_numbers(what: str) -> Callable[..., Any]:
    """Returns an ``np.load`` that reads an array of numbers only."""

    def load(file: Any, *args: Any, **kwargs: Any) -> Any:
        import numpy as np

        try:
            found = np.load(file, allow_pickle=False)
        except FileNotFoundError as error:
            raise DataError(f"{file}: the file is missing; {what}") from error
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"{file}: it is no array of numbers, and pickled objects are not read, for they could run code "
                f"({' '.join(str(error).split())[:120]}); {what}"
            ) from error
        if not isinstance(found, np.ndarray) or found.dtype.kind not in "iuf":
            raise DataError(f"{file}: it is no array of numbers; {what}")
        return found

    return load


def _refuse(message: str) -> Callable[..., Any]:
    """Returns a function that refuses whatever it is given."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        name = getattr(args[0], "name", args[0]) if args else ""
        raise ConfigError(message.format(file=str(name)))

    return refuse


_PICKLED = (
    "dataset_save_path or dataloaders_save_path: {file!r} was written by RecBole with pickle and is not read, for it "
    "could run code; remove the file or the property, and the log is read again"
)
_MODEL_FILE = (
    "model_file: {file!r} was written by RecBole with pickle and is not read, for it could run code; load a run of "
    "RecBole-CL with recbole_cl.load(folder)"
)


# -- where they stand -----------------------------------------------------------------------------------------------


def _torch(*properties: str, weights: bool = True) -> Callable[[ModuleType], dict[str, Any]]:
    return lambda module: {"torch": StandIn(vars(module)["torch"], load=_only_tensors(*properties, weights=weights))}


def _kd_dagfm(module: ModuleType) -> dict[str, Any]:
    return {"eval": _teacher(module), **_torch("warm_up")(module)}


def _ldiffrec(module: ModuleType) -> dict[str, Any]:
    what = "LDiffRec with n_cate > 1 reads vectors of the items there, written with numpy.save, or set n_cate: 1"
    return {"np": StandIn(vars(module)["np"], load=_only_numbers(what))}


def _configurator(module: ModuleType) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """What RecBole's properties are written in; RecBole teaches it numbers, and PyYAML's own stay as they are."""

    Loader.add_constructor(
        "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(yaml.SafeLoader.construct_sequence(loader, node))
    )
    return {"eval": literal, "yaml": StandIn(yaml, FullLoader=Loader)}


def _pickle(module: ModuleType) -> dict[str, Any]:
    refuse = _refuse(_PICKLED)
    return {"pickle": StandIn(vars(module)["pickle"], load=refuse, loads=refuse, Unpickler=refuse)}


_TRAINER = ("model_file", "resume_file")
GUARDS: dict[str, Callable[[ModuleType], dict[str, Any]]] = {
    "recbole.config.configurator": _configurator,
    "recbole.data.utils": _pickle,
    "recbole.model.context_aware_recommender.kd_dagfm": _kd_dagfm,
    "recbole.model.general_recommender.convncf": _torch("pre_model_path"),
    "recbole.model.general_recommender.ldiffrec": _ldiffrec,
    "recbole.model.general_recommender.nais": _torch("pretrain_path"),
    "recbole.model.general_recommender.neumf": _torch("mf_pretrain_path", "mlp_pretrain_path"),
    "recbole.model.general_recommender.ract": _torch("pre_model_path"),
    "recbole.model.sequential_recommender.s3rec": _torch("pre_model_path"),
    "recbole.quick_start.quick_start": lambda module: {"load_data_and_model": _refuse(_MODEL_FILE)},
    "recbole.trainer.hyper_tuning": lambda module: {"eval": choices},
    "recbole.trainer.trainer": _torch(*_TRAINER, weights=False),
}
"""Module of RecBole to what its names stand for, given the module as it was imported."""


def guard(module: ModuleType) -> None:
    """Puts the stand-ins into a module; a second call does nothing."""
    if "_guarded_by_recbole_cl" not in vars(module):
        vars(module).update(GUARDS[module.__name__](module), _guarded_by_recbole_cl=True)


class _Loader(SourceFileLoader):
    """Loads a module as ever, and guards it before anybody gets it."""

    def exec_module(self, module: ModuleType) -> None:
        vars(module).pop("_guarded_by_recbole_cl", None)  # it is loaded anew
        super().exec_module(module)
        guard(module)


class _Finder(MetaPathFinder):
    """Finds the modules that are guarded, where they always are."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in GUARDS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.name, spec.origin)
        return spec


def install() -> None:
    """Guards RecBole's modules: those that are imported from now on, and those that have been; once is enough."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in GUARDS:
        if name in sys.modules:
            guard(sys.modules[name])
