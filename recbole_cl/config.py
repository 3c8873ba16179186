"""What was asked for: RecBole's Config with the properties of streams and strategies.

Later layers win::

    RecBole overall < ours overall < RecBole model, sample, dataset, quick start
      < ours dataset, model, stream, strategy (or the defaults a component brings itself)
      < config files < config_dict < args

Our ``overall.yaml`` stands below RecBole's quick-start files, which know what a type of model needs: DeepFM keeps AUC
and LogLoss, the others get our NDCG@10. Strings are read as YAML, never evaluated; ``sys.argv``, the environment and
RecBole's global lists are left alone.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import enum
import functools
import importlib.util
import inspect
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import recbole
import yaml
from recbole.config import Config
from recbole.evaluator import metric_types
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import EvaluatorType, ModelType, argument_list

from recbole_cl import compat, distributed, parity, schema
from recbole_cl.errors import ConfigError, nearest
from recbole_cl.registry import Registry, models, schedulers, strategies

compat.evaluator_counts()

RECBOLE = Path(recbole.__file__).resolve().parent
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
# Intervals such as "[5,10]" would read as a YAML list; RecBole wants the text.
_INTERVALS = (
    "user_inter_num_interval",
    "item_inter_num_interval",
    "entity_kg_num_interval",
    "relation_kg_num_interval",
)
# Names stay text, also one that looks like a number (--dataset=2020).
_TEXTS = (
    "model",
    "dataset",
    "scheduler",
    "output_dir",
    "data_path",
    "state",
    "gpu_id",
    "checkpoint_dir",
    "period_field",
)
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


# --------------------------------------------------------------------------------------------- reading values


class _Loader(yaml.SafeLoader):
    """Safe YAML as RecBole's users write it: 1e-4 is a float, None is none, dates stay text."""


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Builds the table of implicit types for :class:`_Loader` alone; PyYAML's own classes are not touched.

    YAML 1.1 reads 1e-4 as text, 2011-06-01 as a date object (which no JSON can hold) and 12:30 as 750.
    """
    table = {
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag.rsplit(":", 1)[-1] not in ("float", "int", "timestamp", "null")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    number = re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    )
    whole = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")
    none = re.compile(r"^(?:~|null|Null|NULL|None|)$")
    for pattern, tag, firsts in (
        (number, "float", "-+0123456789."),
        (whole, "int", "-+0123456789"),
        (none, "null", "~nN"),
    ):
        for first in [*firsts, *([""] if tag == "null" else [])]:
            table.setdefault(first, []).append((f"tag:yaml.org,2002:{tag}", pattern))
    return table


_Loader.yaml_implicit_resolvers = _resolvers()


def read_properties(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a YAML file of properties.

    Args:
        path: The file.

    Returns:
        Its mapping; empty for an empty file.

    Raises:
        ConfigError: If it cannot be read, is no YAML, or is not a mapping of names.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
        values = yaml.load(content, Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the config file {str(path)!r}: {reason}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        where = " ".join(str(error).split())
        raise ConfigError(f"the config file {str(path)!r} is not valid YAML: {where}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"the config file {str(path)!r} must hold lines of the form 'property: value'")
    return values


def parse_value(text: str, *, unquote: bool = False) -> Any:
    """Reads the text of one value: ``5``, ``1e-4``, ``True``, ``None``, ``[5, 10]``, ``{rating: 4}``; else the text.

    Nothing is evaluated. Only one-line scalars, lists and mappings in brackets count: ``a: b`` and ``# x`` stay text.

    Args:
        text: What a person wrote.
        unquote: Whether ``"'5'"`` means the text ``5``, as on a command line.

    Returns:
        The value.
    """
    stripped = text.strip()
    if not stripped:
        return text
    try:
        value = yaml.load(stripped, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return text
    if isinstance(value, str):
        return value if unquote and stripped[0] in "'\"" and stripped[-1] == stripped[0] else text
    if isinstance(value, list | dict):
        return value if stripped[0] in "[{" else text
    if value is None:
        return None if stripped in ("~", "null", "Null", "NULL", "None") else text
    return value if isinstance(value, bool | int | float) else text


def _parse_property(key: str, value: Any, *, unquote: bool = False) -> Any:
    """Reads a property that was given as text; any other value is copied."""
    if not isinstance(value, str):
        return copy.deepcopy(value)
    parsed = parse_value(value, unquote=unquote)
    # A text that looks like a number stays one where a name is asked for.
    keeps_text = key in _INTERVALS or key in _TEXTS or key.endswith("_FIELD")
    return value if keeps_text and not (parsed is None or isinstance(parsed, str)) else parsed


def parse_arguments(args: Iterable[str] | None) -> dict[str, Any]:
    """Reads ``--key=value`` strings.

    Args:
        args: The strings; the value may hold ``=``, a flag without one means True.

    Returns:
        Properties by name.

    Raises:
        ConfigError: If a string is not of this form, or one property is given two values.
    """
    values: dict[str, Any] = {}
    for arg in args or ():
        key, equals, raw = str(arg)[2:].partition("=")
        if not str(arg).startswith("--") or not key:
            raise ConfigError(f"cannot read the argument {arg!r}; properties are written --name=value")
        value = _parse_property(key, raw, unquote=True) if equals else True
        if key in values and values[key] != value:
            raise ConfigError(f"property {key!r} is given twice, as {values[key]!r} and as {value!r}; keep one")
        values[key] = value
    return values


# ------------------------------------------------------------------------------------------ finding properties


def properties_dir() -> Path:
    """Returns the folder of our properties: inside the installed package, or beside it in a checkout.

    Raises:
        ConfigError: If neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "properties", package.parent / "properties"):
        if (folder / "overall.yaml").is_file():
            return folder
    raise ConfigError("the folder 'properties' with RecBole-CL's defaults is missing; install the package again")


