"""The clients of a round as Flower's ClientApps in this process: what a deployment runs, to compare with."""

from __future__ import annotations

from dataclasses import replace

import torch

from recbole_cl.federated.client import FIELDS, Examples, Outputs, Prompts, Settings
from recbole_cl.federated.engines.base import Engine
from recbole_cl.federated.prompts import SharedParts
from recbole_cl.registry import engines


@engines.register("flower")
class Flower(Engine):
    """One message a client, answered by the app of :mod:`recbole_cl.federated.flower`."""

    prefix = "flower"

    def run(
        self,
        outputs: Outputs,
        table: torch.Tensor,
        shared: SharedParts,
        prompts: Prompts,
        examples: Examples,
        settings: Settings,
    ) -> tuple[Prompts, torch.Tensor]:
        from recbole_cl.federated import flower

        if not len(prompts):
            return prompts, torch.zeros(0)
        mine = [examples.of(torch.tensor([client])) for client in range(len(prompts))]
        base = flower.Device(outputs, table, shared, settings, lambda name: examples, noted=True)
        app = flower.client_app(lambda context: replace(base, examples=lambda name: mine[context.node_id]))
        grid = flower.LocalGrid(app, range(len(prompts)))
        for client, context in grid.contexts.items():
            flower.keep(context, prompts.of(torch.tensor([client])))
        given = shared.prototypes.detach().cpu().numpy()
        replies = flower.replies(grid, list(grid.contexts), given, "round", None)
        losses = torch.tensor([float(reply.content["metrics"]["loss"]) for reply in replies])
        parts = [flower.kept(grid.contexts[client], shared) for client in range(len(prompts))]
        return Prompts(*(torch.cat([getattr(part, name) for part in parts]) for name in FIELDS)), losses
