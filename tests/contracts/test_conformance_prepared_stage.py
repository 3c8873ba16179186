"""Work before a stage, as LIBER's calls need it: kept in a durable store, told in costs and in a report of its own."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conformance_helpers import FUSE, Job, Walk, assert_grows, assert_same_walk, checkpoints, write_log
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.utils import InputType
from torch import nn
from torch.nn import functional as F

from recbole_cl import checkpoint
from recbole_cl.model.contract import ContinualModel
from recbole_cl.strategy.base import Strategy
from recbole_cl.strategy.context import StageContext

WIDTH = 4


def lines(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of the store."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


class Described(ContinualModel, GeneralRecommender):
    """Items are known by texts that somebody is paid for: each is asked for once, and kept outside the checkpoints."""

    input_type = InputType.POINTWISE
    defaults = {"train_neg_sample_args": None, "store_file": None}
    marks: ClassVar[list[tuple[int, int]]] = []

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.store, self.tokens = Path(config["store_file"]), dataset.field2id_token[dataset.iid_field]
        self.user_embedding = nn.Embedding(self.n_users, WIDTH, padding_idx=0)
        self.item_embedding = nn.Embedding(self.n_items, WIDTH, padding_idx=0)
        self.register_buffer("texts", torch.zeros(self.n_items, WIDTH))
        self.asked, self.drawn, self.continues = 0, 0.0, False

    def prepare_stage(self, ctx: StageContext) -> None:
        previous: Any = ctx.previous_model
        if previous is not None:
            old = previous.item_embedding.weight
            self.continues = torch.equal(self.item_embedding.weight[: len(old)], old) and bool(previous.texts[1:].all())
        held = {entry["item"]: entry["vector"] for entry in lines(self.store)}
        for token in self.tokens[1 : self.n_items]:
            if token not in held:
                FUSE.tick()
                self.asked += 1
                held[token] = [math.sin(int(token[1:]) * k + 1) for k in range(1, WIDTH + 1)]
                entry = {"item": token, "vector": held[token], "stage": ctx.index, "pid": os.getpid()}
                with self.store.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
        self.texts[1:] = torch.tensor([held[token] for token in self.tokens[1 : self.n_items]])
        self.drawn = float(torch.rand(()))
        self.marks.append((ctx.index, FUSE.ticks))

    def side_stores(self) -> dict[str, str]:
        return {"texts": str(self.store)}

    def logits(self, batch: Any) -> torch.Tensor:
        return self.user_embedding(batch[self.USER_ID]) @ (self.item_embedding.weight + self.texts).T

    def calculate_loss(self, batch: Any) -> torch.Tensor:
        FUSE.tick()
        return F.cross_entropy(self.logits(batch), batch[self.ITEM_ID])

    def full_sort_predict(self, batch: Any) -> torch.Tensor:
        return self.logits(batch)

    def stage_costs(self) -> dict[str, Any]:
        return {"texts_kept": len(lines(self.store))}

    def report(self) -> dict[str, Any]:
        norms = self.texts[1:].norm(dim=1)
        return {
            "numbers": {"drawn": self.drawn, "mean norm": norms.mean(), "nothing": np.float32("nan")},
            "tables": {
                "First texts": [{"item": t, "norm": n} for t, n in zip(self.tokens[1:3], norms[:2], strict=True)]
            },
            "figures": {"Norms": {"texts": [[i + 1, n] for i, n in enumerate(norms)]}},
        }


class Telling(Strategy):
    """Tells how far the items moved in the stage; does nothing else."""

    def begin_stage(self, ctx: StageContext) -> None:
        self.start = ctx.model.item_embedding.weight.detach().clone()

    def report(self, ctx: StageContext) -> dict[str, Any]:
        return {"numbers": {"moved": (ctx.model.item_embedding.weight.detach() - self.start).norm()}}

    def state_dict(self) -> dict[str, Any]:
        return {"start": getattr(self, "start", None)}

    def load_state_dict(self, state: Any) -> None:
        self.start = state["start"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The model over a log, its store beside the run's folder."""
    log = write_log(tmp_path_factory.mktemp("log"))
    settings = {"store_file": "{folder}/texts.jsonl", "strategy": "Telling", "checkpoint_keep": 100}
    return Job(Described, log.folder, settings, {"strategies": Telling})


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """The uninterrupted walk; work before a stage must leave the global random state alone."""
    Described.marks.clear()
    before, ticks = torch.get_rng_state(), FUSE.ticks
    walk = job.walk(tmp_path_factory.mktemp("whole"))
    assert torch.equal(torch.get_rng_state(), before), "prepare_stage drew from the global generator"
    Described.marks[:] = [(stage, mark - ticks) for stage, mark in Described.marks]
    return walk


def prepared(stage: int) -> int:
    """Returns the ticks at which a stage was prepared; the untrained reference is prepared before it."""
    return next(ticks for index, ticks in Described.marks if index == stage)


def items(walk: Walk) -> list[int]:
    """Returns the items known at each stage."""
    return [stage.n_items - 1 for stage in walk.runner.stream.stages]


def test_each_item_is_asked_for_once(whole: Walk) -> None:
    """A stage asks for its new items alone, with the weights of the stage before in place."""
    store = lines(whole.runner.model.store)
    assert [sum(entry["stage"] <= stage for entry in store) for stage in range(3)] == items(whole)
    assert len({entry["item"] for entry in store}) == len(store)
    assert [stage for stage, _ in Described.marks] == [0, 0, 1, 1, 2], (
        "the reference of a stage and its model, each once"
    )
    assert whole.runner.model.continues, "prepare_stage ran before the old weights were in place"
    assert_grows(whole)
    assert [cost["texts_kept"] for cost in whole.result["cost"]] == items(whole)


