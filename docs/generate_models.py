"""Makes models.md: every model of RecBole through three growing stages under three strategies.

``python docs/generate_models.py --output_dir runs/models > docs/models.md`` runs what is not done yet in that folder
(minutes to an hour on one core) and prints the page; a model that crashed is tried again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recbole_cl.config import list_recbole_models
from recbole_cl.study.plan import Cell
from recbole_cl.study.walk import REFUSED, RESULT, state, walk_cells

STRATEGIES = ("FineTune", "ERRandom", "EWC")
SETTINGS = {
    "dataset": "ml-100k",
    "time_range": [0, 874_900_000],
    "n_stages": 3,
    "epochs": 1,
    "train_batch_size": 256,
    "eval_batch_size": 4096,
    "MAX_ITEM_LIST_LENGTH": 10,
    "embedding_size": 8,
    "hidden_size": 8,
    "inner_size": 16,
    "n_layers": 1,
    "n_heads": 2,
    "ewc_samples": 16,
    "seed": 2020,
}
OWN: dict[str, dict[str, Any]] = {
    "ConvNCF": {"embedding_size": 64, "ewc_lambda": 1e6},  # its convolutions halve a 64 x 64 map again and again
    "DGCF": {"train_batch_size": 8},  # it draws a share of the users for each batch, more than there are at 256
    "DIEN": {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}},
    "NCL": {"num_clusters": 4},  # 1000 clusters need as many users
    # One step a stage, or gradients too small for the default strength to be seen after one epoch.
    **{
        name: {"epochs": 3, "train_batch_size": 64, "ewc_lambda": 1e6}
        for name in ("CDAE", "ENMF", "GCMC", "SGL", "STAMP")
    },
}
"""What single models cannot do without."""
HEAD = """# RecBole's models

<!-- Made by docs/generate_models.py. Do not edit. -->

Every model of RecBole {recbole}, taken through three growing stages of {rows:,} interactions of ml-100k (one epoch a
stage, small layers) under `FineTune`, `ERRandom` and `EWC`. **works**: all three stages were trained and evaluated,
every number is finite, and the result differs from FineTune's where the strategy is another one. What is refused says
why before anything is trained. Quality is not judged here.
"""


def cells(models: Sequence[str]) -> list[Cell]:
    """Returns a run for each model and strategy."""
    out = []
    for model in models:
        for strategy in STRATEGIES:
            labels = {"model": model, "strategy": strategy}
            out.append(Cell(labels, 2020, {**SETTINGS, **OWN.get(model, {}), **labels}))
    return out


def verdict(cell: Cell, folder: Path, plain: Path, failures: dict[str, str]) -> str:
    """Returns ``works``, or why not, in words."""
    own = folder / cell.folder
    if cell.folder in failures:
        return re.sub(r"(?<=[\s\['])/\S*/", "", failures[cell.folder])  # no paths of this machine
    if state(cell, folder) == "refused":
        return str(json.loads((own / REFUSED).read_text(encoding="utf-8"))["reason"])
    result = json.loads((own / RESULT).read_text(encoding="utf-8"))
    matrix = result["matrix"][result["primary_metric"]]
    if len(matrix) != 3 or any(value is None for row in matrix for value in row):
        return "the matrix has holes"
    losses = [point["train_loss"] for point in result["curves"]]
    if cell.labels["strategy"] != "FineTune" and losses and (plain / RESULT).is_file():
        reference = json.loads((plain / RESULT).read_text(encoding="utf-8"))
        if (
            losses == [point["train_loss"] for point in reference["curves"]]
            and matrix == reference["matrix"][result["primary_metric"]]
        ):
            return "does nothing: the losses and the matrix are FineTune's"
    return "works"


def page(models: Sequence[str], folder: Path, failures: dict[str, str]) -> str:
    """Returns the page."""
    table, notes, rows = [], [], 0
    counts = dict.fromkeys(STRATEGIES, 0)
    by_model: dict[str, list[str]] = {}
    for cell in cells(models):
        plain = folder / cell.labels["model"] / "FineTune" / "seed2020"
        by_model.setdefault(cell.labels["model"], []).append(verdict(cell, folder, plain, failures))
        if (folder / cell.folder / RESULT).is_file():
            stages = json.loads((folder / cell.folder / RESULT).read_text(encoding="utf-8"))["stages"]
            rows = max(rows, sum(s["n_train"] + s["n_valid"] + s["n_test"] for s in stages))
    for model, verdicts in by_model.items():
        for strategy, told in zip(STRATEGIES, verdicts, strict=True):
            counts[strategy] += told == "works"
        table.append(f"| {model} | " + " | ".join("works" if v == "works" else "no" for v in verdicts) + " |")
        verdicts = [re.sub(r"^strategy: \w+ cannot serve the model \w+: ", "", told) for told in verdicts]
        for told in dict.fromkeys(verdicts):
            if told != "works":
                which = [s for s, v in zip(STRATEGIES, verdicts, strict=True) if v == told]
                notes.append(f"- **{model}** ({', '.join(which)}): {told}".replace("|", "\\|"))
    lines = [HEAD.format(recbole=version("recbole"), rows=rows)]
    lines += [
        "| model | " + " | ".join(f"`{s}`" for s in STRATEGIES) + " |",
        "|---" * (1 + len(STRATEGIES)) + "|",
        *table,
    ]
    lines += ["", f"Of {len(by_model)} models: " + ", ".join(f"{n} under {s}" for s, n in counts.items()) + ".", ""]
    lines += ["## What does not work, and why", "", *notes, ""]
    lines.append(
        f"Python {platform.python_version()}, torch {version('torch')}, CPU, seed 2020, "
        f"{datetime.date.today().isoformat()}."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what is not done, prints the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output_dir", default="runs/models")
    parser.add_argument("--models", nargs="*", help="some of them; default all")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    models, folder = options.models or list_recbole_models(), Path(options.output_dir)
    failures = walk_cells("models", cells(models), folder, options.jobs)
    print(page(models, folder, failures), end="")
    for name, told in failures.items():
        print(f"{name}: {told}", file=sys.stderr)


if __name__ == "__main__":
    main()