def _file_beside(component: type) -> Path | None:
    """Returns ``<ClassName>.yaml`` beside the module that defines a class, if there is one."""
    with contextlib.suppress(TypeError, OSError):
        file = Path(inspect.getfile(component)).with_name(f"{component.__name__}.yaml")
        if file.is_file():
            return file
    return None


def component_defaults(component: type, name: str, folder: str) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """Finds the defaults of a strategy, scheduler or model.

    Args:
        component: Its class.
        name: Its registered name.
        folder: Folder below ``properties`` that our own ones are in.

    Returns:
        The defaults from ``properties/<folder>/<name>.yaml``, else from ``<ClassName>.yaml`` beside the class's module,
        else from its attribute ``defaults``; and the types that the file's comments declare.
    """
    own = properties_dir() / folder / f"{name}.yaml"
    file = own if own.is_file() else _file_beside(component)
    if file is not None:
        return read_properties(file), schema.declared_types(file)
    return copy.deepcopy(dict(getattr(component, "defaults", None) or {})), {}


_READS = re.compile(r"config\[\s*[\"'](\w+)[\"']\s*\]")
_KEYS = re.compile(r"^([A-Za-z_]\w*)\s*:", re.MULTILINE)


def _keys_of(files: Iterable[Path], pattern: re.Pattern[str]) -> set[str]:
    found: set[str] = set()
    for file in files:
        found.update(pattern.findall(file.read_text(encoding="utf-8", errors="replace")))
    return found


@functools.lru_cache(maxsize=1)
def _base_keys() -> frozenset[str]:
    """Keys that mean something to every run: RecBole's argument lists and its and our general properties."""
    lists = (getattr(argument_list, name) for name in dir(argument_list) if name.endswith("_arguments"))
    files = [
        RECBOLE / "properties" / "overall.yaml",
        RECBOLE / "properties" / "dataset" / "sample.yaml",
        properties_dir() / "overall.yaml",
    ]
    return frozenset(key for keys in lists for key in keys) | _keys_of(files, _KEYS) | {*_HIDDEN_KEYS}


@functools.lru_cache(maxsize=1)
def _library_keys() -> frozenset[str]:
    """Keys that anything in RecBole or here declares in a properties file or reads as ``config["key"]``."""
    declared = _keys_of((RECBOLE / "properties").rglob("*.yaml"), _KEYS) | _keys_of(
        properties_dir().rglob("*.yaml"), _KEYS
    )
    here = Path(__file__).resolve().parent
    read = _keys_of([*RECBOLE.rglob("*.py"), *here.rglob("*.py")], _READS)
    return _base_keys() | declared | read


# ----------------------------------------------------------------------------------------------------- models


@functools.lru_cache(maxsize=1)
def _recbole_models() -> dict[str, tuple[str, str]]:
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
    names = {name.lower(): name for name, module in _recbole_models().values() if "exlib" not in module}
    names.update({name.lower(): name for name in models})
    return sorted(names.values(), key=str.lower)


def list_recbole_models() -> list[str]:
    """Returns those of :func:`list_models` that RecBole brings, also where ours stands in for one of them."""
    return [name for name in list_models() if name.lower() in _recbole_models()]


def list_metrics() -> list[str]:
    """Returns the names of RecBole's metrics as its users write them."""
    from recbole.evaluator.register import metrics_dict

    return sorted((cls.__name__ for cls in metrics_dict.values()), key=str.lower)


def get_model_class(name: str) -> type:
    """Returns the model called ``name``, whatever its case: ours first, then RecBole's.

    Raises:
        ConfigError: If nobody answers to the name, the model needs a package that is not installed or something that
            streams do not make, or it is a decision tree, which is fitted once and cannot go on from stage to stage.
    """
    if name in models:
        return models.get(name)
    known = _recbole_models().get(str(name).lower())
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


# --------------------------------------------------------------------------------------------------- datasets

_EXAMPLE = "ml-100k"
_DATA_VARIABLE = "RECBOLE_CL_DATA"


def _roots() -> list[Path]:
    variable = os.environ.get(_DATA_VARIABLE)
    return [*([Path(variable).expanduser()] if variable else []), Path("dataset")]


def list_datasets(data_path: str | None = None) -> list[str]:
    """Returns the names of the datasets that can be found: ml-100k and those in the search folders.

    Args:
        data_path: A folder to search as well.
    """
    found = {_EXAMPLE}
    for root in [*([Path(data_path).expanduser()] if data_path else []), *_roots()]:
        if root.is_dir():
            found.update(folder.name for folder in root.iterdir() if (folder / f"{folder.name}.inter").is_file())
    return sorted(found, key=str.lower)


