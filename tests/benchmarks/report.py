"""Prints the tables of docs/benchmarks.md: ratios of CPU seconds, medians of alternating pairs on one thread.

RECBOLE_CL_DATA=... OMP_NUM_THREADS=1 python tests/benchmarks/report.py
... report.py matrix finetune                 # only some of the comparisons
... report.py --keep                          # also write them into the documentation (figures.py)
... report.py --device cuda                   # those that a GPU can run, in wall-clock seconds
"""

from __future__ import annotations

import argparse
import os
import tempfile

import cases
import figures
from side_by_side import Ratio, alternate, alternate_fresh, fresh

DATA = bool(os.environ.get("RECBOLE_CL_DATA"))
DEVICE = "cpu"


def row(what: str, found: Ratio, aim: str) -> str:
    """One line of the table."""
    return f"| {what} | {found.ours:.3f} | {found.theirs:.3f} | {found.ratio:.2f}x | {aim} | {found.pairs} |"


SAID: list[str] = []


def say(*lines: str) -> None:
    """Prints lines at once, so that a run that is stopped leaves what it has found."""
    SAID.extend(lines)
    print(*lines, sep="\n", flush=True)


def sequences() -> None:
    """Ten stages of sequences: time, and memory in a process of its own for each side."""
    if DATA:
        ours, theirs = cases.augmentation()
        say(row("ten stages of sequences, online-retail", alternate(ours, theirs, 3), ">= 30x"))


def epoch() -> None:
    """One epoch over the same targets."""
    ours, theirs, difference, factor = cases.epoch_of_all_positions(device=DEVICE, batches=6)
    told = f"SASRec epoch on ml-100k, length 50 ({difference:+d} targets on our side; RecBole's from 6 of its batches)"
    found = alternate(ours, theirs, 3, device=DEVICE)
    say(row(told, Ratio(found.ours, found.theirs * factor, found.ratio * factor, found.pairs), ">= 20x"))


def matrix() -> None:
    """A matrix of five stages on the same targets."""
    for model in ("SASRec", "BPR"):
        ours, theirs, gap = cases.matrix_of_five(model, DEVICE)
        told = f"5 x 5 matrix, {model}, ml-100k (metrics differ by {gap:.0e} at most)"
        say(row(told, alternate(ours, theirs, 3, device=DEVICE), ">= 3x"))


def finetune() -> None:
    """FineTune against RecBole's bare epoch."""
    for model in ("BPR", "LightGCN"):
        found = alternate(*cases.finetune_epoch(model, DEVICE), 21, device=DEVICE)
        overhead = f"overhead {100 * (1 / found.ratio - 1):+.1f} %"
        say(row(f"FineTune epoch against bare _train_epoch, {model} ({overhead})", found, ">= 0.91x"))


def short() -> None:
    """Rows of similar length in a pass against one padded pass."""
    if DATA:
        parted, padded, fill = cases.epoch_of_short_sequences()
        told = f"steps on short sequences, diginetica-weeks ({100 * fill:.0f} % of a padded batch are items)"
        say(row(f"{told}, against ourselves without parting", alternate(parted, padded, 3), ""))


def views() -> None:
    """What models see at each stage, of a log and of eight times as much: linear in the interactions."""
    spent = []
    for times in (1, 8) if DATA else ():
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs, n = cases.views_of_five_stages(times, folder)
            found = alternate(ours, theirs, 5)
        spent.append((found.ours, n))
        told = f"views of five stages, {n:,} interactions of online-retail"
        if times > 1:
            told += f" repeated ({n / spent[0][1]:.0f} times as many, {spent[-1][0] / spent[0][0]:.1f} times the time)"
        say(row(f"{told}, against ourselves with np.unique", found, ""))


def compiled() -> None:
    """``torch.compile`` against the operations as they are; needs a C++ compiler."""
    told = "SASRec steps of an epoch, against ourselves with torch.compile around the transformer"
    say(row(told, alternate(*cases.steps_compiled(device=DEVICE), 5, device=DEVICE), ""))


def start() -> None:
    """Import and configuration in new processes."""
    found = alternate_fresh(cases.OUR_START, cases.RECBOLES_START, 3)
    told = f"import and configuration ({found.ours - found.theirs:+.2f} s on our side)"
    say(row(told, found, "< 1 s more"))


def memory() -> None:
    """Memory of the sequences, and how it grows."""
    if DATA:
        grown = [
            fresh(f"import cases; print(cases.growth_of_augmentation({side!r}))")[0] / 1e6
            for side in ("ours", "RecBole")
        ]
        say(
            "Memory of the sequences of online-retail (growth of the resident set at its peak, a process a side): "
            f"ours {grown[0]:.0f} MB, RecBole {grown[1]:.0f} MB, {grown[1] / grown[0]:.1f} times ours; "
            "aim >= 10 times.",
            "",
        )
    told = []
    for millions in (1, 3, 10):
        peak, rows = fresh(f"import cases; print(list(cases.memory_of_windows({millions})))")[0]
        told.append(f"{rows:,} interactions {peak / 1e6:.0f} MB ({peak / rows:.0f} bytes a row)")
    say(f"Table and windows of a log repeated with shifted users, peak: {'; '.join(told)}.")


def shares() -> None:
    """What growth, checkpoints and a resume cost."""
    for model in ("SASRec", "BPR"):
        spent = cases.shares_of_a_stage(model)
        for name, what in (
            ("growth", "growing the model"), ("checkpoint", "a checkpoint after each epoch"),
            ("evaluation", "filling the matrix"), ("resume", "resuming in the last stage"),
        ):  # fmt: skip
            share = spent[name] / spent["stage"]
            say(f"| {model}: {what} | {spent[name]:.3f} of {spent['stage']:.2f} | {100 * share:.1f} % |")


TABLE = {
    "sequences": sequences, "epoch": epoch, "matrix": matrix, "finetune": finetune, "short": short,
    "views": views, "compiled": compiled, "start": start,
}  # fmt: skip
REST = {"memory": memory, "shares": shares}
ON_A_GPU = ("epoch", "matrix", "finetune", "compiled")


def head(name: str) -> list[str]:
    """Returns the first lines of the table that a comparison's lines belong to."""
    seconds = "CPU s" if DEVICE == "cpu" else "s"
    if name == "shares":
        return ["| ml-100k, five stages of five epochs | CPU s | share of the stages |", "|---|---|---|"]
    if name == "memory":
        return []
    return [
        f"| comparison | ours, {seconds} | RecBole, {seconds} | RecBole / ours | aim | pairs |",
        "|---|---|---|---|---|---|",
    ]


def main() -> None:
    """Runs the comparisons that are asked for and that the data at hand allow."""
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", help=f"of {', '.join([*TABLE, *REST])}; default all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--keep", action="store_true", help="write what is found into the documentation")
    args = parser.parse_args()
    DEVICE = args.device
    which = args.which or [*TABLE, *REST]
    if DEVICE != "cpu":
        which = [name for name in which if name in ON_A_GPU]
    shown: list[str] | None = None
    for name, run in {**TABLE, **REST}.items():
        if name not in which:
            continue
        if head(name) != shown:
            shown = head(name)
            print("", *shown, sep="\n", flush=True)
        SAID.clear()
        run()
        if args.keep and SAID:
            figures.record(name, head(name), SAID, DEVICE)
    print("\n" + figures.machine(DEVICE))


if __name__ == "__main__":
    main()
