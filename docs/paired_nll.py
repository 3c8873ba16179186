"""Prints how the methods of a study differ from one of them in NLL, paired by user: a table in Markdown.

    python docs/paired_nll.py studies/peso-laptop SingleLoRA

The study's runs were made with ``own_metric_rows: True``. Stages after the first count, each judged right after its own
training; negative is better than the method that all are compared with.
"""

from __future__ import annotations

import sys
from pathlib import Path

from recbole_cl.errors import RecBoleCLError
from recbole_cl.results.paired import paired, read_rows


def table(folder: Path, against: str, metric: str = "nll") -> str:
    """Returns the table.

    Args:
        folder: A study's folder, of one dataset, scheduler and model.
        against: Label of the method that the others are compared with, as its folder is called.
        metric: One of the model's own metrics.
    """
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.glob("*/*/*/*/seed*/rows.csv")):
        found.setdefault(file.parent.parent.name, {})[file.parent.name] = file.parent
    if against not in found:
        raise SystemExit(f"{folder} has no rows of {against!r}; it has {', '.join(found) or 'none'}")
    lines = [f"| method | {metric} beside {against} | 95 % interval | users | seeds |", "|---|---|---|---|---|"]
    for name, runs in found.items():
        seeds = [seed for seed in found[against] if seed in runs]
        if name == against or not seeds:
            continue
        mine, theirs = ([read_rows(of[seed]) for seed in seeds] for of in (runs, found[against]))
        if metric not in mine[0]:
            continue
        stages = sorted(set(mine[0].s) - {0})
        told = paired(mine, theirs, metric, stages)
        interval = f"{told['low']:+.4f} to {told['high']:+.4f}"
        lines.append(f"| {name} | {told['mean']:+.4f} | {interval} | {told['users']} | {len(seeds)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    try:
        print(table(Path(sys.argv[1]), sys.argv[2]))
    except RecBoleCLError as error:
        raise SystemExit(str(error)) from error