def find_dataset(dataset: str, data_path: str | None = None) -> Path:
    """Returns the folder that holds ``<dataset>.inter``. Nothing is ever downloaded.

    Args:
        dataset: Name of the dataset.
        data_path: The folder, or the one above it. Default: RecBole's own example for ml-100k,
            ``$RECBOLE_CL_DATA/<dataset>``, ``./dataset/<dataset>``, in this order, also after a ``data_path``.

    Raises:
        ConfigError: If no folder has it; the message lists those that were looked at.
    """
    if not dataset or dataset in (".", "..") or re.search(r"[/\\\x00]", dataset):
        raise ConfigError(f"dataset {dataset!r} is not a name; give the folder as data_path and the name as dataset")
    folders: list[Path] = []
    if data_path:
        root = Path(data_path).expanduser()
        folders += [root / dataset, root]
    if dataset == _EXAMPLE:
        folders.append(RECBOLE / "dataset_example" / _EXAMPLE)
    folders += [root / dataset for root in _roots()]
    for folder in folders:
        if (folder / f"{dataset}.inter").is_file():
            return folder.resolve()
    looked = ", ".join(str(folder) for folder in folders)
    raise ConfigError(
        f"dataset {dataset!r} was not found{nearest(dataset, list_datasets(data_path))}; looked for {dataset}.inter "
        f"in {looked}. Set data_path or ${_DATA_VARIABLE} to the folder that holds the folder {dataset!r}"
    )


# ------------------------------------------------------------------------------------------------------ config


