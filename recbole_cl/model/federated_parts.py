"""What clients of the federated baselines copy and train: all of the backbone, tokens before its histories, adapters.

A part gives the outputs of histories for weights that are another client's in each row, and the losses of a batch of
clients. FedRAP's additive tables of items are the part ``items``, which has no backbone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from recbole_cl.federated.client import Examples, recommendation_losses
from recbole_cl.federated.local import Losses, Weights
from recbole_cl.model.fused import causal_mask, layer_outputs
from recbole_cl.rng import derive, seeded

if TYPE_CHECKING:
    from recbole_cl.model.federated_baselines import Federated


class Part(nn.Module):
    """Base of the parts; its own parameters are the global weights.

    Args:
        model: The model.
    """

    at_once = 64
    """Clients in a batch."""
    private = False
    """Each client has a table of items of its own, so that no product with one table scores them all."""

    def __init__(self, model: Federated) -> None:
        super().__init__()
        self._model = [model]  # in a list, since the model is no part of its part

    @property
    def model(self) -> Federated:
        """The model."""
        return self._model[0]

    def weights(self) -> dict[str, torch.Tensor]:
        """Returns the global weights, by name."""
        return {name: value.detach() for name, value in self.named_parameters()}

    @torch.no_grad()
    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Puts global weights in."""
        for name, value in self.weights().items():
            value.copy_(weights[name])

    def outputs(
        self, weights: Weights, owner: torch.Tensor, sequence: torch.Tensor, wanted: torch.Tensor
    ) -> torch.Tensor:
        """Returns the outputs at flagged positions, row by row, shape ``[n, d]``.

        Args:
            weights: Of the clients.
            owner: The client of each row, shape ``[W]``.
            sequence: Histories, shape ``[W, L]``.
            wanted: Flags, shape ``[W, L]``.
        """
        raise NotImplementedError

    def losses(self, examples: Examples) -> Losses:
        """Returns what gives the mean loss of each client's targets."""
        table = self.model.backbone.item_embedding.weight.detach()

        def of(weights: Weights) -> torch.Tensor:
            found = self.outputs(weights, examples.client, examples.sequence, examples.targets > 0)
            return recommendation_losses(found, table, examples, self.model.config["protofed_loss"])

        return of


class PromptPart(Part):
    """Soft tokens before each history on the frozen backbone."""

    def __init__(self, model: Federated) -> None:
        super().__init__(model)
        width = model.backbone.item_embedding.embedding_dim
        with seeded(derive(model.config["seed"], 0, "federated/prompt")):
            self.prompt = nn.Parameter(0.02 * torch.randn(int(model.config["protofed_tokens"]), width))

    def outputs(
        self, weights: Weights, owner: torch.Tensor, sequence: torch.Tensor, wanted: torch.Tensor
    ) -> torch.Tensor:
        return self.model.outputs(sequence)(weights["prompt"][owner], wanted)

    def losses(self, examples: Examples) -> Losses:
        behind, table = self.model.outputs(examples.sequence), self.model.backbone.item_embedding.weight.detach()

        def of(weights: Weights) -> torch.Tensor:
            found = behind(weights["prompt"][examples.client], examples.targets > 0)
            return recommendation_losses(found, table, examples, self.model.config["protofed_loss"])

        return of


class AdapterPart(Part):
    """A bottleneck behind each layer of the frozen backbone (Houlsby et al. 2019), which starts as the identity."""

    def __init__(self, model: Federated) -> None:
        super().__init__(model)
        width, inner = model.backbone.item_embedding.embedding_dim, int(model.config["federated_adapter"])
        layers = len(model.backbone.trm_encoder.layer)
        with seeded(derive(model.config["seed"], 0, "federated/adapter")):
            self.down = nn.Parameter(torch.randn(layers, width, inner) / width**0.5)
        self.up = nn.Parameter(torch.zeros(layers, inner, width))

    def outputs(
        self, weights: Weights, owner: torch.Tensor, sequence: torch.Tensor, wanted: torch.Tensor
    ) -> torch.Tensor:
        backbone = self.model.backbone
        hidden, mask = backbone._embed(sequence), causal_mask(sequence.size(1), sequence.device)
        for number, layer in enumerate(backbone.trm_encoder.layer):
            hidden = layer_outputs(layer, hidden, mask)
            down, up = weights["down"][owner, number], weights["up"][owner, number]
            hidden = hidden + F.gelu(hidden @ down) @ up
        return hidden[wanted]


class _Encode(nn.Module):
    """The backbone as a module whose call gives the outputs at flagged positions."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, sequence: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.backbone.outputs_at(sequence, wanted)
        return found


TABLE = "backbone.item_embedding.weight"


class WholePart(Part):
    """All weights of the backbone; one client is computed after the other."""

    at_once = 8
    private = True

    def weights(self) -> dict[str, torch.Tensor]:
        return {f"backbone.{name}": value.detach() for name, value in self.model.backbone.named_parameters()}

    def outputs(
        self, weights: Weights, owner: torch.Tensor, sequence: torch.Tensor, wanted: torch.Tensor
    ) -> torch.Tensor:
        encode, out = _Encode(self.model.backbone), []
        for client in range(int(owner.max()) + 1 if len(owner) else 0):
            rows = owner == client
            if wanted[rows].any():
                own = {name: value[client] for name, value in weights.items()}
                out.append(functional_call(encode, own, (sequence[rows], wanted[rows])))
        width = self.model.backbone.item_embedding.embedding_dim
        found = torch.cat(out) if out else torch.zeros(0, width)
        # Back into the order of the rows, which need not be that of their clients.
        counts = wanted.sum(1)
        place = torch.empty(len(owner), dtype=torch.int64).scatter_(
            0, owner.argsort(stable=True), torch.arange(len(owner))
        )
        starts = torch.zeros(len(owner) + 1, dtype=torch.int64)
        starts[1:] = counts[owner.argsort(stable=True)].cumsum(0)
        inside = torch.arange(int(counts.sum())) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        return found[torch.repeat_interleave(starts[place], counts) + inside]

    def losses(self, examples: Examples) -> Losses:
        clients = [examples.of(torch.tensor([client])) for client in range(len(examples))]

        def of(weights: Weights) -> torch.Tensor:
            found = []
            for number, one in enumerate(clients):
                own = {name: value[number : number + 1] for name, value in weights.items()}
                outputs = self.outputs(own, one.client, one.sequence, one.targets > 0)
                kind = self.model.config["protofed_loss"]
                found.append(recommendation_losses(outputs, own[TABLE][0], one, kind))
            return torch.cat(found)

        return of


PARTS = {"prompt": PromptPart, "adapter": AdapterPart, "whole": WholePart}
