"""What LIBER tells at the end of a stage: the bill, what asking anew would have cost, and where vectors come from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from recbole_cl.model.liber_knowledge import Knowledge, Learner
from recbole_cl.registry import llm_clients
from recbole_cl.tree import tree_hash


def bill(
    config: Any, known: Knowledge, naive: tuple[np.ndarray, np.ndarray], asks_shifts: bool = True
) -> list[dict[str, Any]]:
    """Returns a row for each stage: calls are booked to the stage that closes the partition.

    Args:
        config: The run's configuration; the prices are read.
        known: What is known.
        naive: Stage and tokens read of each behaviour, asked anew with all that came before it.
        asks_shifts: Shifts were asked for.
    """
    rows = []
    stage_of, read = naive
    prices = (config["liber_price_read"], config["liber_price_written"])
    written_each = float(known.bill[:, 1].sum()) / max(len(known), 1)
    for stage in sorted(set(stage_of.tolist())):
        here, events = known.stage == stage, stage_of == stage
        closed, shifts = int(here.sum()), int((known.number[here] > 0).sum()) * asks_shifts
        tokens_read = int(known.bill[here][:, [0, 2]].sum())
        tokens_written = int(known.bill[here][:, [1, 3]].sum())
        row = {
            "stage": stage + 1,
            "behaviours": int(events.sum()),
            "partitions closed": closed,
            "calls": closed + shifts,
            "tokens read": tokens_read,
            "tokens written": tokens_written,
            "calls, asked anew at each behaviour": int(events.sum()),
            "tokens read, asked anew": int(read[events].sum()),
        }
        if None not in prices:
            row["cost"] = (tokens_read * prices[0] + tokens_written * prices[1]) / 1e6
            naive_written = written_each * int(events.sum())
            row["cost, asked anew"] = (int(read[events].sum()) * prices[0] + naive_written * prices[1]) / 1e6
        rows.append(row)
    return rows


def report_of(config: Any, known: Knowledge, learner: Learner, naive: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Returns the report of a stage."""
    rows = bill(config, known, naive, learner.history.asks_shifts)
    calls, anew = sum(row["calls"] for row in rows), sum(row["calls, asked anew at each behaviour"] for row in rows)
    prompts = learner.history.prompts
    client = config.component("liber_client")(config.component_parameters("liber_client"))
    users = len(torch.unique(known.user))
    return {
        "numbers": {
            "users with a partition": users,
            "partitions": len(known),
            "calls": calls,
            "calls, asked anew at each behaviour": anew,
            "times fewer calls": anew / max(calls, 1),
            "texts that the offline client stands in for": int(known.fallback.sum()),
        },
        "tables": {
            "What the language model costs": rows,
            "Where the vectors come from": [
                {
                    "client": llm_clients.name_of(config["liber_client"]),
                    "model": client.model,
                    "prompts": ", ".join(f"{kind}.{prompt.version}" for kind, prompt in prompts.items()),
                    "encoder": learner.encoder,
                    "vectors": str(config["liber_vectors"]),
                    "sha256 of the vectors": digest(known),
                }
            ],
        },
    }


def digest(known: Knowledge) -> str:
    """Returns the beginning of the hash of all vectors."""
    return tree_hash([known.summary, known.shift])[:16]