class CLConfig(Config):
    """All properties of a run; accepted wherever RecBole takes its ``Config``.

    Args:
        model: Name or class of the model. Default: the property ``model``.
        dataset: Name of the dataset. Default: the property ``dataset``.
        config_file_list: YAML files; later ones win.
        config_dict: Properties that win over the files; neither it nor what it holds is changed. Values that are text
            are read as YAML where that gives something else than text (``"[64, 32]"``).
        args: ``--key=value`` strings that win over everything; None reads none.

    Attributes:
        warnings: Sentences about properties that have no effect or stand in for others.
        scheduler_class: Class of the scheduler.
        strategy_classes: Classes of the strategies, in the order of :meth:`strategy_specs`.

    Raises:
        ConfigError: If anything that was asked for is unknown, of the wrong type, or contradicts itself.
    """

    # What a resumed run may change: where it reads and writes and what it shows. Everything that can change a number is
    # left out: use_gpu, for floating-point sums differ between devices, and worker, for RecBole's workers draw negative
    # items from generators of their own.
    RESUME_MAY_CHANGE: frozenset[str] = frozenset(
        {
            "resume",
            "output_dir",
            "show_progress",
            "state",
            "gpu_id",
            "checkpoint_steps",
            "checkpoint_keep",
            "checkpoint_dir",
            "saved",
            "data_path",
            "config_files",
            "log_wandb",
            "wandb_project",
            "save_dataset",
            "save_dataloaders",
            "loss_decimal_place",
        }
    )

    def __init__(
        self,
        model: str | type | None = None,
        dataset: str | None = None,
        config_file_list: Sequence[str | os.PathLike[str]] | str | None = None,
        config_dict: Mapping[str, Any] | None = None,
        args: Iterable[str] | None = None,
    ) -> None:
        # RecBole's own constructor reads sys.argv and evaluates strings: its pieces are called instead.
        self.warnings: list[str] = []
        self.compatibility_settings()
        self._init_parameters_category()
        self.yaml_loader = self._build_yaml_loader()
        self.cmd_config_dict = parse_arguments(args)
        self.variable_config_dict = self._load_variable_config_dict(config_dict)
        self.file_config_dict = self._load_config_files(self._files(config_file_list))
        self._merge_external_config_dict()

        self._overall = read_properties(properties_dir() / "overall.yaml")
        self.model, self.model_class, self.dataset = self._get_model_and_dataset(model, dataset)
        compat.anomaly_mode_off()
        self._find_components()
        self._load_internal_config_dict(self.model, self.model_class, self.dataset)
        self._check_unknown()
        self.final_config_dict = self._get_final_config_dict()
        self._settle_strategies()
        self._check_values()
        self._settle_dataset()
        self._settle_repeats()
        self._settle_task()
        parity.settle(self)
        self._check_metrics()
        try:
            self._set_default_parameters()
            self._set_train_neg_sample_args()
            self._set_eval_neg_sample_args("valid")
            self._set_eval_neg_sample_args("test")
        except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"RecBole refuses these properties: {' '.join(str(error).split())}") from error
        self._init_device()

    # ---- reading

    def _init_parameters_category(self) -> None:
        """Copies RecBole's lists of arguments: it appends a dataset's keys to them, for the rest of the process."""
        super()._init_parameters_category()
        shared: dict[str, list[str]] = vars(self)["parameters"]
        self.parameters: dict[str, list[str]] = {category: list(keys) for category, keys in shared.items()}
        self.parameters["Continual"] = sorted(schema.SCHEMA.keys() - {k for v in self.parameters.values() for k in v})

    def _build_yaml_loader(self) -> type[yaml.SafeLoader]:
        """Returns our safe loader; RecBole's is unsafe enough to build tuples and grows PyYAML's FullLoader."""
        return _Loader

    def compatibility_settings(self) -> None:
        """Does nothing: :mod:`recbole_cl.compat` has been applied when the package was imported."""

    def _files(self, config_file_list: Sequence[str | os.PathLike[str]] | str | None) -> list[str]:
        """Returns the config files, those of the property ``config_files`` last."""
        files: list[str | os.PathLike[str]] = []
        if isinstance(config_file_list, str | os.PathLike):
            files.append(config_file_list)
        else:
            files.extend(config_file_list or ())
        asked = self.cmd_config_dict.pop("config_files", None)
        files += asked.split() if isinstance(asked, str) else list(asked or ())
        return [os.fspath(file) for file in files]

    def _load_config_files(self, file_list: Iterable[str] | None) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for file in file_list or ():
            values.update(read_properties(file))
        return values

    def _load_variable_config_dict(self, config_dict: Mapping[str, Any] | None) -> dict[str, Any]:
        for key in config_dict or {}:
            if not isinstance(key, str):
                raise ConfigError(f"config_dict has the key {key!r}; properties are named by strings")
        return {key: _parse_property(key, value) for key, value in (config_dict or {}).items()}

    # ---- who answers to the names

    def _asked(self, key: str, given: Any, example: str) -> Any:
        value = given if given is not None else self.external_config_dict.get(key)
        if value is None or value == "":
            raise ConfigError(f"no {key} was given; name one, e.g. --{key}={example}")
        return value

    def _get_model_and_dataset(self, model: str | type | None, dataset: str | None) -> tuple[str, type, str]:
        """Resolves model and dataset; a model may be a class, a dataset is looked for later."""
        asked = self._asked("model", model, "SASRec")
        model_class = asked if isinstance(asked, type) else get_model_class(str(asked))
        if not issubclass(model_class, AbstractRecommender):
            raise ConfigError(f"model {model_class.__name__!r} is not a subclass of RecBole's AbstractRecommender")
        if not isinstance(getattr(model_class, "type", None), ModelType):
            raise ConfigError(
                f"model {model_class.__name__!r} does not say what type it has; derive it from GeneralRecommender, "
                "SequentialRecommender, ContextRecommender or KnowledgeRecommender"
            )
        if getattr(model_class, "type", None) == ModelType.DECISIONTREE:
            raise ConfigError(f"model {model_class.__name__!r} is a decision tree and cannot be trained in stages")
        return model_class.__name__, model_class, str(self._asked("dataset", dataset, _EXAMPLE))

    def _find_components(self) -> None:
        """Resolves scheduler and strategies, before their defaults are loaded."""
        scheduler = self.external_config_dict.get("scheduler", self._overall["scheduler"])
        schema.SCHEMA["scheduler"].check("scheduler", scheduler)
        self._scheduler = schedulers.name_of(scheduler)
        self.scheduler_class: type = schedulers.get(scheduler)
        asked = self.external_config_dict.get("strategy", self._overall["strategy"])
        schema.SCHEMA["strategy"].check("strategy", asked)
        self._asked_strategies = [(_name_of(strategies, name), own) for name, own in _strategy_list(asked)]
        names = [name for name, _ in self._asked_strategies]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"property 'strategy' names {twice!r} twice; keep one")
        self.strategy_classes: list[type] = [strategies.get(name) for name in names]

    # ---- layers

    def _update_internal_config_dict(self, file: str) -> dict[str, Any]:
        """Adds one of RecBole's files; ours follows directly after RecBole's overall.yaml."""
        values = read_properties(file)
        self.internal_config_dict.update(values)
        path = Path(file).resolve()
        if path == RECBOLE / "properties" / "overall.yaml":
            self.internal_config_dict.update(copy.deepcopy(self._overall))
        elif path.name != "sample.yaml":
            self._specific_keys.update(values)
        return values

    def _load_internal_config_dict(self, model: str, model_class: type, dataset: str) -> None:
        """Merges the defaults: RecBole's, then ours, then those that components bring."""
        self._specific_keys: set[str] = set()  # set by a file about this model, type or dataset
        self._declared: dict[str, tuple[str, ...]] = {}
        # A subclass of one of RecBole's models starts from that model's file and quick start.
        ancestors = [cls.__name__ for cls in model_class.__mro__[1:] if cls.__module__.startswith("recbole.model.")]
        backbone, backbone_defaults = self._backbone(model, model_class)
        yaml_names = [model, *backbone, *(name for name in ancestors if name.lower() in _recbole_models())]
        base = next((n for n in yaml_names if (RECBOLE / "properties" / "model" / f"{n}.yaml").is_file()), model)
        super()._load_internal_config_dict(base, model_class, dataset)

        self._above_quick_start: set[str] = set(self.external_config_dict)
        own_dataset = properties_dir() / "dataset" / f"{dataset}.yaml"
        if own_dataset.is_file():
            self._add_layer(read_properties(own_dataset), schema.declared_types(own_dataset))
        for layer in backbone_defaults:
            self._add_layer(*layer)
        self._add_layer(*component_defaults(model_class, model, "model"))
        self._add_layer(*component_defaults(self.scheduler_class, self._scheduler, "stream"))
        self._own_parameters: dict[str, dict[str, str]] = {}
        general: dict[str, tuple[str, Any]] = {}  # general properties that a strategy sets: who, to what
        for (name, _), cls in zip(self._asked_strategies, self.strategy_classes, strict=True):
            defaults, declared = component_defaults(cls, name, "strategy")
            prefix = getattr(cls, "prefix", None) or name.lower()
            flat = {key: _flat_key(key, prefix) for key in defaults}
            # {parameter without prefix: property}
            self._own_parameters[name] = {
                key.removeprefix(f"{prefix}_"): key for key in flat.values() if key.startswith(f"{prefix}_")
            }
            asked = {*self._own_parameters[name].values(), *self.external_config_dict}
            for key, value in ((flat[own], value) for own, value in defaults.items() if flat[own] not in asked):
                other, theirs = general.setdefault(key, (name, value))
                if theirs != value:
                    raise ConfigError(
                        f"strategy: {other} sets the property {key!r} to {theirs!r}, {name} to {value!r}; say which "
                        f"with --{key}=..."
                    )
            self._add_layer(
                {flat[key]: value for key, value in defaults.items()},
                {flat.get(key, key): words for key, words in declared.items()},
            )
        # RecBole's sequential quick start says True; the choice is ours, in _settle_repeats.
        if "repeatable" not in self._above_quick_start:
            self.internal_config_dict["repeatable"] = self._overall["repeatable"]

    def _backbone(self, model: str, model_class: type) -> tuple[list[str], list[Any]]:
        """Returns name and own defaults of the model inside a model, which its class names by ``backbone_property``."""
        key = getattr(model_class, "backbone_property", None)
        if key is None:
            return [], []
        asked = self.external_config_dict.get(key, component_defaults(model_class, model, "model")[0].get(key))
        inner = get_model_class(str(asked))
        if getattr(inner, "type", None) != ModelType.SEQUENTIAL or hasattr(inner, "backbone_property"):
            raise ConfigError(f"{key}: {asked!r} cannot be the backbone of {model}; name a sequential model, as SASRec")
        return [inner.__name__], [component_defaults(inner, inner.__name__, "model")]

    def _add_layer(self, values: Mapping[str, Any], declared: Mapping[str, tuple[str, ...]]) -> None:
        self.internal_config_dict.update(copy.deepcopy(dict(values)))
        self._specific_keys.update(values)
        self._above_quick_start.update(values)
        # Our general keys have rules of their own, which are sharper than a type.
        self._declared.update({key: words for key, words in declared.items() if key not in schema.SCHEMA})

    def _get_final_config_dict(self) -> dict[str, Any]:
        return {**copy.deepcopy(self.internal_config_dict), **copy.deepcopy(self.external_config_dict)}

    # ---- checks

    def _check_unknown(self) -> None:
        """Refuses a key that looks like a slip of a known one; keeps any other unknown key with a warning."""
        known = {*_library_keys(), *self.internal_config_dict}
        for cls in self.model_class.__mro__:
            if cls.__module__.partition(".")[0] not in ("recbole", "torch", "builtins", "typing"):
                with contextlib.suppress(TypeError, OSError):
                    known.update(_READS.findall(inspect.getsource(inspect.getmodule(cls) or cls)))
        idle = {
            key: file.stem for file in (properties_dir() / "strategy").glob("*.yaml") for key in _keys_of([file], _KEYS)
        }
        for key in self.external_config_dict:
            if key in known:
                if key in idle and key not in self.internal_config_dict and key not in _base_keys():
                    self.warnings.append(
                        f"property {key!r} has no effect: it belongs to the strategy {idle[key]!r}, which is not used"
                    )
                continue
            close = difflib.get_close_matches(key.lower(), {k.lower() for k in known}, n=1, cutoff=0.8)
            if close:
                right = next(k for k in sorted(known) if k.lower() == close[0])
                raise ConfigError(f"unknown property {key!r}; did you mean {right!r}?")
            self.warnings.append(f"unknown property {key!r} is kept, but nothing here reads it")

    def _check_values(self) -> None:
        """Checks types, choices and ranges, of the layers in one go."""
        final = self.final_config_dict
        for key in _INTERVALS:
            # Unquoted in a file, "[5,10]" is a list already.
            if isinstance(final.get(key), list) and len(final[key]) == 2:
                final[key] = f"[{final[key][0]},{final[key][1]}]"
        schema.check(final)
        if final["n_stages"] is None and self.internal_config_dict["n_stages"] is not None:
            raise ConfigError(
                f"property 'n_stages' is None; the scheduler {self._scheduler!r} needs a number of stages"
            )
        for key, words in self._declared.items():
            if key in final and (key in self.external_config_dict or key in self._dict_parameters):
                schema.check_declared(key, final[key], words)
        if final["fwt_reference"] == "stage_only":
            final["scratch"] = True  # its reference values are the scratch models'

    def _check_metrics(self) -> None:
        """Checks that the metrics exist, go together, fit the way of evaluation and hold the validation metric."""
        final = self.final_config_dict
        if isinstance(final["metrics"], str):
            final["metrics"] = [final["metrics"]]
        metrics = list(final["metrics"])
        for metric in metrics:
            if metric.lower() not in metric_types:
                hint = nearest(metric, list_metrics()) or f"; known: {', '.join(list_metrics())}"
                raise ConfigError(f"unknown metric {metric!r} in property 'metrics'{hint}")
        kinds = {metric_types[metric.lower()] for metric in metrics}
        if len(kinds) > 1:
            value = [metric for metric in metrics if metric_types[metric.lower()] == EvaluatorType.VALUE]
            raise ConfigError(
                f"property 'metrics' is {metrics!r}: {', '.join(value)} judge single scores, the others rankings; "
                "keep one kind"
            )
        topk = final["topk"] if isinstance(final["topk"], list | tuple) else [final["topk"]]
        final["topk"] = list(topk)
        ranking = kinds == {EvaluatorType.RANKING}
        name, at, k = final["valid_metric"].partition("@")
        computed = [f"{metric}@{n}" for metric in metrics for n in topk] if ranking else metrics
        if name.lower() not in {metric.lower() for metric in metrics}:
            raise ConfigError(
                f"property 'valid_metric' is {final['valid_metric']!r}, but property 'metrics' is {metrics!r}; "
                f"add {name!r} to metrics or set valid_metric to one of {', '.join(computed)}"
            )
        if final["valid_metric"].lower() not in {metric.lower() for metric in computed}:
            raise ConfigError(
                f"property 'valid_metric' is {final['valid_metric']!r}, but property 'metrics' {metrics!r} with "
                f"property 'topk' {topk!r} gives {', '.join(computed)}; set it to one of them"
                + (f" or add {k} to topk" if ranking and at else "")
            )
        modes = final["eval_args"].get("mode", "full")
        for mode in set(modes.values()) if isinstance(modes, dict) else {modes}:
            if not isinstance(mode, str) or not re.fullmatch(r"full|labeled|(uni|pop)[1-9]\d*", mode):
                raise ConfigError(
                    f"property 'eval_args' has the mode {mode!r}; it must be 'full', 'labeled', or 'uni' or 'pop' and "
                    "a number of sampled items, such as 'uni100'"
                )
            if (ranking and mode == "labeled") or (not ranking and mode == "full"):
                raise ConfigError(
                    f"property 'metrics' is {metrics!r}, which {'rank items' if ranking else 'judge single scores'}, "
                    f"but property 'eval_args' has the mode {mode!r}; use the mode "
                    + ("'full' or 'uni100', or the metrics AUC and LogLoss" if ranking else "'labeled' or 'uni100'")
                )

    # ---- what follows from other properties

    def _settle_strategies(self) -> None:
        """Merges each strategy's own parameters: flat properties, and over them those of the dict form."""
        final = self.final_config_dict
        self._specs: list[tuple[str, dict[str, Any]]] = []
        self._dict_parameters: set[str] = set()
        for name, given in self._asked_strategies:
            own = self._own_parameters[name]
            flat_names = {flat: parameter for parameter, flat in own.items()}
            told: set[str] = set()
            for key, value in given.items():
                parameter = key if key in own else flat_names.get(key)
                if parameter is None:
                    known = f" Known: {', '.join(sorted(own))}" if own else f" {name} has no parameters"
                    hint = nearest(key, [*own, *flat_names]) or "."
                    raise ConfigError(f"unknown parameter {key!r} of strategy {name!r}{hint}{known}")
                if parameter in told:
                    raise ConfigError(f"strategy {name!r} is given the parameter {parameter!r} twice; keep one")
                told.add(parameter)
                # The flat property follows, so that there is one truth.
                final[own[parameter]] = _parse_property(parameter, value)
                self._dict_parameters.add(own[parameter])
            self._specs.append((name, {parameter: final[flat] for parameter, flat in own.items()}))
        final["scheduler"] = self._scheduler
        if isinstance(final["strategy"], str):
            final["strategy"] = self._specs[0][0]

    def _settle_dataset(self) -> None:
        """Finds the folder, reads the header, and makes sure that the columns a stream needs are loaded."""
        final = self.final_config_dict
        if final.get("benchmark_filename"):
            raise ConfigError(
                f"property 'benchmark_filename' is {final['benchmark_filename']!r}: stages are cut from one file "
                f"{self.dataset}.inter; join the files and leave the property out"
            )
        asked = final["data_path"]
        self._folder = find_dataset(self.dataset, asked)
        if asked and self._folder not in (Path(asked).expanduser().resolve() / p for p in ("", self.dataset)):
            self.warnings.append(f"{self.dataset}.inter is not in data_path {asked!r}; {self._folder} is read instead")
        final["data_path"] = str(self._folder)
        self._columns = self._read_header()
        fields = [final[key] for key in ("USER_ID_FIELD", "ITEM_ID_FIELD")]
        for key, field in zip(("USER_ID_FIELD", "ITEM_ID_FIELD"), fields, strict=True):
            self._check_columns(key, [field])
        if "period_field" in self.external_config_dict:
            self._settle_period_field()
        if "threshold" in self.external_config_dict:
            self._check_columns("threshold", list(final["threshold"] or ()))
        needed = [final["TIME_FIELD"], final.get("period_field"), *(final.get("threshold") or {})]
        if final.get("load_col") is not None:
            columns = final["load_col"].get("inter")
            if "load_col" not in self._specific_keys and "load_col" not in self.external_config_dict:
                # RecBole's last resort loads users and items only; a stream needs to know when.
                columns = [*fields, final["RATING_FIELD"], final["LABEL_FIELD"]]
            else:
                self._check_columns("load_col", columns)
            if isinstance(columns, list | tuple):
                wanted = dict.fromkeys([*columns, *(field for field in needed if field)])
                final["load_col"] = {**final["load_col"], "inter": [c for c in wanted if c in self._columns]}
        if hasattr(self.scheduler_class, "settle"):  # a scheduler that needs more columns than the stream does
            self.scheduler_class.settle(self)
        if final["MODEL_TYPE"] == ModelType.KNOWLEDGE:
            for suffix in ("kg", "link"):
                if not (self._folder / f"{self.dataset}.{suffix}").is_file():
                    raise ConfigError(
                        f"model {self.model!r} learns from a knowledge graph, but dataset {self.dataset!r} has no file "
                        f"{self.dataset}.{suffix}; use another model or add the file"
                    )

    def _settle_period_field(self) -> None:
        """Lets a stage be named by a column of the interactions or, for Domains, of the items, which is then loaded."""
        final = self.final_config_dict
        field = final["period_field"]
        items = self._folder / f"{self.dataset}.item"
        if field in self._columns or not items.is_file():
            self._check_columns("period_field", [field])
            return
        with items.open(encoding=final.get("encoding") or "utf-8") as lines:
            header = lines.readline().rstrip("\r\n").split(final["field_separator"])
        columns = [column.partition(":")[0] for column in header]
        if field not in columns:
            known = [*self._columns, *columns]
            hint = nearest(field, known) or f". They have {', '.join(known)}"
            raise ConfigError(
                f"property 'period_field' names {field!r}, which is no column of {self.dataset}.inter or .item{hint}"
            )
        load = final.get("load_col")
        if load is not None:
            asked = load.get("item") or []
            wanted = "*" if asked == "*" else list(dict.fromkeys([final["ITEM_ID_FIELD"], *asked, field]))
            final["load_col"] = {**load, "item": wanted}

    def _check_columns(self, key: str, fields: Any) -> None:
        """Checks that columns which were asked for are in the interaction file; RecBole's defaults need not be."""
        if key not in self.external_config_dict and not key.endswith("_ID_FIELD"):
            return
        for field in fields if isinstance(fields, list | tuple) else ():
            if field is not None and field not in self._columns:
                hint = nearest(field, self._columns) or f". It has {', '.join(self._columns)}"
                raise ConfigError(f"property {key!r} names {field!r}, which is no column of {self.dataset}.inter{hint}")

    def _read_header(self) -> list[str]:
        """Returns the names of the columns of the interaction file."""
        file = self._folder / f"{self.dataset}.inter"
        try:
            with file.open(encoding=self.final_config_dict.get("encoding") or "utf-8") as lines:
                header = lines.readline().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {file.name} of dataset {self.dataset!r}: {error}") from error
        separator = self.final_config_dict["field_separator"]
        columns = [column.partition(":") for column in header.split(separator)]
        if any(not kind for _, _, kind in columns):
            raise ConfigError(
                f"the first line of {file.name} is {header[:80]!r}; it must name each column and its type, separated "
                f"by property 'field_separator' {separator!r}, as in 'user_id:token'"
            )
        return [name for name, _, _ in columns]

    def _settle_repeats(self) -> None:
        """Resolves ``repeatable``: RecBole refuses sequential models without it, whatever its user wants."""
        final = self.final_config_dict
        choice = final["repeatable"]
        if isinstance(choice, str):
            choice = {"true": True, "false": False}.get(choice.lower(), "auto")
        sequential = final["MODEL_TYPE"] == ModelType.SEQUENTIAL
        self._repeatable_items = sequential if choice == "auto" else choice
        final["repeatable"] = True if sequential else self._repeatable_items

    @property
    def repeatable_items(self) -> bool:
        """Whether an item that a user had before may be recommended again: with ``auto``, by sequential models only."""
        return self._repeatable_items

    def _settle_task(self) -> None:
        """Fits negative samples and evaluation to the model's loss and to what the log holds."""
        final = self.final_config_dict
        asked = self._above_quick_start
        if final["MODEL_TYPE"] == ModelType.SEQUENTIAL and final.get("loss_type") == "CE":
            # Cross-entropy is over all items. RecBole's default asks for a negative each and is then refused.
            given = final.get("train_neg_sample_args") if "train_neg_sample_args" in asked else None
            distribution = given.get("distribution", "uniform") if isinstance(given, dict) else given
            if distribution not in (None, "None", "none"):
                raise ConfigError(
                    f"property 'train_neg_sample_args' is {given!r}, but model {self.model!r} has loss_type 'CE', "
                    "which compares with all items; leave it out or set loss_type to 'BPR'"
                )
            final["train_neg_sample_args"] = None
        labelled = final.get("threshold") is not None or final["LABEL_FIELD"] in self._loaded_columns()
        if final["MODEL_TYPE"] == ModelType.CONTEXT and not labelled:
            # RecBole's quick start takes a context-aware model for a classifier of labelled rows: no negative samples,
            # AUC and LogLoss. It fails on a log without labels. There the model learns to tell what was taken from
            # sampled items, and is judged as a ranker, as its users set by hand; of 100 sampled items and the target,
            # since such a model has to compute each pair anew. Whatever is set explicitly stays.
            if "train_neg_sample_args" not in asked:
                final["train_neg_sample_args"] = {"distribution": "uniform", "sample_num": 1}
            if "eval_args" not in asked:
                final["eval_args"] = {**final["eval_args"], "mode": "uni100"}
            if not asked & {"metrics", "valid_metric"}:
                final.update({key: copy.deepcopy(self._overall[key]) for key in ("metrics", "valid_metric")})
            self.warnings.append(
                f"dataset {self.dataset!r} has no labels (no 'threshold', no column {final['LABEL_FIELD']!r}); "
                f"{self.model} is trained on sampled negatives and evaluated with {final['valid_metric']}"
            )

    def _loaded_columns(self) -> list[str]:
        """Returns the columns of the interaction file that RecBole will load."""
        load = self.final_config_dict.get("load_col")
        if load is None or load.get("inter") == "*":
            return self._columns
        return [column for column in self._columns if column in (load.get("inter") or ())]

    def _set_default_parameters(self) -> None:
        """Lets RecBole derive what it derives, but keeps the folder that was found."""
        final = self.final_config_dict
        folder, final["data_path"] = final["data_path"], ""
        try:
            super()._set_default_parameters()
        finally:
            final["data_path"] = folder

    def _init_device(self) -> None:
        """Chooses the device. CUDA_VISIBLE_DEVICES is not touched: it would hold for everything in the process."""
        import torch

        final = self.final_config_dict
        gpu = final.get("gpu_id")
        ids = gpu if isinstance(gpu, list | tuple) else str("" if gpu is None else gpu).strip("()[] ").split(",")
        ids = [str(i).strip() for i in ids if str(i).strip()]
        final["gpu_id"] = ",".join(ids)
        final["single_spec"] = True
        final["local_rank"] = 0
        final["device"] = torch.device("cpu")
        if not final["use_gpu"] or not ids:
            return
        if not torch.cuda.is_available():
            self.warnings.append("property 'use_gpu' is True, but torch finds no CUDA device: the run uses the CPU")
            return
        if distributed.launched():  # one GPU a process; CUDA_VISIBLE_DEVICES chooses among them
            ids = [os.environ["LOCAL_RANK"]]
            if int(ids[0]) >= torch.cuda.device_count():
                raise ConfigError(
                    f"torchrun: process {ids[0]} of this machine has no GPU, there are {torch.cuda.device_count()}; "
                    f"start as many with --nproc_per_node, or set use_gpu to False"
                )
        if not ids[0].isdigit() or int(ids[0]) >= torch.cuda.device_count():
            raise ConfigError(
                f"property 'gpu_id' is {gpu!r}, but the GPUs here are numbered 0 to {torch.cuda.device_count() - 1}"
            )
        final["device"] = torch.device("cuda", int(ids[0]))

    # ---- for the rest of the package

    def strategy_specs(self) -> list[tuple[str, dict[str, Any]]]:
        """Returns (registered name, own parameters without prefix) of each strategy, in the order asked for."""
        return copy.deepcopy(self._specs)

    @property
    def strategy_name(self) -> str:
        """The strategies' names, joined with ``+``."""
        return "+".join(name for name, _ in self._specs)

    def fingerprint(self) -> dict[str, Any]:
        """Returns all effective settings as JSON-able values, equal for two configs that ask for the same run."""
        settings = {key: _plain(value) for key, value in self.final_config_dict.items()}
        settings["strategy"] = [[name, _plain(parameters)] for name, parameters in self._specs]
        settings["repeatable_items"] = self.repeatable_items
        settings["model_class"] = _plain(self.model_class)
        return dict(sorted(settings.items()))


def _name_of(registry: Registry, name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise ConfigError(f"a {registry.kind} is named by text, not by {name!r}")
    return registry.name_of(name)


def _strategy_list(asked: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Returns (name, own parameters) for every form that the property ``strategy`` may have."""
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
        found += _strategy_list(entry)
    return found


def _flat_key(key: str, prefix: str) -> str:
    """Returns the property of a strategy's default: a general one keeps its name, its own ones get the prefix."""
    return key if key.startswith(f"{prefix}_") or key in _base_keys() else f"{prefix}_{key}"


def _plain(value: Any) -> Any:
    """Returns a JSON-able stand-in for a setting, without anything that differs from process to process."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, type) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "tolist"):  # numpy and torch
        return _plain(value.tolist())
    # An object's default text holds its address.
    return str(value) if type(value).__str__ is not object.__str__ else type(value).__qualname__
