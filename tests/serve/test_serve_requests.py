"""What a loaded run can be asked, in which forms, and what it answers to what it does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from run_helpers import configure, run
from task_helpers import SETTINGS as TASK_SETTINGS
from task_helpers import write_task_log

import recbole_cl
from recbole_cl.config import CLConfig
from recbole_cl.errors import ConfigError
from recbole_cl.model.state import owned_state
from recbole_cl.serve import Recommender
from recbole_cl.serve.ids import token
from recbole_cl.testing.toy import write_planted_drift
from recbole_cl.training.runner import Runner
from recbole_cl.tree import tree_hash


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def bpr(folder: Path) -> Recommender:
    run(write_planted_drift(folder / "data"), folder / "bpr", "BPR")
    return recbole_cl.load(folder / "bpr")


@pytest.fixture(scope="module")
def sasrec(folder: Path) -> Recommender:
    run(write_planted_drift(folder / "data"), folder / "sasrec", "SASRec")
    return recbole_cl.load(folder / "sasrec")


def of_bpr(run: Recommender) -> tuple[pd.DataFrame, dict[str, set[str]]]:
    """Scores of all users and items by hand, by token, and what each user has had."""
    users, items = run.ids.users, run.ids.items
    values = run.model.user_embedding.weight @ run.model.item_embedding.weight.T
    frame = pd.DataFrame(values.detach().numpy(), index=users.tokens[: len(values)], columns=items.tokens)
    table = run.stream.table
    seen: dict[str, set[str]] = {}
    for user, item in zip(table.user, table.item, strict=True):
        seen.setdefault(str(users.tokens[user]), set()).add(str(items.tokens[item]))
    return frame.iloc[1:, 1:], seen


def best_of(scores: pd.Series, k: int) -> list[str]:
    return list(scores.sort_values(ascending=False).index[:k])


# -- lists against brute force ------------------------------------------------------------------------------------


def test_lists_are_the_best_unseen_items(bpr: Recommender) -> None:
    frame, seen = of_bpr(bpr)
    users = ["u3", "u0", "u17"]
    for answer in bpr.recommend(users, 7):
        assert answer.user is not None and answer.status == "known" and answer.reason is None
        row = frame.loc[answer.user]
        assert answer.items == best_of(row.drop(list(seen[answer.user])), 7)
        assert answer.scores == pytest.approx(row[answer.items].tolist(), abs=1e-5)


def test_seen_allowed_and_excluded_items(bpr: Recommender) -> None:
    frame, _ = of_bpr(bpr)
    row = frame.loc["u5"]
    assert bpr.recommend("u5", 6, filter_seen=False)[0].items == best_of(row, 6)
    wanted = [f"i{number}" for number in range(12)]
    assert bpr.recommend(["u5"], 5, allowed=wanted, filter_seen=False)[0].items == best_of(row[wanted], 5)
    best = best_of(row, 3)
    assert bpr.recommend("u5", 4, excluded=best, filter_seen=False)[0].items == best_of(row.drop(best), 4)
    for excluded in ({"u5": best[:1]}, [best[:1], []]):
        first, second = bpr.recommend(["u5", "u6"], 4, excluded=excluded, filter_seen=False)
        assert first.items == best_of(row.drop(best[:1]), 4)
        assert second.items == best_of(frame.loc["u6"], 4)


def test_k_larger_than_the_catalogue_gives_what_there_is(bpr: Recommender, sasrec: Recommender) -> None:
    _, seen = of_bpr(bpr)
    assert len(bpr.recommend("u2", 10_000)[0].items) == 40 - len(seen["u2"])
    assert len(sasrec.recommend("u2", 10_000)[0].items) == 40
    nothing = bpr.recommend("u2", 3, allowed=[])[0]
    assert nothing.items == [] and "no item is left" in str(nothing.reason)


def test_batches_give_what_single_requests_give(sasrec: Recommender) -> None:
    users = [f"u{number}" for number in range(60)]
    sasrec.config["eval_batch_size"], before = 7, sasrec.config["eval_batch_size"]
    try:
        in_batches = sasrec.recommend(users, 5)
    finally:
        sasrec.config["eval_batch_size"] = before
    alone = [sasrec.recommend(user, 5)[0] for user in users]
    for one, other in zip(in_batches, alone, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)  # kernels need not round alike for other shapes
    assert in_batches.items == [one.items for one in alone]


# -- forms --------------------------------------------------------------------------------------------------------


def test_forms_of_users(bpr: Recommender) -> None:
    wanted = bpr.recommend(["u1", "u2"], 3).items
    assert bpr.recommend(np.array(["u1", "u2"]), 3).items == wanted
    assert bpr.recommend(pd.Series(["u1", "u2"]), 3).items == wanted
    assert bpr.recommend(pd.DataFrame({"user": ["u1", "u2"]}), 3).items == wanted
    assert bpr.recommend(("u1", "u2"), np.int64(3)).items == wanted
    frame = bpr.recommend(["u1", "u2"], 3).to_frame()
    assert frame.columns.tolist() == ["request", "user", "rank", "item", "score"]
    assert frame["item"].tolist() == wanted[0] + wanted[1] and frame["rank"].tolist() == [1, 2, 3, 1, 2, 3]
    assert bpr.recommend([], 3).items == []


def test_numbers_are_tokens_as_the_log_writes_them() -> None:
    assert [token(value) for value in (7, np.int64(7), 7.0, "7", 7.5, None, float("nan"))] == ["7"] * 4 + [
        "7.5",
        "",
        "",
    ]


def test_forms_of_histories(sasrec: Recommender) -> None:
    histories = [["i1", "i2", "i3"], ["i9"]]
    wanted = sasrec.recommend(histories=histories, k=4)
    assert [one.status for one in wanted] == ["history", "history"]
    assert sasrec.recommend(histories, 4).items == wanted.items
    assert sasrec.recommend(histories=[np.array(h) for h in histories], k=4).items == wanted.items
    assert sasrec.recommend(histories=[pd.Series(h) for h in histories], k=4).items == wanted.items
    named = sasrec.recommend(histories={"new": histories[0], "u3": histories[1]}, k=4)
    assert [(one.user, one.status) for one in named] == [("new", "unknown"), ("u3", "known")]
    assert named.items == wanted.items


def test_a_users_own_history_gives_the_users_list(sasrec: Recommender) -> None:
    table, items = sasrec.stream.table, sasrec.ids.items
    number = int(sasrec.ids.users.ids(["u11"])[0])
    history = items.names(table.item[table.seq[table.ptr[number] : table.ptr[number + 1]]])
    by_user, by_history = sasrec.recommend("u11", 5)[0], sasrec.recommend([history], 5)[0]
    assert by_user.items == by_history.items and by_user.scores == by_history.scores


def test_the_planted_rule_is_served(folder: Path) -> None:
    """A trained model recommends the successor to somebody whom the log has never seen."""
    log = write_planted_drift(folder / "rule-data")
    run(log, folder / "rule", "SASRec", epochs=25, stopping_step=100, hidden_size=32)
    served = recbole_cl.load(folder / "rule")
    rule = log.successors[-1]
    answers = served.recommend(histories=[[item] for item in rule], k=3)
    right = np.mean([rule[item] in answer.items for item, answer in zip(rule, answers, strict=True)])
    assert right > 0.6, right


# -- what is not known --------------------------------------------------------------------------------------------


def test_unknown_ids_are_told_apart(bpr: Recommender, sasrec: Recommender) -> None:
    known, unknown = bpr.recommend(["u1", "nobody"], 3)
    assert known.items and unknown.items == []
    assert unknown.status == "unknown" and "answers only for users" in str(unknown.reason)
    assert sasrec.recommend("nobody")[0].reason == "the user is in no interaction; give a history"
    mixed, none, empty = sasrec.recommend([["i1", "zzz"], ["zzz"], []], 3)
    assert mixed.items and mixed.unknown_items == ["zzz"]
    assert not none.items and none.unknown_items == ["zzz"] and "no item that the model knows" in str(none.reason)
    assert not empty.items and empty.reason == none.reason
    assert mixed.items == sasrec.recommend([["i1"]], 3)[0].items
    assert sasrec.recommend("u1", 3, allowed=["i1", "qqq"], excluded=["rrr"]).unknown == ["qqq", "rrr"]


def test_users_that_were_never_trained_are_told_apart(folder: Path) -> None:
    """A user who comes first among the held-out targets is in the log and has no row yet."""
    log = write_planted_drift(folder / "late-data")
    file = folder / "late-data" / log.name / f"{log.name}.inter"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, f"late\ti1\t{lines[-1].split()[-1]}"]) + "\n")
    run(log, folder / "late", "BPR")
    answer = recbole_cl.load(folder / "late").recommend("late")[0]
    assert answer.status == "untrained" and "has no trained row" in str(answer.reason)


def test_answers_are_json_lines(bpr: Recommender) -> None:
    told = [json.loads(one.to_json()) for one in bpr.recommend(["u1", "nobody"], 2)]
    assert told[0]["user"] == "u1" and len(told[0]["items"]) == len(told[0]["scores"]) == 2
    assert told[1]["items"] == [] and told[1]["status"] == "unknown"


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        ((["u1"], 0), {}, "k: 0 must be"),
        ((["u1"], 2.5), {}, "k: 2.5 must be"),
        ((), {}, "give users or histories"),
        ((["u1"],), {"histories": [["i1"], ["i2"]]}, "1 users but 2 histories"),
        ((["u1"],), {"excluded": [["i1"], ["i2"]]}, "2 lists for 1 requests"),
        ((["u1"],), {"task": "next_itm"}, "did you mean 'next_item'"),
    ],
)
def test_requests_without_sense_are_refused(
    sasrec: Recommender, arguments: tuple[Any, ...], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sasrec.recommend(*arguments, **more)


def test_a_model_of_users_refuses_histories(bpr: Recommender) -> None:
    with pytest.raises(ConfigError, match="BPR knows users by their id"):
        bpr.recommend(histories=[["i1"]])
    with pytest.raises(ConfigError, match="pairs: give"):
        bpr.score(["u1", "u2"])


# -- scores and vectors -------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_lists(bpr: Recommender, sasrec: Recommender) -> None:
    frame, _ = of_bpr(bpr)
    pairs = [("u1", "i4"), ("u9", "i30"), ("nobody", "i1"), ("u1", "zzz")]
    found = bpr.score(pairs)
    assert found.values[:2] == pytest.approx([frame.loc["u1", "i4"], frame.loc["u9", "i30"]], abs=1e-5)
    assert np.isnan(found.values[2:]).all() and found.reasons[:2] == [None, None]
    assert "user is in no interaction" in str(found.reasons[2]) and "'zzz'" in str(found.reasons[3])
    assert np.array_equal(bpr.score(pd.DataFrame(pairs)).values, found.values, equal_nan=True)
    assert np.array_equal(bpr.score(np.array(pairs)).values, found.values, equal_nan=True)
    answer = sasrec.recommend([["i1", "i2"]], 3)[0]
    again = sasrec.score([(["i1", "i2"], item) for item in answer.items])
    assert again.values == pytest.approx(answer.scores, abs=1e-5)


def test_neighbours_and_vectors(bpr: Recommender, sasrec: Recommender) -> None:
    found = bpr.vectors("items")
    assert found.values.shape == (40, 16) and found.values.dtype == np.float32
    unit = found.values / np.linalg.norm(found.values, axis=1, keepdims=True)
    at = found.tokens.index("i5")
    cosine = unit @ unit[at]
    order = [found.tokens[i] for i in np.argsort(-cosine) if i != at][:4]
    answer = bpr.similar_items("i5", 4)
    assert answer.items == order and answer.scores == pytest.approx(sorted(cosine)[-2:-6:-1], abs=1e-5)
    assert len(bpr.similar_items("i5", 1000).items) == 39
    assert bpr.similar_items("zzz").status == "unknown" and bpr.similar_items("zzz").items == []
    users = bpr.vectors("users")
    scores = users.values[users.tokens.index("u1")] @ found.values.T
    assert bpr.score([("u1", token) for token in found.tokens]).values == pytest.approx(scores, abs=1e-5)
    hidden = sasrec.vectors("users")
    items = sasrec.vectors("items")
    answer = sasrec.recommend("u4", 1, filter_seen=False)[0]
    product = hidden.values[hidden.tokens.index("u4")] @ items.values[items.tokens.index(answer.items[0])]
    assert product == pytest.approx(answer.scores[0], abs=1e-4)
    with pytest.raises(ConfigError, match="neither 'items' nor 'users'"):
        bpr.vectors("shops")


def test_the_position(bpr: Recommender) -> None:
    where = bpr.position
    assert (where.stage, where.name, where.version, where.all_rows) == (3, "from 2000000", 0, False)
    assert where.last_timestamp == 2000479.0 and where.n_users == 60 and where.n_items == 40


# -- streams of tasks ---------------------------------------------------------------------------------------------


def test_tasks_are_asked_by_name(folder: Path) -> None:
    data = write_task_log(folder / "tasks")
    settings = {**TASK_SETTINGS, "data_path": str(data), "output_dir": str(folder / "pcl"), "epochs": 1}
    config = CLConfig(model="PCL", dataset="tasks-log", config_dict=settings)
    config["saved"] = True
    Runner(config).run()
    served = recbole_cl.load(folder / "pcl")
    last, first = served.recommend("u1", 5), served.recommend("u1", 5, task="next item")
    assert last.items == served.recommend("u1", 5, task="next five-star item").items
    assert last[0].scores != first[0].scores, "a task's prompts count"
    with pytest.raises(ConfigError, match="no task that ranks items"):
        served.recommend("u1", task="genre of the next item")


# -- models that make their lists themselves, strategies that change scores ---------------------------------------


def test_asking_changes_nothing(sasrec: Recommender) -> None:
    before, state = tree_hash(owned_state(sasrec.model)), torch.get_rng_state()
    sasrec.recommend("u1")
    sasrec.score([("u1", "i1")])
    assert tree_hash(owned_state(sasrec.model)) == before
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are the caller's"


def test_a_strategy_that_adjusts_scores_is_asked(folder: Path) -> None:
    log = write_planted_drift(folder / "data")
    config = configure(log, folder / "reloop2", "SASRec", strategy="ReLoop2", epochs=1)
    Runner(config).run()
    served = recbole_cl.load(folder / "reloop2")
    first, again = served.recommend("u1", 5)[0], served.recommend("u1", 5)[0]
    assert first.items and first == again, "what it notes while it answers is put back"
