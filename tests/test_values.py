"""Labelled values: GAUC, evaluation batch by batch, and what sampled candidates leave out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.data.interaction import Interaction
from recbole.utils import EvaluatorType
from run_helpers import configure, run, toy

from recbole_cl.config import CLConfig
from recbole_cl.errors import ConfigError
from recbole_cl.evaluation.evaluator import Evaluator
from recbole_cl.evaluation.known import Known
from recbole_cl.evaluation.metrics import grouped_auc, value_metrics
from recbole_cl.evaluation.rows import build_labelled, build_rows
from recbole_cl.rng import ModelRandomness
from recbole_cl.strategy.composite import Composite
from recbole_cl.stream.batch import Batcher
from recbole_cl.stream.build import Stream, build_stream
from recbole_cl.training.runner import Runner

# -- GAUC ---------------------------------------------------------------------------------------------------------


def brute(score: np.ndarray, label: np.ndarray, user: np.ndarray) -> float | None:
    """Pairs of a positive and a negative row of the same user, counted one by one."""
    total = weight = 0.0
    for who in set(user.tolist()):
        positive = [s for s, y, u in zip(score, label, user, strict=True) if u == who and y > 0]
        negative = [s for s, y, u in zip(score, label, user, strict=True) if u == who and y <= 0]
        if positive and negative:
            right = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
            rows = len(positive) + len(negative)
            total += rows * right / (len(positive) * len(negative))
            weight += rows
    return total / weight if weight else None


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.booleans()), min_size=1, max_size=40))
def test_gauc_equals_brute_force(rows: list[tuple[int, int, bool]]) -> None:
    """Few different scores, so that there are ties."""
    user, score, label = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    expected = brute(score, label, user)
    found = grouped_auc(score, label, user.astype(int))
    assert found == (None if expected is None else pytest.approx(expected))
    config = {"metric_decimal_place": 12}
    assert value_metrics(config, ["gauc"], score, label, user.astype(int)) == ({} if found is None else {"gauc": found})


def test_gauc_by_hand() -> None:
    """User 1: 3 of 4 pairs right, 4 rows; user 2: a tie, 2 rows; user 3 has one label only."""
    score = np.array([0.1, 0.4, 0.35, 0.8, 0.5, 0.5, 0.9])
    label, user = np.array([0, 0, 1, 1, 0, 1, 1]), np.array([1, 1, 1, 1, 2, 2, 3])
    assert grouped_auc(score, label, user) == pytest.approx((4 * 0.75 + 2 * 0.5) / 6)


def labelled(folder: Path, n_users: int = 20, n_items: int = 30, rows: int = 900) -> dict[str, Any]:
    """Writes a log with ratings and returns its properties."""
    rng = np.random.default_rng(5)
    target = folder / "rated"
    target.mkdir(parents=True)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for step in range(rows):
        share = 0.4 + 0.6 * step / rows
        user, item = int(rng.integers(0, n_users * share)), int(rng.integers(0, n_items * share))
        lines.append(f"u{user}\ti{item}\t{rng.integers(1, 6)}\t{1_600_000_001 + 7 * step}")
    (target / "rated.inter").write_text("\n".join(lines) + "\n")
    return {
        "data_path": str(folder),
        "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
        "threshold": {"rating": 3},
        "eval_args": {"mode": "labeled"},
        "metrics": ["AUC", "GAUC", "LogLoss"],
        "valid_metric": "GAUC",
        "n_stages": 3,
        "embedding_size": 8,
        "mlp_hidden_size": [8],
        "epochs": 1,
        "eval_batch_size": 16,
        "MAX_ITEM_LIST_LENGTH": 5,
        "show_progress": False,
        "saved": False,
    }


SAMPLED: dict[str, Any] = {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}, "threshold": None}


def asked(model: Any, given: dict[str, Any], **changed: Any) -> CLConfig:
    return CLConfig(model=model, dataset="rated", config_dict={**given, **changed})


@pytest.mark.parametrize("model", ["DeepFM", "DIN"])
@pytest.mark.parametrize("mode", ["labeled", "uni5"])
def test_gauc_of_a_run(tmp_path: Path, model: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix and its strata hold the GAUC of the scores that the model gave; AUC is that of before."""
    seen: list[tuple[np.ndarray, ...]] = []

    def noted(config: Any, stage: Any, score: Any, label: Any, user: Any, item: Any, cold: Any, more: Any) -> Any:
        seen.append((score, label, user, user >= stage.first_new_user, more["history_from_12"]))
        return outcome(config, stage, score, label, user, item, cold, more)

    from recbole_cl.evaluation import evaluator

    outcome = evaluator.value_outcome
    monkeypatch.setattr(evaluator, "value_outcome", noted)
    given = labelled(tmp_path)
    changed: dict[str, Any] = {"eval_args": {"mode": mode}, "output_dir": str(tmp_path / "run")}
    changed["strata"] = {"history_length": {"thresholds": [12]}}
    if mode != "labeled":
        changed |= SAMPLED
    config = asked(model, given, **changed)
    assert config["eval_type"] == EvaluatorType.VALUE and config["metrics"] == ["AUC", "GAUC", "LogLoss"]
    runner = Runner(config)
    result = runner.run()
    score, label, user, new, long = seen[-1]  # the last model on the last stage
    assert result["matrix"]["gauc"][2][2] == pytest.approx(brute(score, label, user))
    assert result["strata"]["gauc"]["warm_user"][2][2] == pytest.approx(brute(score[~new], label[~new], user[~new]))
    test = runner.stream.stages[2].test
    np.testing.assert_array_equal(long, np.tile(test.hi - test.lo >= 12, 1 if mode == "labeled" else 6))
    told = result["strata"]["gauc"]
    assert told["history_from_12"][2][2] == pytest.approx(brute(score[long], label[long], user[long]))
    assert told["history_0_to_11"][2][2] == pytest.approx(brute(score[~long], label[~long], user[~long]))
    right = [float(p > n) + 0.5 * (p == n) for p in score[label > 0] for n in score[label <= 0]]
    assert result["matrix"]["auc"][2][2] == pytest.approx(np.mean(right))
    assert result["summary"]["AF"]["gauc"] is not None and result["primary_metric"] == "gauc"


