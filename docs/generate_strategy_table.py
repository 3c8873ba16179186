"""Fills strategy_table.md by runs: ``python docs/generate_strategy_table.py > docs/strategy_table.md`` (minutes).

Every registered strategy runs on six backbones over a small stream with planted drift, and on SASRec with ``trainable``
set. A cell says "works" only where the run ends *and* the strategy did something: weights or results differ from
FineTune's. A strategy that refuses a model says why (:class:`ConfigError`). Whatever else happens ends the script.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from recbole_cl.config import CLConfig
from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.testing.toy import PlantedDrift, write_planted_drift
from recbole_cl.training.runner import Runner

BACKBONES = ("BPR", "LightGCN", "NeuMF", "SASRec", "GRU4Rec", "DeepFM")
PARTS = ("prompt", "adapter", "lora")
SETTINGS: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_size": 8,
    "inner_size": 16,
    "mlp_hidden_size": [8, 4],
    "n_layers": 1,
    "n_heads": 2,
    "MAX_ITEM_LIST_LENGTH": 10,
    "train_batch_size": 32,
    "learning_rate": 0.01,
    "epochs": 1,
    "eval_step": 0,
    "metrics": ["Hit"],
    "valid_metric": "Hit@5",
    "topk": [5],
    "trainable_size": 4,
    "show_progress": False,
    "state": "error",
    "saved": False,
}
HEAD = """# Strategies and models

<!-- Made by docs/generate_strategy_table.py. Do not edit. -->

Which strategy runs on which model, found out by running each pair on a small stream of three stages with planted
drift, with the strategy's default parameters. **works**: the run ends, and weights or results differ from FineTune's on
the same model (FineTune itself: it ends). **refused (n)**: refused, for the n-th reason below. Other outcomes do not
occur: the script that makes this page fails on them. Quality is not judged here.
"""
BETWEEN = """## Training parts only

The same for SASRec with `trainable` set to `prompt`, `adapter` or `lora`
([Adapter](strategies/Adapter.md#under-any-strategy) tells what that trains), against FineTune with the same setting.
"""


class Table:
    """Outcomes of runs, with the reasons of refusals numbered in the order in which they are met.

    Args:
        folder: Folder for log and results.
    """

    def __init__(self, folder: Path) -> None:
        self.toy: PlantedDrift = write_planted_drift(folder, n_users=24, length=6)
        self.folder = folder
        self.reasons: dict[str, int] = {}
        self.failures: list[str] = []
        self.references: dict[tuple[str, str], Any] = {}
        self.runs = 0

    def run(self, strategy: str, backbone: str, trainable: str) -> Any:
        """Returns what a run ends with: weights by the names they have without parts, and all results."""
        self.runs += 1
        given = {**SETTINGS, **self.toy.settings(), "strategy": strategy, "trainable": trainable}
        given["output_dir"] = str(self.folder / f"run{self.runs}")
        runner = Runner(CLConfig(model=backbone, dataset=self.toy.name, config_dict=given))
        runner.run()
        weights = {name.replace(".base_layer.", "."): value for name, value in runner.model.state_dict().items()}
        return weights, sorted(repr(record) for record in runner.records)

    def cell(self, strategy: str, backbone: str, trainable: str = "all") -> str:
        """Returns the outcome of one pair."""
        key = (backbone, trainable)
        try:
            if key not in self.references:
                self.references[key] = self.run("FineTune", backbone, trainable)
            outcome = self.references[key] if strategy == "FineTune" else self.run(strategy, backbone, trainable)
        except ConfigError as error:
            return f"refused ({self.reasons.setdefault(reason(str(error)), len(self.reasons) + 1)})"
        except Exception as error:  # whatever a strategy may raise is what this script is there to find
            self.failures.append(f"{strategy} on {backbone}, trainable: {trainable}: {type(error).__name__}: {error}")
            return "fails"
        if strategy != "FineTune" and same(outcome, self.references[key]):
            self.failures.append(f"{strategy} on {backbone}, trainable: {trainable}: it does nothing")
            return "does nothing"
        return "works"


def reason(message: str) -> str:
    """Returns a refusal's message without what the table's rows and columns tell already."""
    opening = r"^(?:strategy|trainable): \w+ cannot serve (?:the model )?\w+(, which|:) "
    told = re.sub(opening, lambda match: "it " if "which" in match[1] else "", message)
    told = re.sub(r", the model offers [\w, ]+$", "", told)
    told = re.sub(r"trainable: \w+", "`trainable`", told)
    told = re.sub(r"property 'trainable' is '\w+'", "`trainable` is set", told)
    return re.sub(r"the strategy \w+", "this strategy", told)


def same(one: Any, two: Any) -> bool:
    """Tells whether two outcomes have the same bits in what both have."""
    shared = one[0].keys() & two[0].keys()
    return one[1] == two[1] and all(torch.equal(one[0][name], two[0][name]) for name in shared)


def rows(names: list[str], columns: tuple[str, ...], cell: Callable[[str, str], str]) -> Iterator[str]:
    """Yields the lines of a Markdown table."""
    yield "| strategy | " + " | ".join(columns) + " |"
    yield "|---|" + "---|" * len(columns)
    for name in names:
        print(name, file=sys.stderr)
        yield f"| `{name}` | " + " | ".join(cell(name, column) for column in columns) + " |"


def page() -> str:
    """Returns the page.

    Raises:
        SystemExit: If a pair neither works nor is refused, or a strategy does nothing.
    """
    names = [name for name in strategies.names() if strategies.get(name).__module__.startswith("recbole_cl.")]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = Table(Path(folder))
        lines = [HEAD, *rows(names, BACKBONES, lambda name, model: table.cell(name, model)), ""]
        lines += [BETWEEN, *rows(names, PARTS, lambda name, part: table.cell(name, "SASRec", part)), ""]
    if table.failures:
        raise SystemExit("\n".join(table.failures))
    lines += ["## Reasons", "", *(f"{number}. {told}" for told, number in table.reasons.items())]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        made = page()  # what models print is not part of it
    print(made, end="")
