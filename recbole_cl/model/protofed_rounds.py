"""Who trains the stages of ProtoFed-SP behind the backbone: the shared parts on base data, then the rounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recbole_cl.federated.client import (
    Examples,
    Prompts,
    alignment_of,
    encode_upload,
    observe,
    recommendation_losses,
    routed,
)
from recbole_cl.federated.prompts import plasticity, short_step, stability
from recbole_cl.federated.server import bytes_of_round, server_round
from recbole_cl.federated.uploads import Upload, accept
from recbole_cl.rng import numpy_generator
from recbole_cl.stream.batch import TARGETS
from recbole_cl.stream.sampler import NegativeSampler

if TYPE_CHECKING:
    from recbole_cl.model.protofed_sp import ProtoFedSP
    from recbole_cl.strategy.context import StageContext


class ClientData:
    """The targets of a stage, by client.

    Args:
        model: Knows which items have a row.
        ctx: The stage; its loader has cut the histories into windows.
    """

    def __init__(self, model: ProtoFedSP, ctx: StageContext) -> None:
        self.model, self.ctx = model, ctx
        windows = ctx.loader.units
        order = np.argsort(windows.user, kind="stable")  # a client's windows stay in the order of time
        self.windows, self.order = windows, order
        self.users, self._first = np.unique(windows.user[order], return_index=True)
        self._last = np.r_[self._first[1:], len(order)]

    def examples(self, clients: np.ndarray, generator: np.random.Generator) -> Examples:
        """Returns what some clients train on.

        Args:
            clients: Numbers of clients in ``users``, rising.
            generator: Draws the negatives.
        """
        first, last = self._first[clients], self._last[clients]
        counts = last - first
        owner = np.repeat(np.arange(len(clients)), counts)
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = self.ctx.batcher.window_rows(self.windows, self.order[np.repeat(first, counts) + inside])
        sequence, after = self.model.readable(rows[self.model.ITEM_SEQ])
        # Before an item without a row stands none that it could be a target of; what came after it is the next one.
        targets = rows[TARGETS].gather(1, after) * (sequence > 0)
        targets = torch.where(self.model.rowed[targets], targets, 0)
        supervised = targets > 0
        negatives = targets.new_zeros(*targets.shape, int(self.ctx.config["protofed_negatives"]))
        flat = targets[supervised].numpy()
        pool = np.flatnonzero(self.model.rowed.numpy())
        sampler = NegativeSampler(np.empty(0), np.empty(0), self.ctx.batcher.n_items, generator, pool=pool)
        drawn = sampler.sample_repeatable(negatives.size(-1), flat).reshape(negatives.size(-1), -1)
        negatives[supervised] = torch.from_numpy(drawn.T.copy())
        query = self.model.queries_of(sequence[np.cumsum(counts) - 1]).detach()
        found = Examples(torch.from_numpy(owner), sequence, targets, negatives, query)
        if self.model.prompt_per == "target":
            return found.by_target(lambda rows: self.model.queries_of(rows).detach())
        return found

    def trained(self) -> np.ndarray:
        """Returns the numbers of the clients that have a target whose item has a row, rising."""
        table, supervised = self.ctx.batcher.table, self.windows.targets
        warm = self.model.rowed.numpy()[supervised.label]
        return np.flatnonzero(np.isin(self.users, table.user[supervised.position[warm]]))


class SharedTraining:
    """Trains encoders, decoder, alpha and the first prototypes on the base stage, with the prompts of its users.

    It is ordinary training on base data, outside the guarantee. A user's drift is that from the first half of its
    window to the whole, since the base stage has nothing before it.

    Args:
        model: The model.
        ctx: The base stage.
    """

    def __init__(self, model: ProtoFedSP, ctx: StageContext) -> None:
        self.model, self.ctx = model, ctx
        self.data = ClientData(model, ctx)
        self.optimizer = torch.optim.Adam(model.shared.parameters(), lr=float(ctx.config["protofed_shared_rate"]))
        self.n_targets = len(ctx.loader.units.targets)

    def train_epoch(self, loader: Any, epoch: int) -> float:
        """Trains an epoch over all clients of the base stage; returns the sum of the batches' mean losses."""
        model, total = self.model, 0.0
        model.eval()
        generator = numpy_generator(self.ctx.config["seed"], self.ctx.index, f"protofed/shared/{epoch}")
        clients = generator.permutation(self.data.trained())
        for first in range(0, len(clients), 64):
            chosen = np.sort(clients[first : first + 64])
            examples = self.data.examples(chosen, generator)
            total += self._step(torch.from_numpy(self.data.users[chosen]), examples)
        return total

    def _step(self, users: torch.Tensor, examples: Examples) -> float:
        """Trains a batch of clients."""
        model, shared, settings = self.model, self.model.shared, self.model.settings
        prompts = model.clients.get(users)
        half = examples.sequence.clone()
        lengths = (half > 0).sum(dim=1)
        half[torch.arange(half.size(1)) >= (lengths // 2).clamp(min=1).unsqueeze(1)] = 0
        last = torch.bincount(examples.client, minlength=len(examples)).cumsum(0) - 1
        earlier = Prompts.new(len(users), model.clients.tokens, model.clients.width)
        moved = observe(earlier, model.queries_of(half[last]).detach(), settings.window)
        moved = observe(moved, examples.query, settings.window)
        prompts = replace(prompts, mean=moved.mean, drift=moved.drift, usual=moved.usual, seen=moved.seen)
        long = prompts.long.clone().requires_grad_(True)
        short = prompts.short.clone().requires_grad_(True)
        alpha = plasticity(prompts.drift, shared.slope, shared.offset).view(-1, 1, 1)
        apart = examples.row_query is not None  # each target is routed by its own history
        given = routed(shared, examples.query if examples.row_query is None else examples.row_query, settings)
        prompt = torch.zeros_like(long) if apart else given
        prompt = prompt + long if settings.long else prompt
        prompt = prompt + alpha * short if settings.short else prompt
        of_rows = given + prompt[examples.client] if apart else prompt[examples.client]
        outputs = model.outputs(examples.sequence)(of_rows, examples.targets > 0)
        table = model.backbone.item_embedding.weight
        losses = recommendation_losses(outputs, table, examples, settings.loss)
        weight = stability(prompts.usual, settings.stability, settings.stability_decay)
        aligned = alignment_of(shared, long, alpha * short, shared.prototypes, settings)
        # The decoder's prompts lead back to their prototypes, so that phi and the decoder speak one language.
        cycle = (shared.encode_prompt(shared.decode()) - shared.prototypes).square().sum(-1).mean()
        loss = (losses + (weight * aligned if settings.alignment else 0.0)).mean() + cycle
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            size = len(users)  # the mean over clients is none of a client's business
            if settings.short:
                assert short.grad is not None
                prompts = replace(
                    prompts, short=short_step(prompts.short, size * short.grad, settings.short_rate, settings.sparsity)
                )
            if settings.long:
                assert long.grad is not None
                prompts = replace(prompts, long=prompts.long - settings.long_rate * size * long.grad)
        model.clients.put(users, prompts)
        self.ctx.log("recommendation", losses.detach().mean())
        self.ctx.log("alignment", aligned.detach().mean())
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        """Returns Adam's moments, by the number of the parameter."""
        state = self.optimizer.state_dict()["state"]
        return {"moments": {str(number): dict(moments) for number, moments in state.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts the moments back."""
        moments = {int(number): dict(moments) for number, moments in state["moments"].items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})


class Rounds:
    """The rounds of a slice: clients are drawn, train their prompts and send a vector; the server releases prototypes.

    An epoch is a round. All that it draws is derived from its number, so a round that is run again is the same.

    Args:
        model: The model.
        ctx: The stage.
    """

    def __init__(self, model: ProtoFedSP, ctx: StageContext) -> None:
        self.model, self.ctx = model, ctx
        self.data = ClientData(model, ctx)
        self.epochs = int(ctx.config["protofed_rounds"])
        self.n_targets = 0

    def generator(self, name: str) -> np.random.Generator:
        """Returns a generator of the run's seed, or one that nobody can foresee (``protofed_noise: system``)."""
        if name.startswith("noise/") and self.ctx.config["protofed_noise"] == "system":
            return np.random.default_rng()
        return numpy_generator(self.ctx.config["seed"], self.ctx.index, f"protofed/{name}")

    def train_epoch(self, loader: Any, epoch: int) -> float:
        """Runs a round; returns the mean loss of its clients before their steps."""
        model, config = self.model, self.ctx.config
        model.eval()
        able = self.data.trained()
        coins = self.generator(f"clients/{epoch}").random(len(able))
        chosen = able[coins < float(config["protofed_participation"])]
        self.n_targets = 0
        losses = torch.zeros(0)
        users = torch.from_numpy(self.data.users[chosen])
        vectors = np.zeros((0, model.plan.sizes.width))
        if len(chosen):
            examples = self.data.examples(chosen, self.generator(f"negatives/{epoch}"))
            self.n_targets = int((examples.targets > 0).sum())
            prompts = observe(model.clients.get(users), examples.query, model.settings.window)
            table = model.backbone.item_embedding.weight
            prompts, losses = model.engine.run(model.outputs, table, model.shared, prompts, examples, model.settings)
            model.clients.put(users, prompts)
            self.ctx.log("drift", prompts.drift.mean())
            self.ctx.log("alpha", plasticity(prompts.drift, model.shared.slope, model.shared.offset).mean())
            self.ctx.log("short_zeros", (prompts.short == 0).float().mean())
            vectors = encode_upload(model.shared, prompts, model.plan.mechanism.radius).numpy()
            sends = model.aggregator.sends(prompts.drift.numpy())
            users, vectors = users[torch.from_numpy(sends)], vectors[sends]
        if not config["protofed_static"]:
            self._release(epoch, users.numpy(), vectors)
        return float(losses.mean()) if len(losses) else 0.0

    def sent(self, round_id: str, users: np.ndarray, vectors: np.ndarray) -> list[Upload]:
        """Returns what the clients send; what comes over a wire may be anything, and the server looks at it as such."""
        return [Upload(user, round_id, vector) for user, vector in zip(users.tolist(), vectors, strict=True)]

    def _release(self, epoch: int, users: np.ndarray, vectors: np.ndarray) -> None:
        """Lets the server take the uploads that are fit, and refresh the prototypes."""
        model, plan = self.model, self.model.plan
        round_id = f"{self.ctx.config['dataset']}/seed{self.ctx.config['seed']}/stage{self.ctx.index}/round{epoch}"
        taken = accept(
            self.sent(round_id, users, vectors), round_id, users.tolist(), plan.sizes.width, plan.mechanism.radius
        )
        ledger, shared = model.ledger(), model.shared
        before = shared.prototypes.detach().cpu().numpy().astype(np.float64)
        given = server_round(model.aggregator, taken.vectors, before, plan.mechanism, ledger, round_id, self.generator)
        with torch.no_grad():
            shared.prototypes.copy_(torch.from_numpy(given.prototypes).to(shared.prototypes))
        model.published = [*model.published, *(f"{round_id}/{step}" for step in range(model.aggregator.steps))]
        self._note(
            epoch, len(vectors), given, taken.refused, float(np.linalg.norm(given.prototypes - before, axis=1).mean())
        )

    def _note(self, epoch: int, n_clients: int, given: Any, refused: Mapping[str, int], moved: float) -> None:
        """Notes what the round has to tell."""
        model, plan = self.model, self.model.plan
        mechanism, sizes = plan.mechanism, plan.sizes
        up, down = bytes_of_round(
            sizes.prototypes, sizes.width, model.aggregator.steps, mechanism.trust, mechanism.bits
        )
        before = self.model.notes
        rounds = [*before.get("rounds", [])]
        rounds.append(
            {
                "round": epoch + 1,
                "clients": n_clients,
                "refused": sum(refused.values()),
                "noisy count": round(float(given.counts.sum()), 1),
                "noise/R": round(given.noise_ratio(sizes.width, mechanism.radius, mechanism.weight), 4),
                "prototypes moved by": round(moved, 4),
                "begun anew": given.revived,
            }
        )
        counted = Counter(before.get("refused", {})) + Counter(refused)
        self.model.notes = {
            "rounds": rounds,
            "refused": dict(sorted(counted.items())),
            "clients": max(n_clients, before.get("clients", 0)),
            "bytes_up_per_client": before.get("bytes_up_per_client", 0) + up,
            "bytes_down_per_client": before.get("bytes_down_per_client", 0) + down,
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: what rounds leave is the model's state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes nothing."""
