"""What ``parity: recbole`` means for the other properties (:mod:`recbole_cl.study.parity` tells what it is for)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from recbole_cl import schema
from recbole_cl.config.models import configured_traits
from recbole_cl.errors import ConfigError

IMPLIED: dict[str, Any] = {
    "n_stages": 1,
    "scheduler": "TimeSlices",
    "strategy": "FineTune",
    "vocabulary": "global",
    "candidates": "all",
    "train_positions": "last",
    "stage_split": "leave_one_out",
    "stage_ratios": [0.8, 0.1, 0.1],
    "valid_split": "tail",
    "min_user_inter": 0,
    "history": "all",
    "graph": "all",
    "time_range": None,
    "scratch": False,
    "stage_lr_scale": 1.0,
    "stage_epochs": None,
    "cold_targets": "keep",
    "checkpoint_steps": None,
    "worker": 0,
}
"""What ``parity: recbole`` means for other properties; one that is explicitly set to something else is refused."""


SPLIT: dict[str, Any] = {"split": {"LS": "valid_and_test"}, "order": "TO"}
"""RecBole's evaluation setting of the same split: each user's last two interactions by time."""


def settle(config: Any) -> None:
    """Sets what ``parity: recbole`` implies.

    Args:
        config: A configuration in the making (:class:`recbole_cl.config.CLConfig`); nothing happens without parity.

    Raises:
        ConfigError: If a property was explicitly set to something that has no counterpart in RecBole; it is named.
    """
    final, asked = config.final_config_dict, config.external_config_dict
    schema.SCHEMA["parity"].check("parity", final["parity"])
    if final["parity"] is None:
        return
    if configured_traits(config).negative_lists:  # RecBole's dataset class is not the one that a stream loads
        raise ConfigError(
            f"property 'parity' is 'recbole', which cannot serve model {config.model!r}: RecBole loads its data in "
            f"a way of its own; use another model"
        )
    for key, value in IMPLIED.items():
        given = final["scheduler"] if key == "scheduler" else asked.get(key, value)
        if key == "strategy":
            given = config.strategy_name
        if (list(given) if isinstance(given, tuple) else given) != value:
            raise _contradiction(key, given, value)
        if key != "strategy":
            final[key] = copy.deepcopy(value)
    own = asked.get("eval_args") or {}
    for key, value in SPLIT.items():
        if own.get(key, value) != value:
            raise _contradiction("eval_args", own, {**SPLIT, "mode": "full"})
    final["eval_args"] = {**final["eval_args"], **copy.deepcopy(SPLIT), "group_by": "user"}
    mode = final["eval_args"].get("mode", "full")
    for each in mode.values() if isinstance(mode, Mapping) else (mode,):
        if each not in ("full", "labeled"):
            raise ConfigError(
                f"property 'eval_args' has the mode {each!r}, but property 'parity' is 'recbole', and RecBole draws "
                f"the sampled items between the epochs from the generator of the training negatives; set eval_args: "
                f"{{mode: full}}, or for a model of labels threshold: {{rating: 4}} and eval_args: {{mode: labeled}}"
            )


def _contradiction(key: str, given: Any, value: Any) -> ConfigError:
    return ConfigError(
        f"property {key!r} is {given!r}, but property 'parity' is 'recbole', which stands for {key}: {value!r}; leave "
        f"{key!r} or 'parity' out"
    )
