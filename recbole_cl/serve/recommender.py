"""A loaded run that answers: lists, scores, neighbours, vectors.

Lists are ranked by :mod:`recbole_cl.evaluation.ranking`, as the evaluator's are: what may stand in a list, what a user
has had before and whom the model does not know is decided by the same rules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.utils import ModelType

from recbole_cl.errors import ConfigError, nearest
from recbole_cl.evaluation.ranking import (
    Way,
    bound_of,
    choose_way,
    limit,
    own_lists,
    rows_at_once,
    scores_of,
    top_items,
)
from recbole_cl.evaluation.rows import allowed_items
from recbole_cl.evaluation.scores import clear_caches
from recbole_cl.model.contract import contract
from recbole_cl.rng import ModelRandomness, derive
from recbole_cl.serve.answers import Position, Recommendation, Recommendations, Scores, Vectors
from recbole_cl.serve.asking import Asking
from recbole_cl.serve.forms import is_list
from recbole_cl.serve.ids import Ids, Vocabulary, token
from recbole_cl.serve.requests import (
    Request,
    RequestBatcher,
    excluded_items,
    excluded_pairs,
    known_items,
    seen_items,
)
from recbole_cl.serve.search import ModelIndex, VectorSearch, check_search, model_index, spread
from recbole_cl.serve.vectors import item_vectors, user_vectors
from recbole_cl.strategy.base import overrides
from recbole_cl.training.load import SavedRun
from recbole_cl.tree import clone_tree


class Recommender:
    """A version of a run, ready to be asked. Made by :func:`recbole_cl.load`.

    Args:
        saved: The version.
        search: ``exact``, ``approximate`` or ``dense``, see :func:`recbole_cl.load`.

    Attributes:
        model: The model, in eval mode.
        ids: Tokens and ids of users and items.
        retired: Tokens of items that are never recommended, though they have a row.
        position: Where in its stream the model stands.
    """

    def __init__(self, saved: SavedRun, search: str = "dense") -> None:
        self.saved, self.config, self.stream = saved, saved.config, saved.stream
        self.search = check_search(search)
        self._indices: dict[int, ModelIndex | None] = {}
        self._similar: tuple[Vectors, VectorSearch] | None = None
        runner = saved.runner()
        self.strategy = runner.strategy
        stages = self.stream.stages
        self._tasks = {stage.task.name: stage for stage in stages if stage.task.kind != "classification"}
        if not self._tasks:
            raise ConfigError(f"the tasks of the run in {saved.folder} rank no items; nothing can be recommended")
        self._stage = [stage for stage in stages if stage.task.kind != "classification"][-1]
        own = runner.standing(int(saved.state["stage"]))
        self._contexts = {stage.index: self.strategy.serving(own, stage) for stage in self._tasks.values()}
        self._contexts[self._stage.index] = self.strategy.serving(own, self._stage)
        self._adjusting = [s for s in self.strategy.members if overrides(s, "adjust_scores")]
        ctx = self._contexts[self._stage.index]
        for each in self._contexts.values():
            each.model.eval()
            clear_caches(each.model)
        self.model = ctx.model
        dataset, known, batcher = self.stream.dataset, ctx.known, ctx.batcher
        untrained = contract(self.model).scores_untrained_items
        self.ids = Ids(
            Vocabulary(dataset.field2id_token[dataset.uid_field], batcher.n_users, known.users),
            Vocabulary(
                dataset.field2id_token[dataset.iid_field],
                batcher.n_items,
                known.scorable(batcher.n_items, untrained),
            ),
        )
        self.retired = set(saved.versions.retired)
        self._served = ~np.isin(np.arange(len(self.ids.items.tokens)), self.ids.items.ids(self.retired))
        self._asking = Asking(self.config, self.ids, self.stream.table, self.needs_user)
        last = stages[int(saved.state["stage"])]
        self.position = Position(
            last.index + 1,
            last.name,
            float(dataset.raw_time.max()),
            batcher.n_users - 1,
            batcher.n_items - 1,
            saved.number,
            bool(saved.state.get("all_rows", False)),
        )

    def __repr__(self) -> str:
        name, at = f"{self.config['model']} on {self.config['dataset']}", self.position
        return f"Recommender({name}, version {at.version}, stage {at.stage}, {self.ids!r})"

    @property
    def sequential(self) -> bool:
        """Whether the model reads histories."""
        return bool(self.config["MODEL_TYPE"] == ModelType.SEQUENTIAL)

    @property
    def needs_user(self) -> bool:
        """Whether the model answers only for users that it has trained on."""
        return not self.sequential or hasattr(self.model, "n_users")

    # -- lists ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def recommend(
        self,
        users: Any = None,
        k: int = 10,
        *,
        histories: Any = None,
        allowed: Iterable[Any] | None = None,
        excluded: Any = None,
        filter_seen: bool | None = None,
        task: str | None = None,
    ) -> Recommendations:
        """Returns the best items for users or histories.

        Args:
            users: Tokens of users (a list, an array, a pandas column, or one token); lists in it are histories.
            k: Items wanted; fewer come back where there are no more.
            histories: Items of each request, oldest first, for users that the log does not have or whose history has
                gone on; with ``users``, one for each.
            allowed: Tokens of the items that may stand in a list; default all that the run's ``candidates`` allows.
            excluded: Tokens that may not, in any list; or a list of them for each request; or user to tokens.
            filter_seen: Leave out what the user has had; default as the run was evaluated (``repeatable``).
            task: Name of the task that is asked, where the stream has several; default the last that ranks items.

        Raises:
            ConfigError: If the request makes no sense (a length, a ``k``, a task), never for an unknown token.
        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise ConfigError(f"k: {k!r} must be an integer of at least 1")
        names, requests, unknown = self._asking.requests(users, histories)
        stage, ctx = self._asked(task)
        n = ctx.batcher.n_items
        untrained = contract(ctx.model).scores_untrained_items
        flags = allowed_items(self.config, ctx.known, stage, n, untrained) & self._served[:n]
        strange: list[str] = []
        if allowed is not None:
            chosen = known_items(self.ids.items, allowed, strange)
            flags &= np.isin(np.arange(n), chosen)
        left_out = excluded_items(self.ids.items, excluded, names, len(requests), strange)
        if not self.config.repeatable_items if filter_seen is None else filter_seen:
            left_out = [
                np.concatenate([mine, seen_items(self.stream.table, request)])
                for mine, request in zip(left_out, requests, strict=True)
            ]
        why = [self._asking.why_not(request) for request in requests]
        answered = [number for number, reason in enumerate(why) if reason is None]
        lists: dict[int, tuple[list[str], list[float]]] = {}
        index = None if allowed is not None else self._index(ctx, stage, flags)
        tokens = self.ids.items.tokens
        for numbers, items, scores in self._ranked(ctx, stage, requests, answered, int(k), flags, left_out, index):
            full = (items > 0).sum(axis=1).tolist()
            rows = zip(numbers, full, tokens[items].tolist(), scores.astype(np.float64).tolist(), strict=True)
            for number, n, row, values in rows:  # an empty slot has nothing behind it
                lists[number] = row[:n], values[:n]
        answers = []
        for number, (name, request) in enumerate(zip(names, requests, strict=True)):
            found, figures = lists.get(number, ([], []))
            status = "history" if name is None else self.ids.users.status(request.user)
            reason = why[number]
            if reason is None and not found:
                reason = "no item is left: every allowed one is excluded, seen, retired or untrained"
            answers.append(Recommendation(name, status, found, figures, unknown[number], reason))
        return Recommendations(answers, strange)

    def _ranked(
        self,
        ctx: Any,
        stage: Any,
        requests: list[Request],
        answered: list[int],
        k: int,
        flags: np.ndarray,
        left_out: Sequence[np.ndarray],
        index: ModelIndex | None,
    ) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Yields numbers of requests, and the items and scores of their lists."""
        allowed = torch.from_numpy(flags).to(ctx.device)
        bound = bound_of(allowed)
        if index is not None and index.users is not None:  # a user's vector is a row of a table: nothing to compute
            found = index.of_users([requests[number].user for number in answered], k, [left_out[n] for n in answered])
            if found is not None:
                yield answered, *found
                return
        by_index = index is not None and index.users is None
        for numbers, batcher, batch, way in self._batches(ctx, stage, requests, answered, by_index):
            if index is not None and by_index:
                queries = user_vectors(ctx, self.config["model"], batch).float().cpu().numpy()
                found = index.search.best(queries, k, [left_out[number] for number in numbers])
                if found is not None:
                    yield numbers, *found
                    continue
            pairs = excluded_pairs([left_out[number] for number in numbers], len(flags), ctx.device)
            if way is Way.OWN:
                items, values = own_lists(ctx.model, batch, min(k, len(flags) - 1), allowed, pairs)
                yield numbers, items.cpu().numpy(), values.cpu().numpy()
                continue
            for part, scores in self._scored(ctx, way, batcher, batch):
                inside = (pairs[0] >= part.start) & (pairs[0] < part.stop)
                limit(scores, bound, (pairs[0][inside] - part.start, pairs[1][inside]))
                items, values = top_items(scores, k)
                yield numbers[part], items.cpu().numpy(), values.cpu().numpy()

    def _index(self, ctx: Any, stage: Any, flags: np.ndarray) -> ModelIndex | None:
        """Returns an index over the items of a task, made when it is asked first; ``None`` where there can be none."""
        if self.search == "dense" or self._adjusting:
            return None
        if stage.index not in self._indices:
            self._indices[stage.index] = self._made_index(ctx, stage, flags)
        return self._indices[stage.index]

    def _made_index(self, ctx: Any, stage: Any, flags: np.ndarray) -> ModelIndex | None:
        requests = [Request(user) for user in spread(np.flatnonzero(self.ids.users.trained))]
        requests = [request for request in requests if self._asking.why_not(request) is None]
        probes = (
            (batch, torch.tensor([requests[number].user for number in numbers[part]]), part, scores)
            for numbers, batcher, batch, way in self._batches(ctx, stage, requests, list(range(len(requests))))
            for part, scores in ([] if way is Way.OWN else scores_of(way, ctx.model, batcher, batch))
        )
        approximate = self.search == "approximate"
        return model_index(ctx, self.config["model"], self.sequential, probes, flags, approximate)

    def _batches(
        self, ctx: Any, stage: Any, requests: list[Request], answered: list[int], by_index: bool = False
    ) -> Iterator[tuple[list[int], RequestBatcher, Any, Way]]:
        """Yields the answerable requests in batches: their numbers, their rows, and how their answers are had."""
        way = choose_way(ctx.model, candidates=False, adjusted=bool(self._adjusting), histories=False)
        size = rows_at_once(self.config, 1 if by_index else ctx.batcher.n_items, way)
        with self._answering(ctx, stage):
            for start in range(0, len(answered), size):
                numbers = answered[start : start + size]
                batcher = RequestBatcher(ctx, [requests[number] for number in numbers])
                yield numbers, batcher, batcher.requests(stage.index).to(ctx.device), way

    def _scored(self, ctx: Any, way: Way, batcher: Any, batch: Any) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yields rows and their scores of all items, as the strategies want them."""
        for part, scores in scores_of(way, ctx.model, batcher, batch):
            yield part, self.strategy.adjust_scores(ctx, batch, scores) if self._adjusting else scores

    @contextlib.contextmanager
    def _answering(self, ctx: Any, stage: Any) -> Iterator[None]:
        """A context in which the model answers; what strategies and models note in it is undone."""
        kept = [clone_tree(s.state_dict()) for s in self._adjusting]
        randomness = ModelRandomness(derive(self.config["seed"], ctx.index, "serve"))
        try:
            with randomness.owned(), contract(ctx.model).evaluating(stage, "test"):
                yield
        finally:
            for strategy, state in zip(self._adjusting, kept, strict=True):
                strategy.load_state_dict(state)

    # -- scores ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, pairs: Any, task: str | None = None) -> Scores:
        """Returns the scores of (user, item) or (history, item) pairs, those that :meth:`recommend` ranks by.

        Args:
            pairs: Pairs: a list, an array of shape ``[n, 2]``, or a frame whose first two columns are meant.
            task: See :meth:`recommend`.

        Raises:
            ConfigError: If these are no pairs; an unknown token gives NaN and a reason.
        """
        if isinstance(pairs, pd.DataFrame):
            pairs = list(pairs.iloc[:, :2].itertuples(index=False, name=None))
        pairs = list(pairs)
        if any(isinstance(pair, str) or not hasattr(pair, "__len__") or len(pair) != 2 for pair in pairs):
            raise ConfigError("pairs: give (user, item) or (history, item) pairs, two things each")
        who, what = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        as_history = [is_list(value) for value in who]
        requests, reasons = [], []
        stage, ctx = self._asked(task)
        item = self.ids.items.ids(what)
        for value, is_history, number, name in zip(who, as_history, item.tolist(), what, strict=True):
            request = (
                Request(0, self._asking.history(value)[0])
                if is_history
                else Request(int(self.ids.users.ids([value])[0]))
            )
            requests.append(request)
            reason = self._asking.why_not(request)
            status = self.ids.items.status(number)
            if reason is None and status != "known":
                problem = "is in no interaction" if status == "unknown" else "has no trained row"
                reason = f"the item {token(name)!r} {problem}"
            reasons.append(reason)
        values = np.full(len(pairs), np.nan)
        answered = [number for number, reason in enumerate(reasons) if reason is None]
        by_pair = choose_way(ctx.model, candidates=True) is Way.GIVEN and not self._adjusting
        for numbers, batcher, batch, way in self._batches(ctx, stage, requests, answered):
            wanted = torch.from_numpy(item[numbers]).to(ctx.device).unsqueeze(1)
            if by_pair:
                found = next(iter(scores_of(Way.GIVEN, ctx.model, batcher, batch, wanted)))[1].gather(1, wanted)
                values[numbers] = found[:, 0].double().cpu().numpy()
                continue
            if way is Way.OWN:
                raise ConfigError(f"model {self.config['model']} makes lists and scores no given items; use recommend")
            for part, scores in self._scored(ctx, way, batcher, batch):
                found = scores.gather(1, wanted[part])
                values[numbers[part]] = found[:, 0].double().cpu().numpy()
        return Scores(values, reasons)

    # -- vectors --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def vectors(self, of: str = "items") -> Vectors:
        """Returns the model's vectors of its trained items or users.

        Args:
            of: ``items`` or ``users``; a sequential model's users are the vectors of what the log holds of them.

        Raises:
            ConfigError: If the model has none.
        """
        if of not in ("items", "users"):
            raise ConfigError(f"vectors: {of!r} is neither 'items' nor 'users'")
        ctx = self._contexts[self._stage.index]
        vocabulary = self.ids.items if of == "items" else self.ids.users
        ids = np.flatnonzero(vocabulary.trained)
        if of == "items":
            values = item_vectors(ctx, self.config["model"])[ids]
        elif self.sequential:
            requests = [Request(int(number)) for number in ids]
            parts = [
                user_vectors(ctx, self.config["model"], batch)
                for _, _, batch, _ in self._batches(ctx, self._stage, requests, list(range(len(ids))))
            ]
            values = torch.cat(parts) if parts else torch.zeros(0, 0)
        else:
            values = user_vectors(ctx, self.config["model"], None)[ids]
        return Vectors(vocabulary.names(ids), values.float().cpu().numpy())

    @torch.no_grad()
    def similar_items(self, item: Any, k: int = 10) -> Recommendation:
        """Returns the items whose vectors point the same way as an item's (cosine), nearest first.

        Args:
            item: Token of the item.
            k: Items wanted; fewer come back where there are no more.
        """
        number = int(self.ids.items.ids([item])[0])
        status = self.ids.items.status(number)
        if status != "known":
            problem = "is in no interaction" if status == "unknown" else "has no trained row"
            return Recommendation(None, status, [], [], reason=f"the item {token(item)!r} {problem}")
        if self._similar is None:
            found = self.vectors("items")
            unit = found.values / np.linalg.norm(found.values, axis=1, keepdims=True).clip(min=1e-12)
            served = self._served[self.ids.items.ids(found.tokens)]
            self._similar = Vectors(found.tokens, unit), VectorSearch(unit, served, self.search == "approximate")
            self._rows = {name: row for row, name in enumerate(found.tokens)}
        unit_vectors, search = self._similar
        own = self._rows[token(item)]
        near = search.best(unit_vectors.values[own : own + 1], min(k + 1, len(unit_vectors)), [])
        if near is None:
            return Recommendation(None, status, [], [], reason="every other item is retired")
        kept = [
            (int(row), float(score))
            for row, score in zip(near[0][0], near[1][0], strict=True)
            if row != own and np.isfinite(score)
        ][:k]
        return Recommendation(None, status, [unit_vectors.tokens[row] for row, _ in kept], [s for _, s in kept])

    # -- requests -------------------------------------------------------------------------------------------------

    def _asked(self, task: str | None) -> tuple[Any, Any]:
        """Returns the stage whose task is asked, and the context that answers for it."""
        stage = self._stage if task is None else self._tasks.get(task)
        if stage is None:
            raise ConfigError(
                f"task: {task!r} is no task that ranks items{nearest(str(task), self._tasks) or '.'} There are "
                f"{', '.join(self._tasks)}"
            )
        return stage, self._contexts[stage.index]
