"""Small logs, configurations and stages for the tests of the stream."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from recbole_cl.config import CLConfig
from recbole_cl.stream.batch import Batcher
from recbole_cl.stream.build import Stream, build_stream

INTER = "user_id:token\titem_id:token\ttimestamp:float"
LOAD = {"inter": ["user_id", "item_id", "timestamp"]}


class Plain(dict):
    """Properties for parts that only look them up; a missing one is None, as in RecBole's Config."""

    def __missing__(self, key: str) -> None:
        return None


def write(
    folder: Path, rows: Sequence[Sequence[Any]], header: str = INTER, suffix: str = "inter", name: str = "log"
) -> Path:
    """Writes an atomic file ``folder/name/name.suffix``."""
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(map(str, row)) for row in rows]
    (target / f"{name}.{suffix}").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return folder


def random_rows(
    n: int = 400, users: int = 25, items: int = 60, span: int = 5000, seed: int = 0
) -> list[tuple[str, str, int]]:
    """Rows in no order, with ties and repeats, whose users and items appear little by little."""
    rng = np.random.default_rng(seed)
    time = rng.integers(0, span, n)
    seen = 0.15 + 0.85 * time / span
    user = (rng.random(n) * users * seen).astype(int)
    item = (rng.random(n) * items * seen).astype(int)
    return [(f"u{u}", f"i{i}", int(t)) for u, i, t in zip(user, item, time, strict=True)]


def configure(folder: Path | None = None, model: Any = "SASRec", dataset: str = "log", **properties: Any) -> CLConfig:
    """A configuration over a written log (or ml-100k)."""
    given: dict[str, Any] = {"n_stages": 3, "seed": 7}
    if folder is not None:
        given |= {"data_path": str(folder), "load_col": LOAD}
    given |= properties
    return CLConfig(model=model, dataset=dataset, config_dict=given)


def stream_of(folder: Path | None = None, **properties: Any) -> tuple[CLConfig, Stream]:
    """A configuration and its stream."""
    config = configure(folder, **properties)
    return config, build_stream(config)


def stage_context(config: CLConfig, stream: Stream, index: int, model: Any = None) -> Any:
    """What the loaders need of a stage's context."""
    stage, view = stream.stages[index], stream.view(index, config["graph"])
    batcher = Batcher(config, stream, view, stage.n_users, stage.n_items)
    return SimpleNamespace(
        config=config,
        stream=stream,
        index=index,
        stage=stage,
        view=view,
        batcher=batcher,
        model=model or SimpleNamespace(),
    )


def tokens(stream: Stream, field: str, ids: np.ndarray) -> list[str]:
    """Tokens of ids."""
    return [str(t) for t in np.asarray(stream.dataset.field2id_token[field])[np.asarray(ids)]]


def real(dataset: str) -> None:
    """Skips where the real log is not at hand."""
    root = os.environ.get("RECBOLE_CL_DATA")
    if not root or not (Path(root) / dataset / f"{dataset}.inter").is_file():
        pytest.skip(f"needs the log {dataset}: set RECBOLE_CL_DATA to the folder that holds it")
