"""Prints the figures of a first run for the README and draws its picture.

    python run_recbole_cl.py --model=SASRec --dataset=ml-100k --strategy=FineTune --output_dir=runs/first
    python docs/first_run.py runs/first

Every number that the README shows of a run comes from here. The picture needs the extra [report] and a browser that
kaleido finds.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path

from recbole_cl.report import picture


def figures(result: dict) -> str:
    """Returns the run's matrix, its summary and its cost as Markdown."""
    metric = result["primary_metric"]
    size = len(result["stages"])
    lines = [f"| {metric}: trained up to | {' | '.join(f'on {s + 1}' for s in range(size))} |"]
    lines.append("|---|" + "---|" * size)
    for t, row in enumerate(result["matrix"][metric]):
        cells = ["-" if v is None else f"**{v:.4f}**" if s == t else f"{v:.4f}" for s, v in enumerate(row)]
        lines.append(f"| stage {t + 1} | {' | '.join(cells)} |")
    lines.append("")
    for name in ("AF", "BWT", "FWT", "LA", "next_stage"):
        lines.append(f"- {name} {result['summary'][name][metric]:.4f}: `{result['formulas'][name]}`")
    seconds = sum(cost["seconds"] for cost in result["cost"])
    peak = max(cost["peak_memory_mb"] for cost in result["cost"])
    versions = result["versions"]
    lines.append("")
    lines.append(
        f"{seconds:.0f} s after loading, peak memory {peak:.0f} MB; {os.cpu_count()} CPU cores, "
        f"{versions['threads']} threads, no GPU, Python {versions['python']}, torch {versions['torch']}; seed "
        f"{result['seed']}; {datetime.date.today().isoformat()}."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    told = json.loads((Path(sys.argv[1]) / "result.json").read_text(encoding="utf-8"))
    print(figures(told))
    drawn = picture(told, Path(__file__).parent / "images" / "first_run.png")
    print(f"\npicture: {drawn or 'not drawn, kaleido finds no browser'}", file=sys.stderr)
