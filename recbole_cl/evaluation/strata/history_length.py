"""Rows by the length of their histories."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from recbole_cl.errors import ConfigError
from recbole_cl.evaluation.strata.base import Stratum
from recbole_cl.registry import strata
from recbole_cl.schema import is_integer
from recbole_cl.stream.build import Stream
from recbole_cl.stream.stage import Stage, Targets


@strata.register("history_length")
class HistoryLength(Stratum):
    """Bins of the number of interactions that come before a target (``history`` says which count).

    Thresholds ``[5, 20]`` make ``history_0_to_4``, ``history_5_to_19`` and ``history_from_20``.

    Args:
        parameters: ``thresholds``, rising integers of at least 1: where a new bin begins.
    """

    defaults: ClassVar[Mapping[str, Any]] = {"thresholds": (5, 20)}

    def __init__(self, **parameters: Any) -> None:
        super().__init__(**parameters)
        given = self.params["thresholds"]
        edges = [0, *given] if isinstance(given, list | tuple) else []
        if len(edges) < 2 or not all(map(is_integer, edges)) or any(a >= b for a, b in pairwise(edges)):
            raise ConfigError(
                f"strata: history_length has the thresholds {given!r}; give rising integers of at least 1, such as "
                "[5, 20]"
            )
        self.edges = edges

    def groups(self, stream: Stream, stage: Stage, targets: Targets) -> dict[str, np.ndarray]:
        """Returns a group for each bin."""
        length = targets.hi - targets.lo
        out = {f"history_{a}_to_{b - 1}": (length >= a) & (length < b) for a, b in pairwise(self.edges)}
        return {**out, f"history_from_{self.edges[-1]}": length >= self.edges[-1]}