def test_killed_inside_the_stage_it_finds_its_work_done(job: Job, whole: Walk, tmp_path: Path) -> None:
    """Resumed in the middle of a stage, it asks for nothing that was asked for, and the bits are the same."""
    state = job.killed(tmp_path, prepared(1) + 7)
    assert (state["phase"], state["stage"]) == ("train", 1)
    assert state["side_stores"] == {"texts": str(tmp_path / "texts.jsonl")}
    before = lines(tmp_path / "texts.jsonl")
    assert len(before) == items(whole)[1]
    marked = len(Described.marks)
    again = job.walk(tmp_path, resume=True)
    assert [stage for stage, _ in Described.marks[marked:]] == [1, 2], "prepare_stage runs again on resume"
    after = lines(tmp_path / "texts.jsonl")
    assert after[: len(before)] == before, "the store was rolled back"
    assert [entry["stage"] for entry in after[len(before) :]] == [2] * (items(whole)[2] - items(whole)[1])
    assert_same_walk(whole, again)
    assert again.result["reports"] == whole.result["reports"], "what it drew or told differs after the resumption"


def test_killed_while_it_prepares(job: Job, whole: Walk, tmp_path: Path) -> None:
    """Killed between two calls, the work goes on where it stopped: the last stage's checkpoint knows nothing of it."""
    new = items(whole)[1] - items(whole)[0]
    assert new > 3
    state = job.killed(tmp_path, prepared(1) - 1)
    assert (state["phase"], state["stage"]) == ("done", 0)
    before = lines(tmp_path / "texts.jsonl")
    assert len(before) == items(whole)[1] - 2
    again = job.walk(tmp_path, resume=True)
    assert [e["item"] for e in lines(tmp_path / "texts.jsonl")] == [e["item"] for e in lines(whole.runner.model.store)]
    assert lines(tmp_path / "texts.jsonl")[: len(before)] == before
    assert_same_walk(whole, again)


def test_new_weights_are_prepared_too(job: Job, whole: Walk, tmp_path: Path) -> None:
    """Under FullRetrain each stage begins from new weights, with the texts in place, and nobody is asked twice."""
    walk = job.walk(tmp_path, strategy=["FullRetrain", "Telling"], epochs=1)
    store = lines(tmp_path / "texts.jsonl")
    assert len({entry["item"] for entry in store}) == len(store) == items(walk)[-1]
    assert walk.runner.model.texts[1:].any(dim=1).all(), "a new beginning lost what was prepared"
    states = [checkpoint.read(path) for path in checkpoints(walk)]
    assert all(s["model"]["tensors"]["texts"][1:].any(dim=1).all() for s in states)


def test_what_it_prepared_is_state(whole: Walk) -> None:
    """The texts are in the checkpoints, also in the state as the stage began, which FullRetrain goes back to."""
    states = [checkpoint.read(path) for path in checkpoints(whole)]
    assert states
    for state in states:
        assert state["model"]["tensors"]["texts"][1:].any(dim=1).all()
        if state["phase"] == "train":
            start = state["stage_start"]["model"]["tensors"]["texts"]
            assert len(start) == items(whole)[state["stage"]] + 1 and start[1:].any(dim=1).all()


def test_reports_are_results(whole: Walk) -> None:
    """Numbers, tables and figures of model and strategy stand in result.json, a stage and a teller an entry."""
    told = json.loads((whole.runner.folder / "result.json").read_text(encoding="utf-8"))["reports"]
    assert [(entry["stage"], entry["who"]) for entry in told] == [
        (stage, who) for stage in range(3) for who in ("Described", "Telling")
    ]
    last = told[-2]
    norms = whole.runner.model.texts[1:].norm(dim=1).tolist()
    assert last["numbers"]["mean norm"] == pytest.approx(np.mean(norms), abs=1e-6)
    assert last["numbers"]["nothing"] is None, "what is not finite has no place in JSON"
    tokens = whole.runner.model.tokens
    rows = [{"item": tokens[1], "norm": norms[0]}, {"item": tokens[2], "norm": norms[1]}]
    assert last["tables"] == {"First texts": rows}
    assert last["figures"]["Norms"]["texts"] == [[i + 1, norm] for i, norm in enumerate(norms)]
    assert len({entry["numbers"]["drawn"] for entry in told[::2]}) == 3, "stages draw from states of their own"
    assert all(entry["numbers"]["moved"] > 0 for entry in told[1::2])


@pytest.mark.parametrize(
    ("report", "told"),
    [
        ({"number": {"a": 1}}, r"report of Described: 'number' is none of numbers, tables, figures; did you mean"),
        ({"numbers": {"a": "1"}}, "numbers/a is the text '1'"),
        ({"numbers": {"a": [1, 2]}}, "numbers/a is a list"),
        ({"tables": {"t": {"a": 1}}}, "tables/t is a dict; give a list"),
        ({"tables": {"t": [[1, 2]]}}, "tables/t/0 is a list; give a dict"),
        ({"figures": {"f": {"l": [[1, 2, 3]]}}}, "figures/f/l/0 has 3 numbers"),
    ],
)
def test_a_report_of_another_shape_is_refused_by_its_place(
    report: dict[str, Any], told: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report that no page could show is told as the stage ends, with who told it and where."""
    monkeypatch.setattr(Described, "report", lambda self: report)
    with pytest.raises(TypeError, match=told):
        job.walk(tmp_path, epochs=1)
