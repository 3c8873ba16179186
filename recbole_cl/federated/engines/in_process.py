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
        if not len(prompts):
            return prompts, torch.zeros(0)
        # Clients whose rows are of like length share a batch: there is little padding, and each result is put back.
        order = examples.lengths().argsort(stable=True)
        parts, losses = [], []
        for chosen in order.split(int(self.params["clients"])):
            part, loss = client_step(outputs, table, shared, prompts.of(chosen), examples.of(chosen), settings)
            parts.append(part)
            losses.append(loss)
        back = order.argsort()
        return Prompts.join(parts).of(back), torch.cat(losses)[back]


@engines.register("loop")
class Loop(InProcess):
    """One client after the other: slow and plain, what the others are compared with."""

    prefix = "loop"

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        super().__init__({**parameters, "clients": 1})
