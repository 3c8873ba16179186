"""The default engine, clients as a few large batches in this process, and a plain loop to compare it with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from recbole_cl.federated.client import Examples, Outputs, Prompts, Settings, client_step
from recbole_cl.federated.engines.base import Engine
from recbole_cl.federated.prompts import SharedParts
from recbole_cl.registry import engines


@engines.register("in_process")
class InProcess(Engine):
    """Runs so many clients at once (``in_process_clients``); the same bits whenever it is run."""

    prefix = "in_process"

    def run(
        self,
        outputs: Outputs,
        table: torch.Tensor,
        shared: SharedParts,
        prompts: Prompts,
        examples: Examples,
        settings: Settings,
    ) -> tuple[Prompts, torch.Tensor]:
        parts, losses = [], []
        size = int(self.params["clients"])
        for first in range(0, len(prompts), size):
            last = min(first + size, len(prompts))
            part, loss = client_step(
                outputs, table, shared, prompts.part(first, last), examples.part(first, last), settings
            )
            parts.append(part)
            losses.append(loss)
        return (Prompts.join(parts), torch.cat(losses)) if parts else (prompts, torch.zeros(0))


@engines.register("loop")
class Loop(InProcess):
    """One client after the other: slow and plain, what the others are compared with."""

    prefix = "loop"

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        super().__init__({**parameters, "clients": 1})