def test_which_kind_gauc_is_of(tmp_path: Path) -> None:
    given = labelled(tmp_path)
    ranked = {"eval_args": {"mode": "full"}, "valid_metric": "GAUC", "threshold": None}
    assert asked("DeepFM", given, metrics=["GAUC"])["eval_type"] == EvaluatorType.VALUE
    assert asked("BPR", given, **ranked, metrics=["GAUC"])["eval_type"] == EvaluatorType.RANKING
    assert asked("BPR", given, **ranked, metrics=["GAUC", "Hit"])["eval_type"] == EvaluatorType.RANKING
    with pytest.raises(ConfigError, match="AUC judge single scores, the others rankings"):
        asked("DeepFM", given, metrics=["AUC", "GAUC", "Hit"])
    with pytest.raises(ConfigError, match="has the mode 'full'"):
        asked("DeepFM", given, eval_args={"mode": "full"})


# -- batch by batch -----------------------------------------------------------------------------------------------


def as_before(evaluator: Evaluator, ctx: Any, known: Known, stage: Any, split: str) -> np.ndarray:
    """The predictions of warm rows, as they were made of a whole split that was built at once."""
    config, batcher = evaluator.config, ctx.batcher
    rows = build_labelled(config, evaluator.stream, stage, split)
    batch = batcher.rows(stage.split(split), stage=stage.index, evaluation=True)
    if rows.sampled:
        batch = batch.repeat(len(rows.item) // len(stage.split(split)))
        batch.interaction[batcher.iid] = torch.from_numpy(np.where(rows.item < batcher.n_items, rows.item, 0))
        batch = batcher.join(batch)
    else:
        np.testing.assert_array_equal(batch[config["LABEL_FIELD"]].numpy(), rows.label)
    warm = known.items[rows.item] & (rows.item < batcher.n_items)
    warm = np.flatnonzero(warm & (known.users[rows.user] | evaluator.sequential))  # DIN knows no users
    found = []
    for start in range(0, len(warm), config["eval_batch_size"]):
        index = torch.from_numpy(warm[start : start + config["eval_batch_size"]])
        part = Interaction({name: column[index] for name, column in batch.interaction.items()})
        if evaluator.sequential:
            part.interaction["item_length"] = part["item_length"].clamp(min=1)
        found.append(ctx.model.predict(part).flatten().double().numpy())
    return np.concatenate(found)


@pytest.mark.parametrize("model", ["DeepFM", "DIN"])
@pytest.mark.parametrize("mode", ["labeled", "uni5"])
def test_no_split_is_built_at_once(tmp_path: Path, model: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most eval_batch_size rows are built at a time; the scores have the bits of a split built at once."""
    more = SAMPLED if mode == "uni5" else {}
    config = asked(model, labelled(tmp_path), eval_args={"mode": mode}, output_dir=str(tmp_path / "run"), **more)
    runner = Runner(config)
    stream = build_stream(config)
    runner.begin(stream)
    view = stream.view(1)
    ctx = runner.state.models.context(1, runner.build_model(view, ModelRandomness(3)).eval(), view)
    known = Known.nothing(stream.table)
    for stage in stream.stages[:2]:
        known.learn(stream.table, stage.train, model == "DIN", None)
    given: list[np.ndarray] = []
    largest: list[int] = []
    built, predict = Batcher.rows, type(ctx.model).predict
    monkeypatch.setattr(Batcher, "rows", lambda self, t, **k: (largest.append(len(t)), built(self, t, **k))[1])
    monkeypatch.setattr(
        type(ctx.model),
        "predict",
        lambda self, b: (p := predict(self, b), given.append(p.flatten().double().numpy()))[0],
    )
    evaluator = Evaluator(config, stream, Composite([]))
    outcome = evaluator.evaluate(ctx, known, stream.stages[2])
    assert outcome.n_cold and max(largest) == 16 and len(largest) > 1
    monkeypatch.undo()
    with torch.no_grad():
        np.testing.assert_array_equal(np.concatenate(given), as_before(evaluator, ctx, known, stream.stages[2], "test"))


# -- sampled candidates -------------------------------------------------------------------------------------------


def owned(
    stream: Stream, stage: Any, split: str, user: int, position: int, positives: set[int], how: str, each: bool
) -> set[int]:
    """Items that may not be drawn for a row, by a loop over the log."""
    table, targets = stream.table, stage.split(split)
    held = {int(p) for p in stage.test.position} | (
        {int(p) for p in stage.valid.position} if split == "valid" else set()
    )
    slices = {int(table.stage[p]) for p in targets.position}
    last = int(table.stage[stage.test.position].max())
    out = set(positives)
    for p in np.flatnonzero(table.user == user):
        before = p < position if each else table.stage[p] <= last and int(p) not in held
        if (how in ("seen", "stage") and before) or (how == "stage" and int(table.stage[p]) in slices):
            out.add(int(table.item[p]))
    return out


@pytest.mark.parametrize("split", ["test", "valid"])
@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_candidates_leave_out_what_is_asked(tmp_path: Path, model: str, split: str) -> None:
    log, drawn = toy(tmp_path), {}
    for how in ("auto", "target", "seen", "stage"):
        shares: dict[str, Any] = {"stage_ratios": [0.4, 0.3, 0.3], "eval_args": {"mode": "uni10"}}
        config = configure(log, tmp_path / "run", model, **shares, candidates_exclude=how)
        stream = build_stream(config)
        stage = stream.stages[1]
        rows = build_rows(config, stream, stage, split)
        assert rows.candidates is not None and not len(rows.mask_row)
        drawn[how] = rows.candidates
        other = []
        for row, own in enumerate(rows.candidates):
            target, positives = rows.targets[row : row + 1], set(rows.item[rows.row == row].tolist())
            negatives = [int(i) for i in own if i and int(i) not in positives]
            user, position = int(target.user[0]), int(target.position[0])
            kinds = {
                kind: owned(stream, stage, split, user, position, positives, kind, model == "SASRec")
                for kind in ("target", "seen", "stage")
            }
            assert len(negatives) == 10 * len(positives), "positives are drawn for nobody"
            if how != "auto":
                assert not kinds[how] & set(negatives)
            other.append((negatives, kinds))
        # All of a user's test targets are positives of a general model's one row: there the two rules are the same.
        same = model == "BPR" and split == "test"
        stricter = {"target": ("seen", "stage"), "seen": () if same else ("stage",)}.get(how, ())
        for kind in stricter:
            assert any(set(n) & k[kind] for n, k in other), "nothing forbidden is drawn: the test could not fail"
    today = {"target"} if model == "SASRec" else {"seen", "stage"} if same else {"seen"}
    for how in ("target", "seen", "stage"):
        assert (how in today) == np.array_equal(drawn["auto"], drawn[how])


def test_auto_goes_by_what_may_be_recommended_again(tmp_path: Path) -> None:
    log = toy(tmp_path)
    for model, repeatable, same in (("SASRec", False, "seen"), ("BPR", True, "target")):
        found = []
        for how in ("auto", same):
            given = {"eval_args": {"mode": "uni10"}, "candidates_exclude": how, "repeatable": repeatable}
            config = configure(log, tmp_path / "run", model, **given)
            stream = build_stream(config)
            found.append(build_rows(config, stream, stream.stages[2], "test").candidates)
        np.testing.assert_array_equal(*found)


def test_an_earlier_item_among_the_candidates_is_ranked(tmp_path: Path) -> None:
    """What the rule lets in competes, also where full ranking would not recommend it again."""
    given = {"eval_args": {"mode": "uni10"}, "candidates_exclude": "target", "topk": [30], "valid_metric": "NDCG@30"}
    runner, _ = run(toy(tmp_path), tmp_path / "run", "BPR", epochs=1, candidates="all", **given)
    stage = runner.stream.stages[2]
    ctx = runner.state.models.context(2, runner.model, runner.stream.view(2))
    known = Known.everything(runner.stream.table, stage.n_users, stage.n_items)
    outcome = runner.evaluator.evaluate(ctx, known, stage)
    rows, table, earlier = runner.evaluator._rows_of(stage, "test"), runner.stream.table, 0
    assert rows.candidates is not None and outcome.recommended is not None
    for row, user in enumerate(outcome.users if outcome.users is not None else ()):
        told = set(outcome.recommended[row][outcome.recommended[row] > 0].tolist())
        assert told == {int(i) for i in rows.candidates[row] if 0 < i < stage.n_items}
        before = table.item[(table.user == user) & (table.stage < 2)]
        earlier += len(set(before.tolist()) & told)
    assert earlier


@pytest.mark.parametrize("how", ["auto", "target", "seen", "stage"])
def test_sampled_values_leave_out_what_is_asked(tmp_path: Path, how: str) -> None:
    config = asked("DeepFM", labelled(tmp_path), eval_args={"mode": "uni4"}, candidates_exclude=how, threshold=None)
    stream = build_stream(config)
    stage = stream.stages[1]
    rows = build_labelled(config, stream, stage, "test")
    competes = dict.fromkeys(("seen", "stage"), 0)
    for user in np.unique(stage.test.user):
        positives = set(stage.test.label[stage.test.user == user].tolist())
        negatives = set(rows.item[(rows.user == user) & (rows.label == 0)].tolist())
        kind = "target" if how == "auto" else how
        assert not owned(stream, stage, "test", int(user), 0, positives, kind, False) & negatives
        for stricter in competes:
            competes[stricter] += len(
                owned(stream, stage, "test", int(user), 0, positives, stricter, False) & negatives
            )
    if how in ("auto", "target"):
        assert competes["seen"]
