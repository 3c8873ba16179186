"""What the parts of one run share: its stream, its strategies, its models, and what it has found out and learnt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recbole_cl import distributed
from recbole_cl.evaluation.evaluator import Evaluator
from recbole_cl.evaluation.known import Known
from recbole_cl.results.journal import Journal
from recbole_cl.strategy.composite import Composite
from recbole_cl.stream.build import Stream
from recbole_cl.training.stage_models import StageModels


@dataclass
class RunState:
    """A run over one stream, as far as it has come.

    Attributes:
        config: The run's configuration.
        strategy: The strategies as one.
        stream: The stream.
        models: Makes the models of its stages.
        journal: Results, curves, costs and warnings so far.
        evaluator: Scores a model.
        known: What the model has trained on.
        moments: The optimiser's state as the last pass left it, by parameter name.
        epochs: How many epochs each pass trains, by stage and name, where another run has found that out; it is not
            validated then.
    """

    config: Any
    strategy: Composite
    stream: Stream
    models: StageModels
    journal: Journal
    evaluator: Evaluator
    known: Known
    moments: dict[str, Any] = field(default_factory=dict)
    epochs: Mapping[tuple[int, str], int] = field(default_factory=dict)

    @classmethod
    def begin(cls, config: Any, strategy: Composite, stream: Stream, models: StageModels | None = None) -> RunState:
        """Returns a run of which nothing has been trained."""
        return cls(
            config,
            strategy,
            stream,
            models or StageModels(config, stream, strategy),
            Journal(config, stream),
            Evaluator(config, stream, strategy),
            Known.nothing(stream.table),
        )

    @property
    def main(self) -> bool:
        """True in the process that writes files and progress bars."""
        return distributed.current().main
