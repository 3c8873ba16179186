"""Whether what is kept of the users is whole: answers against the questions of today, vectors against their hashes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_cl.llm.cache import AnswerCache
from recbole_cl.llm.clients.base import Request
from recbole_cl.llm.partition_store import PartitionStore, partition_key
from recbole_cl.llm.texts import fault

FAULTS = ("answers that cannot be used", "vector files that are damaged", "vector files without their other half")
"""Counts that must be 0."""
MISSING = ("questions without an answer", "shifts that wait for summaries")


def audit(
    cache: AnswerCache, folder: Path, summaries: Sequence[Request], shifts: Sequence[Request],
    abouts: Sequence[Mapping[str, Any]], waiting: int,
) -> dict[str, int]:  # fmt: skip
    """Returns the counts of a check; an answer belongs to a question if its name, a hash of all that it hangs on, does.

    Args:
        cache: The answers.
        folder: Where the vectors lie, below ``vectors``.
        summaries: The questions of all partitions.
        shifts: Those of shifts that can be asked.
        abouts: Client, model and prompt version of today's questions.
        waiting: Shifts that cannot be asked yet.
    """
    names = {request.key for request in [*summaries, *shifts]}
    ours, counts = {json.dumps(about, sort_keys=True) for about in abouts}, Counter[str]()
    prompts = {str(about["prompt"]) for about in abouts}
    for kept, about in cache.everything():
        if kept.key in names:
            counts["answers"] += 1
            counts["stand-ins of the offline client"] += kept.fallback is not None
        elif about in ours:
            counts["answers that no partition asks for"] += 1
        elif _prompt_of(about) not in prompts:
            counts["answers to another version of a prompt"] += 1
        else:
            counts["answers of another client, model or setting"] += 1
        counts[FAULTS[0]] += fault(kept.text) is not None
    counts[MISSING[0]] = len(names) - counts["answers"]
    counts[MISSING[1]] = waiting
    wanted = _partitions(summaries, shifts)
    for store in sorted(path for path in (folder / "vectors").glob("*") if path.is_dir()):
        parts = PartitionStore(store)
        for file in parts.files():
            pair = parts.read(file)
            if pair is None:
                counts[FAULTS[1]] += 1
                continue
            known = sum(key in wanted for key in pair[0])
            counts["vectors of partitions"] += known
            counts["vectors that no partition has"] += len(pair[0]) - known
        counts[FAULTS[2]] += sum(not path.with_suffix(".keys").exists() for path in store.glob("[!.]*.npy"))
    order = (
        "answers", *MISSING, "stand-ins of the offline client", "answers that no partition asks for",
        "answers to another version of a prompt", "answers of another client, model or setting",
        "vectors of partitions", "vectors that no partition has", *FAULTS,
    )  # fmt: skip
    return {name: counts[name] for name in order}


def _prompt_of(about: str) -> str:
    try:
        return str(json.loads(about)["prompt"])
    except (ValueError, KeyError, TypeError):
        return ""


def _partitions(summaries: Sequence[Request], shifts: Sequence[Request]) -> set[bytes]:
    """Returns the keys that partitions of today may have: a summary alone, or with a shift between it and the last."""
    alone = {partition_key(request.key, "") for request in summaries}
    ends: dict[str, list[str]] = {}
    for request in shifts:
        ends.setdefault(str(request.data.get("of", "")), []).append(request.key)
    return alone | {partition_key(summary.key, shift) for summary in summaries for shift in ends.get(summary.key, [])}
