"""The class of all properties of a run: RecBole's Config with the properties of streams and strategies.

Later layers win::

    RecBole overall < ours overall < RecBole model, sample, dataset, quick start
      < ours dataset, parts, model, stream, strategy (or the defaults a component brings itself)
      < config files < config_dict < args

Our ``overall.yaml`` stands below RecBole's quick-start files, which know what a type of model needs: DeepFM keeps AUC
and LogLoss, the others get our NDCG@10. Strings are read as YAML, never evaluated; ``sys.argv``, the environment and
RecBole's global lists are left alone.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from recbole.config import Config
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import ModelType

from recbole_cl import compat, guards, schema
from recbole_cl.config.backbone import find_backbone, recbole_names, typed
from recbole_cl.config.columns import LogFiles, check_knowledge_graph, loaded_columns, open_log, settle_columns
from recbole_cl.config.components import Chosen, ComponentDefaults, check_parameters, chosen_components
from recbole_cl.config.datasets import EXAMPLE, dataset_name
from recbole_cl.config.device import choose_device
from recbole_cl.config.files import RECBOLE, component_defaults, config_file, properties_dir
from recbole_cl.config.keys import check_keys, library_keys
from recbole_cl.config.loading import check_loading
from recbole_cl.config.metrics import check_metrics, own_metrics, told_to_recbole
from recbole_cl.config.model_values import check_model_values
from recbole_cl.config.models import check_class, get_model_class
from recbole_cl.config.parity import settle
from recbole_cl.config.recbole_properties import check_for_model
from recbole_cl.config.strata import make_strata
from recbole_cl.config.strategies import asked_strategies, refuse_contradictions, settle_parameters
from recbole_cl.config.task import (
    check_negatives,
    rank_without_labels,
    settle_loss,
    settle_negatives,
    settle_repeats,
)
from recbole_cl.config.values import INTERVALS, Loader, parse_arguments, parse_property, plain, read_properties
from recbole_cl.errors import ConfigError
from recbole_cl.registry import schedulers, strategies

compat.evaluator_counts()


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
        model_class: Class of the model, with the type of its backbone where it says ``type_of_backbone``.
        backbone: The model inside the model, if it has one.
        warnings: Sentences about properties that have no effect or stand in for others.
        scheduler_class: Class of the scheduler.
        strategy_classes: Classes of the strategies, in the order of :meth:`strategy_specs`.
        log_files: The dataset's files.

    Raises:
        ConfigError: If anything that was asked for is unknown, of the wrong type, or contradicts itself.
    """

    # What a resumed run may change: where it reads and writes and what it shows. Everything that can change a number is
    # left out: use_gpu, for floating-point sums differ between devices, and worker, for RecBole's workers draw negative
    # items from generators of their own.
    RESUME_MAY_CHANGE: frozenset[str] = frozenset(
        {
            "resume", "output_dir", "show_progress", "state", "gpu_id", "checkpoint_steps", "checkpoint_keep",
            "checkpoint_dir", "saved", "serve", "data_path", "text_cache", "config_files", "log_wandb", "wandb_project",
            "save_dataset", "save_dataloaders", "loss_decimal_place",
        }
    )  # fmt: skip

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
        self.warnings += check_keys(self.external_config_dict, self.internal_config_dict, *self._classes())
        check_parameters(self.external_config_dict, self._parts, {*library_keys(), *self.internal_config_dict})
        self.final_config_dict = self._get_final_config_dict()
        self._settle_strategies()
        self._check_values()
        self._settle_columns()
        self._repeatable_items = settle_repeats(self.final_config_dict)
        self._settle_task()
        settle(self)
        self.warnings += check_for_model(self.final_config_dict, self.external_config_dict, self._classes())
        check_metrics(self.final_config_dict, self.model_class)
        make_strata(self.final_config_dict["strata"])
        try:
            self._set_default_parameters()
            self._set_train_neg_sample_args()
            self._set_eval_neg_sample_args("valid")
            self._set_eval_neg_sample_args("test")
        except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"RecBole refuses these properties: {' '.join(str(error).split())}") from error
        check_negatives(self.final_config_dict, self.model_class)
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
        return Loader

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
        return [config_file(file) for file in files]

    def _load_config_files(self, file_list: Iterable[str] | None) -> dict[str, Any]:
        return {key: value for file in file_list or () for key, value in read_properties(file).items()}

    def _load_variable_config_dict(self, config_dict: Mapping[str, Any] | None) -> dict[str, Any]:
        for key in config_dict or {}:
            if not isinstance(key, str):
                raise ConfigError(f"config_dict has the key {key!r}; properties are named by strings")
        return {key: parse_property(key, value) for key, value in (config_dict or {}).items()}

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
        self.backbone = find_backbone(model_class.__name__, model_class, self.external_config_dict)
        if self.backbone is not None and getattr(model_class, "type_of_backbone", False):
            model_class = typed(model_class, self.backbone.component)
        if not isinstance(getattr(model_class, "type", None), ModelType):
            raise ConfigError(
                f"model {model_class.__name__!r} does not say what type it has; derive it from GeneralRecommender, "
                "SequentialRecommender, ContextRecommender or KnowledgeRecommender"
            )
        check_class(model_class)
        if getattr(model_class, "type", None) == ModelType.DECISIONTREE:
            raise ConfigError(f"model {model_class.__name__!r} is a decision tree and cannot be trained in stages")
        return model_class.__name__, model_class, dataset_name(self._asked("dataset", dataset, EXAMPLE))

    def _find_components(self) -> None:
        """Resolves scheduler and strategies, before their defaults are loaded; a dataset may have a scheduler, too."""
        own = properties_dir() / "dataset" / f"{self.dataset}.yaml"
        usual = {**self._overall, **(read_properties(own) if own.is_file() else {})}
        scheduler = self.external_config_dict.get("scheduler", usual["scheduler"])
        schema.SCHEMA["scheduler"].check("scheduler", scheduler)
        self._scheduler = schedulers.name_of(scheduler)
        self.scheduler_class: type = schedulers.get(scheduler)
        asked = self.external_config_dict.get("strategy", self._overall["strategy"])
        self._asked_strategies = asked_strategies(asked)
        self.strategy_classes: list[type] = [strategies.get(name) for name, _ in self._asked_strategies]

    def _classes(self) -> list[type]:
        """Returns the class of the model and, where it has one, of the model inside it."""
        return [self.model_class, *([] if self.backbone is None else [self.backbone.component])]

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
        names = recbole_names(*self._classes())
        base = next((n for n in names if (RECBOLE / "properties" / "model" / f"{n}.yaml").is_file()), model)
        super()._load_internal_config_dict(base, model_class, dataset)

        self._above_quick_start = set(self.external_config_dict)
        own_dataset = properties_dir() / "dataset" / f"{dataset}.yaml"
        if own_dataset.is_file():
            self._add_layer(read_properties(own_dataset), schema.declared_types(own_dataset))
        own_model = component_defaults(model_class, model, "model", self.external_config_dict)
        brought = [
            ComponentDefaults.of(name, cls, "strategy")
            for (name, _), cls in zip(self._asked_strategies, self.strategy_classes, strict=True)
        ]
        if self.backbone is not None:
            self._add_layer(self.backbone.values, self.backbone.declared)
        self._parts = self._find_parts(own_model[0], brought)
        for part in self._parts:  # below those who name them, who may know better
            self._add_layer(part.defaults.values, part.defaults.declared)
        self._add_layer(*own_model)
        self._add_layer(*component_defaults(self.scheduler_class, self._scheduler, "stream"))
        refuse_contradictions(brought, self.external_config_dict)
        for own in brought:
            self._add_layer(own.values, own.declared)
        self._own_parameters = {own.name: own.own for own in brought}
        # RecBole's sequential quick start says True; the choice is ours, in settle_repeats.
        if "repeatable" not in self._above_quick_start:
            self.internal_config_dict["repeatable"] = self._overall["repeatable"]

    def _find_parts(self, of_model: Mapping[str, Any], of_strategies: Sequence[ComponentDefaults]) -> list[Chosen]:
        """Returns the components that the model and the strategies name by properties of theirs."""
        asked = self.external_config_dict
        owners: list[tuple[Any, Mapping[str, Any]]] = [(self.model_class, {**of_model, **asked})]
        for cls, brought, (_, own) in zip(self.strategy_classes, of_strategies, self._asked_strategies, strict=True):
            parsed = {brought.own.get(key, key): parse_property(key, value) for key, value in own.items()}
            owners.append((cls, {**brought.values, **asked, **parsed}))
        return chosen_components(owners, asked)

    def _add_layer(self, values: Mapping[str, Any], declared: Mapping[str, tuple[str, ...]]) -> None:
        self.internal_config_dict.update(copy.deepcopy(dict(values)))
        self._specific_keys.update(values)
        self._above_quick_start.update(values)
        # Our general keys have rules of their own, which are sharper than a type.
        self._declared.update({key: words for key, words in declared.items() if key not in schema.SCHEMA})

    def _get_final_config_dict(self) -> dict[str, Any]:
        return {**copy.deepcopy(self.internal_config_dict), **copy.deepcopy(self.external_config_dict)}

    # ---- what follows, and checks

    def _settle_strategies(self) -> None:
        """Gives each strategy its own parameters."""
        final = self.final_config_dict
        self._specs, self._dict_parameters = settle_parameters(final, self._asked_strategies, self._own_parameters)
        final["scheduler"] = self._scheduler
        if isinstance(final["strategy"], str):
            final["strategy"] = self._specs[0][0]
        for part in self._parts:
            if part.folder is None:
                final[part.key] = part.defaults.name

    def _check_values(self) -> None:
        """Checks types, choices and ranges, of the layers in one go."""
        final = self.final_config_dict
        for key in INTERVALS:
            # Unquoted in a file, "[5,10]" is a list already.
            if isinstance(final.get(key), list) and len(final[key]) == 2:
                final[key] = f"[{final[key][0]},{final[key][1]}]"
        schema.check(final)
        guards.check(self._classes(), final)
        check_model_values(self.external_config_dict, self._classes())
        if final["n_stages"] is None and self.internal_config_dict["n_stages"] is not None:
            raise ConfigError(
                f"property 'n_stages' is None; the scheduler {self._scheduler!r} needs a number of stages"
            )
        for key, words in self._declared.items():
            if key in final and (key in self.external_config_dict or key in self._dict_parameters):
                schema.check_declared(key, final[key], words)
        if final["fwt_reference"] == "stage_only":
            final["scratch"] = True  # its reference values are the scratch models'

    def _settle_columns(self) -> None:
        """Finds the dataset and makes sure that the columns which a stream needs are loaded."""
        final = self.final_config_dict
        self.log_files: LogFiles = open_log(final, self.dataset, self.warnings)
        settle_columns(final, self.log_files, self.external_config_dict, self._specific_keys)
        check_loading(final, self.log_files, self.external_config_dict)
        if hasattr(self.scheduler_class, "settle"):  # a scheduler that needs more columns than the stream does
            self.scheduler_class.settle(self)
        if final["MODEL_TYPE"] == ModelType.KNOWLEDGE:
            check_knowledge_graph(final, self.log_files, self.model)

    def _settle_task(self) -> None:
        """Fits negative samples and evaluation to the model's loss and to what the log holds."""
        final = self.final_config_dict
        settle_loss(final, self.model, self.model_class)
        settle_negatives(final, self.model, self._above_quick_start)
        labelled = final.get("threshold") is not None or final["LABEL_FIELD"] in loaded_columns(final, self.log_files)
        if final["MODEL_TYPE"] == ModelType.CONTEXT and not labelled:
            rank_without_labels(final, self._above_quick_start, self._overall)
            self.warnings.append(
                f"dataset {self.dataset!r} has no labels (no 'threshold', no column {final['LABEL_FIELD']!r}); "
                f"{self.model} is trained on sampled negatives and evaluated with {final['valid_metric']}"
            )

    def _set_default_parameters(self) -> None:
        """Lets RecBole derive what it derives, but keeps the folder that was found."""
        final = self.final_config_dict
        folder, final["data_path"] = final["data_path"], ""
        with told_to_recbole(final, self.model_class):
            super()._set_default_parameters()
        final["data_path"] = folder

    def _init_device(self) -> None:
        self.warnings += choose_device(self.final_config_dict)

    # ---- for the rest of the package

    def strategy_specs(self) -> list[tuple[str, dict[str, Any]]]:
        """Returns (registered name, own parameters without prefix) of each strategy, in the order asked for."""
        return copy.deepcopy(self._specs)

    @property
    def strategy_name(self) -> str:
        """The strategies' names, joined with ``+``."""
        return "+".join(name for name, _ in self._specs)

    @property
    def repeatable_items(self) -> bool:
        """Whether an item that a user had before may be recommended again: with ``auto``, by sequential models only."""
        return self._repeatable_items

    def component(self, key: str) -> Any:
        """Returns the class (or function) of the component that a property names (``"pcl_encoder"``).

        Raises:
            ConfigError: If the property names none in this run.
        """
        return self._part(key).component

    def component_parameters(self, key: str) -> dict[str, Any]:
        """Returns the own parameters, without prefix, of the component that a property names.

        Raises:
            ConfigError: If the property names none in this run.
        """
        return copy.deepcopy(self._part(key).parameters(self.final_config_dict))

    def _part(self, key: str) -> Chosen:
        found = {part.key: part for part in self._parts}
        if key not in found:
            known = f"those that do are {', '.join(found)}" if found else "none does"
            raise ConfigError(f"property {key!r} names no component in this run; {known}")
        return found[key]

    @property
    def own_metrics(self) -> dict[str, bool]:
        """The metrics that the model brings, name in lower case to whether more is better."""
        return own_metrics(self.model_class)

    def fingerprint(self) -> dict[str, Any]:
        """Returns all effective settings as JSON-able values, equal for two configs that ask for the same run."""
        settings = {key: plain(value) for key, value in self.final_config_dict.items()}
        settings["strategy"] = [[name, plain(parameters)] for name, parameters in self._specs]
        settings["repeatable_items"] = self.repeatable_items
        settings["model_class"] = plain(self.model_class)
        return dict(sorted(settings.items()))
