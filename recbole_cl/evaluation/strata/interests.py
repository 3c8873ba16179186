"""Rows by how their users' interests have moved so far: stable, rapid or seasonal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from recbole.utils import FeatureType

from recbole_cl.errors import ConfigError
from recbole_cl.evaluation.strata.base import Stratum
from recbole_cl.registry import strata
from recbole_cl.schema import is_integer, is_number
from recbole_cl.stream.build import Stream
from recbole_cl.stream.stage import Stage, Targets


@strata.register("interests")
class Interests(Stratum):
    """Compares the newest behaviours of a history with those before, by the words of their items.

    A history is cut into blocks from its end, each as a count of words (genres, tags), and blocks are compared by the
    cosine c of their counts::

        history   [block 3][block 2][block 1][block 0] target

        interests_stable     c(0, 1) >= similar                                the newest are like those before
        interests_seasonal   not so, but c(0, j) >= similar for a j >= 2       what was there earlier has come back
        interests_rapid      neither                                           they are like nothing before
        interests_short      fewer than two whole blocks

    Only what lies before a target counts (``history`` says which).

    Args:
        parameters: ``field``, a column of items (token or token_seq; default the only one that the run has loaded);
            ``block``, behaviours of a block; ``blocks``, blocks that are looked at; ``similar``, the cosine from which
            on two are alike.
    """

    defaults: ClassVar[Mapping[str, Any]] = {"field": None, "block": 20, "blocks": 10, "similar": 0.7}

    def __init__(self, **parameters: Any) -> None:
        super().__init__(**parameters)
        for name, least in (("block", 1), ("blocks", 2)):
            if not is_integer(self.params[name]) or self.params[name] < least:
                raise ConfigError(f"strata: interests has {name} {self.params[name]!r}; it is an integer from {least}")
        similar = self.params["similar"]
        if not is_number(similar) or not 0 < similar <= 1:
            raise ConfigError(f"strata: interests has similar {similar!r}; it is a cosine, above 0 and at most 1")
        self._words: tuple[Any, np.ndarray] | None = None

    def words(self, dataset: Any) -> np.ndarray:
        """Returns the words of each item, ids from 1, shape ``[n_items, W]``, 0 for none.

        Raises:
            ConfigError: If it cannot be told which column of items is meant, or it is not loaded.
        """
        if self._words is None or self._words[0] is not dataset:
            features = dataset.item_feat
            kinds = (FeatureType.TOKEN, FeatureType.TOKEN_SEQ)
            known = [] if features is None else [
                name for name in features.interaction
                if name != dataset.iid_field and dataset.field2type.get(name) in kinds
            ]  # fmt: skip
            field = self.params["field"]
            if field is None and len(known) == 1:
                field = known[0]
            if field not in known:
                loaded = ", ".join(known) or "none is loaded: load_col: {item: [item_id, ...]}"
                raise ConfigError(
                    f"strata: interests has the field {self.params['field']!r}; name a column of items that holds "
                    f"words ({loaded}), such as strata: {{interests: {{field: tags}}}}"
                )
            column = features[field].numpy()
            self._words = dataset, column.reshape(len(column), -1)
        return self._words[1]

    def groups(self, stream: Stream, stage: Stage, targets: Targets) -> dict[str, np.ndarray]:
        """Returns four groups."""
        words, table = self.words(stream.dataset), stream.table
        size, most, n = int(self.params["block"]), int(self.params["blocks"]), int(words.max()) + 1
        kind = np.zeros(len(targets), dtype=np.int64)
        whole = np.minimum((targets.hi - targets.lo) // size, most)
        for row in np.flatnonzero(whole >= 2):
            blocks, end = int(whole[row]), int(targets.hi[row])
            words_of_rows = words[table.item[table.seq[end - blocks * size : end]]]
            block = np.repeat(np.arange(blocks - 1, -1, -1), size * words_of_rows.shape[1])
            counts = (
                np.bincount(block * n + words_of_rows.ravel(), minlength=blocks * n)
                .reshape(blocks, n)[:, 1:]
                .astype(float)
            )
            length = np.linalg.norm(counts, axis=1)
            alike = counts @ counts[0] >= self.params["similar"] * length * length[0] * (1 - 1e-12)
            alike &= length * length[0] > 0
            kind[row] = 1 if alike[1] else 2 if alike[2:].any() else 3
        names = ("interests_short", "interests_stable", "interests_seasonal", "interests_rapid")
        return {name: kind == number for number, name in enumerate(names)}
