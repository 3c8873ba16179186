"""What a stratum is, and how those that were asked for come to be."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from recbole_cl.errors import ConfigError, TrainingError, nearest
from recbole_cl.stream.build import Stream
from recbole_cl.stream.stage import Stage, Targets

TAKEN = ("all", "known", "cold", "warm_user", "new_user", "warm_item", "new_item")
"""Names of the strata that every evaluation has."""


class Stratum(abc.ABC):
    """Cuts evaluated rows into groups.

    Args:
        parameters: Its parameters, of those in ``defaults``.

    Attributes:
        defaults: Its parameters with their defaults.

    Raises:
        ConfigError: If a parameter is unknown.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, **parameters: Any) -> None:
        for key in parameters:
            if key not in self.defaults:
                known = ", ".join(self.defaults) or "none"
                raise ConfigError(
                    f"strata: {type(self).__name__} has no parameter {key!r}{nearest(key, list(self.defaults))}; "
                    f"known: {known}"
                )
        self.params: dict[str, Any] = {**self.defaults, **parameters}

    @abc.abstractmethod
    def groups(self, stream: Stream, stage: Stage, targets: Targets) -> dict[str, np.ndarray]:
        """Returns the groups of rows, name to the flag of each, shape ``[n]``; a name starts with the stratum's.

        A group may depend on what is known when a target is asked for and on nothing later: on its user, its history
        (``lo`` to ``hi``), interactions at positions before ``targets.position``, training targets of the stages up to
        the evaluated one. A row that is ranked for several targets of a user has the first of them.

        Args:
            stream: The stream.
            stage: The evaluated stage.
            targets: The rows, ``n`` of them; ``label`` is what is asked for, so it must not be read.
        """


def flags_of(chosen: Sequence[Stratum], stream: Stream, stage: Stage, targets: Targets) -> dict[str, np.ndarray]:
    """Returns the groups of all chosen strata, name to the flag of each row, shape ``[n]``.

    Args:
        chosen: The strata.
        stream: The stream.
        stage: The evaluated stage.
        targets: The rows, ``n`` of them.

    Raises:
        TrainingError: If a stratum gives something else than a flag a row, or a name that is taken.
    """
    out: dict[str, np.ndarray] = {}
    for stratum in chosen:
        for name, given in stratum.groups(stream, stage, targets).items():
            flag, where = np.asarray(given), f"strata: {type(stratum).__name__}: group {name!r}"
            if flag.shape != (len(targets),) or flag.dtype != bool:
                raise TrainingError(
                    f"{where} has the shape {list(flag.shape)} and type {flag.dtype}; it is one bool for each of the "
                    f"{len(targets)} rows"
                )
            if name in TAKEN or name in out:
                raise TrainingError(
                    f"{where} has a name that another stratum has; begin it with the stratum's own name"
                )
            out[name] = flag
    return out
