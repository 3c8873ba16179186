"""A stream as a nest of arrays and words, and back: what a run keeps of its log, so that it can go on without it.

The nest holds no code and no frame, only what :mod:`recbole_cl.checkpoint` can write. From it the very dataset is made
again that RecBole's constructor had made of the files, attribute by attribute, so every model's constructor (graphs,
histories, knowledge graphs) gets the same view, bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType

from recbole_cl.errors import CheckpointError
from recbole_cl.stream.build import Stream
from recbole_cl.stream.dataset import StreamDatasetMixin, dataset_class
from recbole_cl.stream.stage import Stage, Targets, Task

_ENUMS: dict[str, Any] = {"FeatureType": FeatureType, "FeatureSource": FeatureSource}
_LEFT_OUT = frozenset({"config", "logger", "_scheduler", "_line", "dataset_path", "field2token_id"})
"""Attributes of a dataset that belong to a process or its files, or follow from others."""
_COLUMNS = ("position", "user", "lo", "hi", "label")
_NUMBERS = (
    "index", "name", "start", "end", "n_users", "n_items", "catalogue",
    "first_new_user", "first_new_item", "n_new_users", "n_new_items", "tested_until",
)  # fmt: skip


def stream_state(stream: Stream) -> dict[str, Any]:
    """Returns everything that a stream is: its dataset, its table and its stages."""
    table = stream.table
    return {
        "dataset": {
            name: _packed(value, name) for name, value in vars(stream.dataset).items() if name not in _LEFT_OUT
        },
        "class": type(stream.dataset).__name__,
        "added_sequences": table.seq[len(table) :],
        "stages": [_stage_state(stage) for stage in stream.stages],
        "scheduler": stream.scheduler,
        "history": stream.history,
        "warnings": list(stream.warnings),
    }


def stream_of(config: Any, state: Mapping[str, Any]) -> Stream:
    """Returns the stream of a state.

    Args:
        config: The run's configuration.
        state: What :func:`stream_state` gave.

    Raises:
        CheckpointError: If the state is not one, or is that of another kind of model.
    """
    try:
        dataset = _dataset(config, state)
        table = dataset.build_table()
        table.seq = np.concatenate([table.seq, np.asarray(state["added_sequences"], dtype=np.int64)])
        return Stream(
            table=table,
            stages=[_stage(stage) for stage in state["stages"]],
            dataset=dataset,
            scheduler=state["scheduler"],
            history=state["history"],
            warnings=list(state["warnings"]),
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"store: it is not what a run writes ({type(error).__name__}: {error})") from error


def _dataset(config: Any, state: Mapping[str, Any]) -> StreamDatasetMixin:
    kind: Any = dataset_class(config)
    if kind.__name__ != state["class"]:
        raise CheckpointError(
            f"store: it holds a {state['class']}, but the model {config['model']} reads a {kind.__name__}"
        )
    dataset: Any = kind.__new__(kind)
    vars(dataset).update({name: _unpacked(value) for name, value in state["dataset"].items()})
    dataset.config, dataset._scheduler = config, None
    dataset.logger = logging.getLogger()  # as RecBole's constructor has it; some models' views are told to it
    tokens = {id(array): array for array in dataset.field2id_token.values()}
    ids = {key: {token: i for i, token in enumerate(array)} for key, array in tokens.items()}
    dataset.field2token_id = {field: ids[id(array)] for field, array in dataset.field2id_token.items()}
    return dataset  # type: ignore[no-any-return]


# -- stages -------------------------------------------------------------------------------------------------------


def _stage_state(stage: Stage) -> dict[str, Any]:
    return {
        **{name: getattr(stage, name) for name in _NUMBERS},
        **{split: {c: getattr(stage.split(split), c) for c in _COLUMNS} for split in ("train", "valid", "test")},
        "task": asdict(stage.task),
        "items": stage.items,
    }


def _stage(state: Mapping[str, Any]) -> Stage:
    task: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in state["task"].items()
    }
    parts: dict[str, Any] = {
        split: Targets(**{c: state[split][c] for c in _COLUMNS}) for split in ("train", "valid", "test")
    }
    return Stage(**{name: state[name] for name in _NUMBERS}, **parts, task=Task(**task), items=state["items"])


# -- attributes ---------------------------------------------------------------------------------------------------


def _packed(value: Any, path: str) -> Any:
    """Returns an attribute as a nest: feature tables, dicts, enumerations and sets get a mark."""
    if isinstance(value, Interaction):
        return {"__interaction__": dict(value.interaction)}
    kind = _ENUMS.get(type(value).__name__)
    if kind is not None and isinstance(value, kind):
        return {"__enum__": type(value).__name__, "value": value.value}
    if isinstance(value, Mapping):
        keys = [str(key) for key in value]
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"store: {path} of the dataset has keys that are no text")
        return {
            "__keys__": keys,
            "values": [_packed(v, f"{path}.{k}") for k, v in zip(keys, value.values(), strict=True)],
        }
    if isinstance(value, set | frozenset):
        return {"__set__": [_packed(v, path) for v in sorted(value)]}
    if isinstance(value, tuple | list):
        return [_packed(v, f"{path}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, bool | int | float | np.ndarray | np.generic | torch.Tensor):
        return value
    raise TypeError(f"store: {path} of the dataset is a {type(value).__name__}, which a store cannot hold")


def _unpacked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpacked(v) for v in value]
    if not isinstance(value, Mapping):
        return value
    if "__interaction__" in value:
        return Interaction(dict(value["__interaction__"]))
    if "__enum__" in value:
        return _ENUMS[value["__enum__"]](value["value"])
    if "__set__" in value:
        return {_unpacked(v) for v in value["__set__"]}
    return dict(zip(value["__keys__"], (_unpacked(v) for v in value["values"]), strict=True))
