"""What a model may tell and do beyond RecBole's ``calculate_loss`` and ``predict``, each name with its neutral default.

A model of RecBole's needs nothing of this. One with more to say puts :class:`ContinualModel` in front of RecBole's
class and overrides the names that it needs; ``docs/write_a_model.md`` writes such a model from nothing::

    class Mine(ContinualModel, GeneralRecommender):
        def prepare_stage(self, ctx): ...

The rest of the package asks a model through two functions: :func:`contract` gives the model with the defaults of what
it does not have, :func:`offers` tells whether it has a method of its own. Nobody else looks for a name by ``hasattr``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import ModelType

from recbole_cl.registry import Registry
from recbole_cl.stream.stage import Stage, Targets, Task
from recbole_cl.stream.vocabulary import Growth

if TYPE_CHECKING:
    from recbole_cl.model.forget import Forgetting
    from recbole_cl.strategy.context import Pass, StageContext
    from recbole_cl.stream.build import Stream


class StageTrainer(Protocol):
    """What trains the epochs of a pass: RecBole's trainer with hooks, or one that a model brings.

    Attributes:
        epochs: Epochs at most, where a trainer has a number of its own (optional; else the property ``epochs``).
        n_targets: Training targets that the last epoch used, where they are not those of the loader (optional).
    """

    def train_epoch(self, loader: Any, epoch: int) -> Any:
        """Trains an epoch over the loader's batches; returns the loss summed over them, parts as a tuple, or None."""

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that a resumed pass needs beside the model."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts a state back."""


