"""The training loader of models that learn from a knowledge graph: interactions, triples, or both side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.utils import KGDataLoaderState

from recbole_cl.rng import numpy_generator, torch_generator
from recbole_cl.stream.sampler import NegativeSampler

if TYPE_CHECKING:
    from recbole_cl.stream.loader import StageLoader


class KnowledgeStageLoader:
    """RecBole's ``KnowledgeBasedDataLoader`` over a :class:`StageLoader`: interactions, triples, or both.

    Args:
        general: Batches of interactions.
        seed: The run's seed; triples have generators of their own.
        stage: Stage index.
    """

    shuffle = False

    def __init__(self, general: StageLoader, seed: int, stage: int) -> None:
        self.general = general
        view = general.batcher.view
        self.view = view
        self.head, self.tail = view.head_entity_field, view.tail_entity_field
        self.prefix = general.batcher.config["NEG_PREFIX"]
        self.generator = torch_generator(seed, stage, "triples")
        heads, tails = view.kg_feat[self.head].numpy(), view.kg_feat[self.tail].numpy()
        total_items = len(view.field2id_token[view.iid_field])
        # Entities of items that come later are nodes of nobody yet, hence no negatives either.
        pool = np.r_[1 : general.batcher.n_items, total_items : view.entity_num]
        self.sampler = NegativeSampler(
            heads, tails, view.entity_num, numpy_generator(seed, stage, "triples"), pool=pool.astype(np.int64)
        )
        self.batch_size = general.batcher.config["train_batch_size"]
        self.state = KGDataLoaderState.RSKG
        self._order_start: torch.Tensor | None = None  # state of the generator before the running order of triples
        self._done = 0  # batches of triples taken from it
        self._skip = 0

    @property
    def dataset(self) -> Any:
        """RecBole's name for the dataset behind the loader."""
        return self.view

    _dataset = dataset

    @property
    def n_targets(self) -> int:
        """Training targets of an epoch."""
        return self.general.n_targets

    def set_mode(self, state: KGDataLoaderState) -> None:
        """Chooses interactions (RS), triples (KG) or both (RSKG)."""
        self.state = state

    def get_model(self, model: Any) -> None:
        """Tells the model that dynamic negative sampling asks."""
        self.general.get_model(model)

    def complete(self, rows: Interaction) -> Interaction:
        """See :meth:`StageLoader.complete`."""
        return self.general.complete(rows)

    def __len__(self) -> int:
        if self.state == KGDataLoaderState.KG:
            return max(1, -(-len(self.view.kg_feat) // self.batch_size))
        return len(self.general)

    def _triples(self) -> Iterator[Interaction]:
        # The order is drawn here, not at the first batch: an epoch that is resumed behind its last batch draws it, too.
        self._order_start = self.generator.get_state().clone()
        order = torch.randperm(len(self.view.kg_feat), generator=self.generator)
        self._done, self._skip = self._skip, 0
        return self._batches(order.split(self.batch_size)[self._done :])

    def _batches(self, indices: Sequence[torch.Tensor]) -> Iterator[Interaction]:
        for index in indices:
            self._done += 1
            rows = {name: column[index] for name, column in self.view.kg_feat.interaction.items()}
            drawn = self.sampler.sample(rows[self.head].numpy(), 1, rows[self.tail].numpy())
            rows[self.prefix + self.tail] = torch.from_numpy(drawn)
            yield Interaction(rows)

    def __iter__(self) -> Iterator[Interaction]:
        if self.state == KGDataLoaderState.KG:
            yield from self._triples()
        elif self.state == KGDataLoaderState.RS:
            yield from self.general
        else:
            triples = self._triples()
            for rows in self.general:
                batch = next(triples, None)
                if batch is None:  # more interactions than triples: once more through them
                    triples = self._triples()
                    batch = next(triples)
                rows.update(batch)
                yield rows
        self._order_start, self._done = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of both parts and the place in the running order of triples."""
        running = self._order_start is not None
        return {
            "general": self.general.state_dict(),
            "triples": self._order_start if running else self.generator.get_state(),
            "triples_done": self._done if running else self._skip,
            "negatives": self.sampler.generator.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts both parts back."""
        self.general.load_state_dict(state["general"])
        self.generator.set_state(state["triples"])
        self._order_start, self._done, self._skip = None, 0, int(state["triples_done"])
        self.sampler.generator.bit_generator.state = state["negatives"]
