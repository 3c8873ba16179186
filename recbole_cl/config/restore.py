"""A configuration as a checkpoint tells it: the effective settings, without the log and without its layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole.utils import EvaluatorType, InputType, ModelType

from recbole_cl import schema
from recbole_cl.config.components import ComponentDefaults, chosen_components
from recbole_cl.config.config import CLConfig
from recbole_cl.config.device import choose_device
from recbole_cl.config.models import get_model_class
from recbole_cl.config.strategies import asked_strategies, refuse_contradictions, settle_parameters
from recbole_cl.config.values import parse_property
from recbole_cl.errors import CheckpointError, ConfigError, nearest
from recbole_cl.registry import schedulers, strategies

_ENUMS: dict[str, Any] = {"MODEL_TYPE": ModelType, "MODEL_INPUT_TYPE": InputType, "eval_type": EvaluatorType}
_TOLD = ("repeatable_items", "model_class")
"""What :meth:`CLConfig.fingerprint` tells beside properties."""
CHANGEABLE = frozenset(
    {
        "learning_rate",
        "epochs",
        "stopping_step",
        "eval_step",
        "train_batch_size",
        "eval_batch_size",
        "stage_lr_scale",
        "stage_epochs",
        "stage_optimizer",
        "stage_ratios",
        "new_rows",
        "weight_decay",
        "warmup",
        "lr_schedule",
        "accumulate_gradients",
        "clip_grad_norm",
        "show_progress",
        "use_gpu",
        "gpu_id",
        "state",
    }
)
"""Properties that an update may set: how it trains, not what the model is."""


class RestoredConfig(CLConfig):
    """A configuration made from the settings of a checkpoint. Nothing is evaluated, and no class imported by its name.

    Args:
        settings: What :meth:`CLConfig.fingerprint` gave, read back from JSON.
        model_class: Class of the model where it is neither registered nor RecBole's.
        changes: Properties that differ from now on: ``strategy``, its parameters, those of :data:`CHANGEABLE`, and
            those that the model names (``changeable``).
        folder: Where the run lies now, wherever its ``output_dir`` was.

    Raises:
        CheckpointError: If the settings are not those of a run, or nobody here answers to the model's name.
        ConfigError: If a change is not possible.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        model_class: type | None = None,
        changes: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.folder = folder
        missing = [key for key in ("model", "model_class", "dataset", "strategy", *_ENUMS) if key not in settings]
        if missing:
            raise CheckpointError(f"checkpoint: its settings lack {', '.join(missing)}; it was not written by a run")
        self.warnings: list[str] = []
        self.parameters: dict[str, list[str]] = {}
        self.model = str(settings["model"])
        self.model_class = self._class(str(settings["model_class"]), model_class)
        self.dataset = str(settings["dataset"])
        final = {key: copy.deepcopy(value) for key, value in settings.items() if key not in _TOLD}
        for key, kind in _ENUMS.items():
            try:
                final[key] = kind[settings[key]]
            except KeyError:
                raise CheckpointError(f"checkpoint: {key} is {settings[key]!r}, which RecBole does not know") from None
        self.final_config_dict: dict[str, Any] = final
        self._repeatable_items = bool(settings["repeatable_items"])
        self._scheduler = schedulers.name_of(final["scheduler"])
        self.scheduler_class: type = schedulers.get(self._scheduler)
        self._specs = [(strategies.name_of(name), dict(parameters)) for name, parameters in settings["strategy"]]
        self._name_strategies()
        self._change(dict(changes or {}))
        owners = [self.model_class, *self.strategy_classes]
        self._parts = chosen_components([(owner, final) for owner in owners], final)
        self.warnings += choose_device(final)

    def _class(self, saved_class: str, given: type | None) -> type:
        """Returns the model's class: the given one, or who answers to its name here."""
        name = f"{given.__module__}.{given.__qualname__}" if given is not None else ""
        if given is not None and name == saved_class:
            return given
        try:
            found = get_model_class(self.model)
        except ConfigError as error:
            raise CheckpointError(
                f"checkpoint: nobody here answers to the model {self.model!r} ({saved_class}); import the module that "
                f"registers it, or give its class as model_class ({error})"
            ) from error
        if f"{found.__module__}.{found.__qualname__}" != saved_class:
            raise CheckpointError(
                f"checkpoint: it was trained with {saved_class}, but {self.model!r} is {found.__module__}."
                f"{found.__qualname__} here; give the class as model_class"
            )
        return found

    def _name_strategies(self) -> None:
        names = [name for name, _ in self._specs]
        self.strategy_classes: list[type] = [strategies.get(name) for name in names]
        self.final_config_dict["strategy"] = names[0] if len(names) == 1 else names

    # -- what an update changes -----------------------------------------------------------------------------------

    def _change(self, changes: dict[str, Any]) -> None:
        """Sets properties that may differ in an update, and the strategy with its parameters."""
        final = self.final_config_dict
        changes = {key: parse_property(key, value) for key, value in changes.items()}
        if "strategy" in changes:
            asked = asked_strategies(changes.pop("strategy"))
        else:
            asked = [(name, dict(parameters)) for name, parameters in self._specs]
        brought = [ComponentDefaults.of(name, strategies.get(name), "strategy") for name, _ in asked]
        refuse_contradictions(brought, {*final, *changes})
        own = {key for one in brought for key in one.own.values()}
        known = CHANGEABLE | own | frozenset(getattr(self.model_class, "changeable", ()))
        for key, value in changes.items():
            if key not in known:
                raise ConfigError(
                    f"property {key!r} cannot change in an update{nearest(key, known)} An update may set strategy, its "
                    f"parameters, and {', '.join(sorted(known - own))}"
                )
            if key in schema.SCHEMA:
                schema.SCHEMA[key].check(key, value)
        for one in brought:
            for key, value in one.values.items():
                final.setdefault(key, copy.deepcopy(value))
        final.update(changes)
        self._specs, _ = settle_parameters(final, asked, {one.name: one.own for one in brought})
        self._name_strategies()