class ContinualModel:
    """Neutral defaults of every optional name of a model; a mixin in front of a RecBole class.

    Attributes:
        capabilities: What a strategy may need and no method tells (:func:`recbole_cl.model.capabilities.capabilities`).
        backbone_property: Property that names the model inside this one; its defaults are loaded, too.
        backbone_types: Types of models that may stand there.
        type_of_backbone: This model is of the type that its backbone has, in each configuration: RecBole's quick start,
            the negatives, the histories and the evaluation follow the backbone's class, and so do ``type`` and
            ``input_type`` of this class. It may derive from RecBole's ``AbstractRecommender`` alone.
        components: Properties that name a component, to the registry that it is in (``{"pcl_encoder": encoders}``). The
            component's defaults are loaded, too; ``config.component(key)`` and ``config.component_parameters(key)``
            give what was chosen.
        trains_all_positions: Train on windows, every position of which has a target (``train_positions: all``).
        ties_rows: The loss is no mean over rows, so several processes must not part a batch.
        masked_entries: Entries of trainable parameters that are held all the same; for the report.
        growth_axes: Parameter to the sides (``user``, ``item``, ``None``) of its dimensions, where sizes do not tell.
        scores_untrained_items: An item that training never saw can be scored (it is known by its content), so it is a
            candidate and no cold target.
        builds_on_stages: A stage leaves what earlier ones trained as it is and builds on it, so no pass may begin from
            new weights, and there is nothing for replay or pruning to keep.
        own_metrics: Metrics that :meth:`measure` gives for each target, to whether more is better.
        presets: Properties that stand for many others: ``{property: {value: {other property: its default}}}``.
        strategy_hooks: Hooks of strategies (``loss_terms``) that this model's own trainer runs.
        changeable: Properties of its own that an update may set: what it spends, not what it is.
    """

    capabilities: ClassVar[Iterable[str]] = ()
    backbone_property: ClassVar[str | None] = None
    backbone_types: ClassVar[frozenset[ModelType]] = frozenset({ModelType.SEQUENTIAL})
    type_of_backbone: ClassVar[bool] = False
    components: ClassVar[Mapping[str, Registry]] = {}
    trains_all_positions: Any = False
    ties_rows: ClassVar[bool] = False
    masked_entries: int = 0
    growth_axes: Any = None
    scores_untrained_items: bool = False
    builds_on_stages: ClassVar[bool] = False
    own_metrics: ClassVar[Mapping[str, bool]] = {}
    presets: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {}
    strategy_hooks: ClassVar[frozenset[str]] = frozenset()
    changeable: ClassVar[frozenset[str]] = frozenset()

    # -- state ----------------------------------------------------------------------------------------------------

    def frozen_bases(self) -> dict[str, dict[str, Any]]:
        """Returns the frozen parts that checkpoints refer to and do not hold.

        Prefix of the parts' names to ``{"source": ..., "sha256": ...}``; ``"names"``, a list, says which tensors below
        the prefix belong to the base where not all do (adapters live below the same prefix).

        The source ``"run"``, without a hash, says that the run has trained this part itself and that it is frozen from
        now on: its checkpoints and versions share one file with it (``frozen/`` in the run's folder). A model that
        takes such a state over has those parameters frozen, until :meth:`stage_trainer` says otherwise.
        """
        return {}

    def owned_state(self) -> dict[str, Any]:
        """Returns state that is no parameter and no buffer: what each user has, counters, histories."""
        return {}

    def load_owned_state(self, state: Mapping[str, Any]) -> None:
        """Puts back what :meth:`owned_state` returned."""

    def grow_owned_state(self, state: Mapping[str, Any], growth: Growth) -> Mapping[str, Any]:
        """Returns the owned state of the stage before with rows for the users and items that came since."""
        return state

    def fit_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns a saved state as this model takes it: one over a shorter stream lacks what later stages have.

        A saved run that is updated has a stage more than when it was saved. Models with a part for each stage complete
        the state here by their own, fresh parts.

        Args:
            state: As :func:`recbole_cl.model.state.owned_state` gave it.
        """
        return state

    def without_users(self, state: Mapping[str, Any], forgetting: Forgetting) -> Mapping[str, Any]:
        """Returns a saved :meth:`owned_state` without users who are to be forgotten.

        By default named tensors lose their rows, and memories with a column ``user`` or ``users`` their entries.
        """
        return forgetting.nest(state)  # type: ignore[no-any-return]

    def forget_users(self, stream: Stream, users: list[str]) -> int:
        """Removes what side stores hold of users; returns how many entries there were.

        Args:
            stream: What the model was trained over, the users still in it.
            users: Their tokens.
        """
        return 0

    def grow_in_place(self, view: Any, users: tuple[int, int], items: tuple[int, int]) -> Growth:
        """Grows this very model to the next stage; a model that has this method lives on, and no new one is made.

        Args:
            view: RecBole's dataset at the stage that begins.
            users: Rows for users (before, after).
            items: Rows for items (before, after).
        """
        raise NotImplementedError(f"{type(self).__name__} is made anew at every stage")

    def side_stores(self) -> dict[str, str]:
        """Returns durable stores outside the checkpoints, name to path; they are named in them, never rolled back."""
        return {}

    # -- a stage --------------------------------------------------------------------------------------------------

    def prepare_stage(self, ctx: StageContext) -> None:
        """Does work before a stage is trained (calls of a language model, encodings), with old knowledge in place.

        Runs again where a run is resumed inside the stage, on the state that it left the first time, where a pass
        begins from new weights, and for the untrained model of ``fwt_reference``: what is costly belongs into a side
        store, and done twice it must leave what it leaves done once. What it draws comes from a random state of its
        own, the same each time. A model is also made anew without it, as the previous one of a later stage or over
        another graph: what it made is then there only where it is state, a parameter, a buffer or :meth:`owned_state`.
        """

    def plan_stage(self, ctx: StageContext, passes: list[Pass]) -> list[Pass]:
        """Returns the passes of a stage: the strategies' own, or others in their place (the backbone, then the rest).

        Runs once as a stage begins and again where a run is resumed inside it; it must give the same passes and change
        nothing. The strategies' plan may be empty (``Pretrain``), of new weights (``FullRetrain``) or of other data
        (``Joint``): a model that splits a pass splits each of them, and its second half goes on from the first.
        """
        return passes

    def begin_pass(self, ctx: StageContext) -> None:
        """Says which parameters the pass ``ctx.pass_`` trains (``requires_grad``), before the strategies have a say.

        Also on resume, then with the checkpoint's weights. What the last pass trained is what strategies look at as
        the stage ends.
        """

    def stage_trainer(self, ctx: StageContext, learning_rate: float) -> StageTrainer | None:
        """Returns what trains the pass ``ctx.pass_``, or ``None`` for RecBole's trainer."""
        return None

    def parameter_groups(self, ctx: StageContext, learning_rate: float) -> list[dict[str, Any]] | None:
        """Returns the optimiser's groups (``params``, ``lr``, ``weight_decay``), or ``None`` for one of all.

        Every parameter that the pass trains stands in one group, once; a group without ``lr`` has the pass's rate.
        """
        return None

    def learned(self, ctx: StageContext, targets: Targets) -> Targets:
        """Returns which of the pass's targets the model truly trains on: what is left out stays unknown to it.

        Asked as the pass begins and after each of its epochs. Where the best epoch's weights are put back, so is what
        was known by then.
        """
        return targets

    def collate(self, batcher: Any, rows: Interaction, targets: Targets, evaluation: bool) -> Interaction:
        """Returns the rows of targets with what the model reads beside RecBole's columns, in training and evaluation.

        Args:
            batcher: The :class:`~recbole_cl.stream.batch.Batcher` that made the rows.
            rows: One row a target (a window counts as its last); ``_lo`` and ``_hi`` are the range of its history.
                Negatives come later, as copies of their positive's row: what depends on the item is looked up by id.
            targets: The targets.
            evaluation: Ids that the model has no rows for are 0.
        """
        return rows

    # -- evaluation -----------------------------------------------------------------------------------------------

    def evaluating(self, stage: Stage, split: str) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which targets of a split are answered; what is changed in it is undone when it ends."""
        return contextlib.nullcontext()

    def scores(self, batch: Interaction, items: torch.Tensor) -> torch.Tensor:
        """Returns the scores of given items, shape ``[B, C]``, for ids of that shape; 0 is padding."""
        raise NotImplementedError(f"{type(self).__name__} does not score given items")

    def recommend(
        self, batch: Interaction, k: int, allowed: torch.Tensor, excluded: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the best items of each row: a decoder learns what is allowed before it decodes.

        Args:
            batch: Rows, ``B`` of them.
            k: Items wanted.
            allowed: Flag of each item, shape ``[n_items]``.
            excluded: Rows and items that must not stand in a list, shape ``[E]`` each.

        Returns:
            Items ``[B, k]``, best first, 0 for an empty slot, and their scores ``[B, k]``, -inf there.
        """
        raise NotImplementedError(f"{type(self).__name__} ranks by the scores of all items")

    def item_vectors(self) -> torch.Tensor:
        """Returns a vector for each item, shape ``[n_items, d]``: what serving compares and exports."""
        raise NotImplementedError(f"{type(self).__name__} tells no vectors of items")

    def measure(self, batch: Interaction) -> dict[str, torch.Tensor]:
        """Returns the metrics of ``own_metrics`` of each row, shape ``[B]`` each (a negative log likelihood)."""
        return {}

    def item_levels(self) -> dict[str, np.ndarray]:
        """Returns coarser identities of items, name to the group of each item, shape ``[n_items]``, 0 for none.

        Rankings are also measured as lists of groups (semantic ids that several items share): a record's ``level``.
        """
        return {}

    def predict_task(self, batch: Interaction, task: Task) -> torch.Tensor:
        """Returns class logits of a classification, shape ``[B, n_labels]``."""
        raise NotImplementedError(f"{type(self).__name__} does not answer classifications")

    def shares_prefixes(self) -> bool:
        """Tells whether one pass over a sequence gives the outputs of all its prefixes."""
        return False

    def causal_part(self) -> Any:
        """Returns the causal model whose outputs at positions this one's are: itself, or one inside it."""
        return self

    def added_at(self, batch: Interaction, at: torch.Tensor) -> torch.Tensor | None:
        """Returns what is added to the encoder's outputs at some positions of windows, ``[n, d]``, if anything is.

        Args:
            batch: Windows.
            at: Flags of the positions, shape ``[B, L]``.
        """
        return None

    def scores_by_queries(self) -> bool:
        """Tells whether ``item_queries`` and ``score_queries`` together are ``full_sort_predict``."""
        return False

    # -- what is told ---------------------------------------------------------------------------------------------

    def stage_costs(self) -> dict[str, Any]:
        """Returns entries of the stage's costs that only the model knows."""
        return {}

    def report(self) -> dict[str, Any]:
        """Returns what the stage is to tell beside the matrix, for result.json and report.html; JSON-able.

        ``{"numbers": {name: value}, "tables": {title: [row, ...]}, "figures": {title: {line: [[x, y], ...]}}}``, each
        of them optional; a row is a dict of column to value.
        """
        return {}


def offers(model: Any, name: str) -> bool:
    """Tells whether a model has a method of its own by a name: neither the contract's default nor RecBole's."""
    method = getattr(type(model), name, None)
    defaults = (getattr(base, name, None) for base in (ContinualModel, AbstractRecommender))
    return method is not None and all(method is not default for default in defaults)


def contract(model: Any) -> Any:
    """Returns a model as the contract knows it: every optional name is there, neutral where the model has none."""
    return model if isinstance(model, ContinualModel) else _WithDefaults(model)


class _WithDefaults:
    """A model that does not derive from :class:`ContinualModel`, and the defaults of what it does not have.

    Args:
        model: The model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        if name == "_model" or not hasattr(ContinualModel, name):
            raise AttributeError(f"the contract of models has no name {name!r}")
        own = getattr(self._model, name, None)
        if own is not None:
            return own
        default = getattr(ContinualModel, name)
        return default.__get__(self._model) if callable(default) else default
