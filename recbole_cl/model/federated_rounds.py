"""The rounds of federated baselines: clients train copies of global weights, the server averages what changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recbole_cl.federated.client import Examples
from recbole_cl.federated.ledger import hash_of
from recbole_cl.federated.local import unflat
from recbole_cl.federated.privacy import blocks, clip
from recbole_cl.federated.server import release
from recbole_cl.federated.uploads import Upload, accept
from recbole_cl.model.protofed_rounds import ClientData
from recbole_cl.rng import numpy_generator

if TYPE_CHECKING:
    from recbole_cl.strategy.context import StageContext


class FederatedRounds:
    """The rounds of a pass. An epoch is a round; all that it draws is derived from its number.

    Args:
        model: The model: it gives ``global_weights``, takes ``load_global``, and its clients ``train_clients``.
        ctx: The stage.
        private: The rounds are under the guarantee; those of the base stage have no noise and are not charged.
    """

    def __init__(self, model: Any, ctx: StageContext, private: bool) -> None:
        self.model: Any = model
        self.ctx, self.private = ctx, private
        self.data = ClientData(model, ctx)
        self.n_targets = 0

    def generator(self, name: str) -> np.random.Generator:
        """Returns a generator of the run's seed, or one that nobody can foresee (``protofed_noise: system``)."""
        if name.startswith("noise/") and self.ctx.config["protofed_noise"] == "system":
            return np.random.default_rng()
        return numpy_generator(self.ctx.config["seed"], self.ctx.index, f"federated/{self.ctx.pass_.name}/{name}")

    def train_epoch(self, loader: Any, epoch: int) -> float:
        """Runs a round; returns the mean loss of its clients before their steps."""
        model, config = self.model, self.ctx.config
        model.eval()
        able = self.data.trained()
        share = float(config["protofed_participation"]) if self.private else 1.0
        chosen = able[self.generator(f"clients/{epoch}").random(len(able)) < share]
        before = torch.cat([value.flatten() for value in model.global_weights().values()]).double().numpy()
        private = self.private and model.mechanism.cost.private
        total, refused, losses, n_users = np.zeros((1, len(before) + 1)), Counter[str](), [], 0
        name = f"{config['dataset']}/seed{config['seed']}/stage{self.ctx.index}/{self.ctx.pass_.name}{epoch}"
        self.n_targets = 0
        for users, examples in self.batches(chosen, self.generator(f"negatives/{epoch}")):
            changed, first = model.train_clients(users, examples)
            losses.append(first)
            mass = self._targets(examples)
            self.n_targets += int(mass.sum())
            sent = changed.numpy()
            if private:
                sent = clip(sent, model.mechanism.radius).astype(np.float32)
            radius = model.mechanism.radius if private else np.inf
            taken = accept(self.sent(name, users.numpy(), sent), name, users.tolist(), len(before), radius)
            refused.update(taken.refused)
            n_users += len(taken.clients)
            if private:
                rows = np.zeros(len(taken.clients), dtype=np.int64)
                total += blocks(taken.vectors, rows, 1, model.mechanism.radius, model.mechanism.weight)
            else:  # a client counts by its targets, n_k / n
                weights = mass.numpy()[np.searchsorted(users.numpy(), taken.clients)].astype(np.float64)
                total[0] += np.r_[weights @ taken.vectors, weights.sum()]
        if private:
            given = release(
                total, n_users, model.mechanism, model.ledger(), name, hash_of(total, before), self.generator
            )
            count = float(given[0, -1]) / model.mechanism.weight
            model.published = [*model.published, name]
        else:
            given, count = total, float(total[0, -1])
        noise = model.mechanism.noise_of(n_users) if private else 0.0
        # A count that noise could have made of nothing is no number to divide by.
        enough = count >= max(1.0, 2 * noise / model.mechanism.weight)
        step = given[0, :-1] / count if enough else np.zeros_like(before)
        after = torch.from_numpy(before + float(config["federated_server_rate"]) * step).float()
        model.load_global(unflat(after, model.global_weights()))
        model.rounds += 1
        self._note(epoch, len(chosen), refused, count if private else float(n_users), noise, step)
        if epoch + 1 == self._epochs():
            for users, examples in self.batches(able, self.generator("negatives/own")):
                model.end_rounds(users, examples)
        return float(torch.cat(losses).mean()) if losses else 0.0

    def _epochs(self) -> int:
        return int(self.ctx.pass_.epochs or 0)

    def sent(self, name: str, users: np.ndarray, vectors: np.ndarray) -> list[Upload]:
        """Returns what the clients send."""
        return [Upload(user, name, vector) for user, vector in zip(users.tolist(), vectors, strict=True)]

    def batches(self, clients: np.ndarray, generator: np.random.Generator) -> list[tuple[torch.Tensor, Examples]]:
        """Returns batches of clients with rows of like length: their users, and what they train on."""
        if not len(clients):
            return []
        examples, users = self.data.examples(clients, generator), torch.from_numpy(self.data.users[clients])
        order = examples.lengths().argsort(stable=True)
        chunks = [chunk.sort().values for chunk in order.split(self.model.at_once)]
        return [(users[chunk], examples.of(chunk)) for chunk in chunks]

    @staticmethod
    def _targets(examples: Examples) -> torch.Tensor:
        """Returns the number of targets of each client."""
        counts = (examples.targets > 0).sum(1)
        return torch.zeros(len(examples), dtype=counts.dtype).index_add(0, examples.client, counts)

    def _note(
        self, epoch: int, n_clients: int, refused: Mapping[str, int], count: float, noise: float, step: np.ndarray
    ) -> None:
        """Notes what the round has to tell."""
        if not self.private:
            return
        model, before = self.model, self.model.notes
        radius, numbers = model.mechanism.radius, len(step)
        this_round = {
            "round": epoch + 1,
            "clients": n_clients,
            "refused": sum(refused.values()),
            "count": round(count, 1),
            "noise/R": round(noise * numbers**0.5 / (max(count, 1.0) * radius), 4),
            "weights moved by": round(float(np.linalg.norm(step)), 4),
        }
        sent = model.mechanism.trust == "local" and model.mechanism.cost.private
        model.notes = {
            "rounds": [*before.get("rounds", []), this_round],
            "refused": dict(sorted((Counter(before.get("refused", {})) + Counter(refused)).items())),
            "clients": max(n_clients, before.get("clients", 0)),
            "bytes_up_per_client": before.get("bytes_up_per_client", 0) + 4 * numbers + 4 * (1 if sent else 0),
            "bytes_down_per_client": before.get("bytes_down_per_client", 0) + 4 * numbers,
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: what rounds leave is the model's state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes nothing."""
