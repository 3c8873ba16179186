"""The walk over the stream: bounds, results, determinism, the planted drift's right answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import but_for_a_near_tie, configure, run, toy

from recbole_cl import run_recbole_cl
from recbole_cl.errors import ConfigError, TrainingError
from recbole_cl.strategy.base import Strategy
from recbole_cl.strategy.composite import Composite
from recbole_cl.strategy.context import StageContext
from recbole_cl.testing.toy import PlantedDrift
from recbole_cl.training.runner import Runner

KEYS = {
    "config", "versions", "stages", "matrix", "summary", "formulas", "reasons", "curves", "disparity", "cost",
    "warnings", "reference", "strata", "steps_to_95", "primary_metric",
}  # fmt: skip
STAGE_KEYS = {
    "name", "start", "end", "n_train", "n_valid", "n_test", "n_users", "n_items", "n_new_users", "n_new_items",
}  # fmt: skip


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    return toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def learnt(log: PlantedDrift, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Matrices of runs that train long enough to learn the planted rule."""
    out = {}
    for strategy in ("FineTune", "Pretrain", "Joint"):
        runner, _ = run(
            log, tmp_path_factory.mktemp(strategy), strategy=strategy, epochs=30, stopping_step=40, metrics=["Hit"],
            topk=[1, 3], valid_metric="Hit@1", hidden_dropout_prob=0.1, attn_dropout_prob=0.1, learning_rate=0.02,
        )  # fmt: skip
        out[strategy] = runner.records.matrix("hit@1", n_stages=3)
        out[f"{strategy}@3"] = runner.records.matrix("hit@3", n_stages=3)
    return out


def test_planted_drift_is_learnt_and_forgotten(learnt: dict[str, np.ndarray]) -> None:
    fine, base = learnt["FineTune"], learnt["Pretrain"]
    assert (np.diag(fine) > 0.7).all(), f"the rule of each stage can be learnt: {np.diag(fine)}"
    assert fine[2, 0] < 0.5 < fine[0, 0], "no transition of stage 0 holds in stage 2: fine-tuning forgets it"
    assert base[2, 0] == base[0, 0] and base[2, 2] < 0.3, "a model that is never updated keeps stage 0, learns nothing"
    assert fine[2, 2] > base[2, 2]


def test_all_data_keep_all_rules(learnt: dict[str, np.ndarray]) -> None:
    # The rules contradict each other at the first place, but three places hold all three.
    assert learnt["Joint@3"][2].min() > 0.4 > learnt["FineTune@3"][2, 0]


def test_a_fresh_start_of_the_first_stage_is_the_same_for_all(log: PlantedDrift, tmp_path: Path) -> None:
    rows = [
        run(log, tmp_path / s, "SASRec", strategy=s)[1]["matrix"]["ndcg@10"]
        for s in ("FineTune", "Pretrain", "Joint", "FullRetrain", "Scratch")
    ]
    assert all(row[0] == rows[0][0] for row in rows)
    assert len({tuple(row[2]) for row in rows}) == 5, "from then on they differ"


def test_result_has_the_promised_keys(log: PlantedDrift, tmp_path: Path) -> None:
    runner, result = run(log, tmp_path / "run", "SASRec")
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert set(written) >= KEYS
    assert all(set(stage) >= STAGE_KEYS for stage in written["stages"])
    assert set(written["summary"]) >= {"AF", "BWT", "FWT", "LA", "next_stage"}
    assert all({"seconds", "peak_memory_mb", "trainable_parameters"} <= set(cost) for cost in written["cost"])
    matrix = written["matrix"]["ndcg@10"]
    assert len(matrix) == 3 and all(len(row) == 3 and None not in row for row in matrix)
    lines = (tmp_path / "run" / "records.csv").read_text().splitlines()
    assert len(lines) == 1 + len(runner.records)
    assert "<html" in (tmp_path / "run" / "report.html").read_text()[:200]
    r = np.array(matrix)
    b = written["reference"]["ndcg@10"]
    assert written["summary"]["FWT"]["ndcg@10"] == pytest.approx(np.mean([r[0, 1] - b[1], r[1, 2] - b[2]]))
    assert written["summary"]["BWT"]["ndcg@10"] == pytest.approx(np.mean(r[2, :2] - np.diag(r)[:2]))


@pytest.mark.parametrize("model", ["SASRec", "BPR", "LightGCN"])
def test_a_run_is_bitwise_repeatable_and_seeds_differ(log: PlantedDrift, tmp_path: Path, model: str) -> None:
    one = run(log, tmp_path / "a", model)[1]
    torch.rand(3)
    np.random.rand(3)  # the caller's global generators play no part
    two = run(log, tmp_path / "b", model)[1]
    other = run(log, tmp_path / "c", model, seed=7)[1]
    assert one["matrix"] == two["matrix"] and one["strata"] == two["strata"]
    assert one["matrix"] != other["matrix"]


def test_hooked_steps_do_what_recboles_epoch_does(log: PlantedDrift, tmp_path: Path) -> None:
    """checkpoint_steps takes the loop with hooks; without it RecBole's own _train_epoch runs."""
    for model in ("SASRec", "BPR", "NeuMF"):
        plain = run(log, tmp_path / f"{model}a", model)
        hooked = run(log, tmp_path / f"{model}b", model, checkpoint_steps=1000)
        assert plain[1]["matrix"] == hooked[1]["matrix"]
        for (name, a), (_, b) in zip(
            plain[0].model.state_dict().items(), hooked[0].model.state_dict().items(), strict=True
        ):
            assert torch.equal(a, b), name


def test_learning_rate_scale_and_optimiser(log: PlantedDrift, tmp_path: Path) -> None:
    frozen, _ = run(log, tmp_path / "a", "SASRec", stage_lr_scale=1e-12, stopping_step=50)
    n = len(frozen.stream.stages[0].test)
    pretrain, _ = run(log, tmp_path / "b", "SASRec", strategy="Pretrain", stopping_step=50)
    a, b = (r.records.matrix("ndcg@10", n_stages=3) for r in (frozen, pretrain))
    # Items first seen later are known to the one and cold to the other; stage 0's targets are known to both.
    assert a[2, 0] == but_for_a_near_tie(a[0, 0], n) and b[2, 0] == but_for_a_near_tie(b[0, 0], n)
    carry = run(log, tmp_path / "c", "SASRec", stage_optimizer="carry")[1]["matrix"]
    reset = run(log, tmp_path / "d", "SASRec", stage_optimizer="reset")[1]["matrix"]
    assert carry["ndcg@10"][0] == reset["ndcg@10"][0] and carry["ndcg@10"][2] != reset["ndcg@10"][2]


def test_stages_after_the_first_may_have_a_number_of_epochs(log: PlantedDrift, tmp_path: Path) -> None:
    """All of them are trained and none is validated; a model that begins anew is stopped early all the same."""

    def told(name: str, **properties: Any) -> dict[tuple[int, str], list[bool]]:
        """Whether each epoch was validated, by stage and pass."""
        _, result = run(log, tmp_path / name, "SASRec", epochs=4, stopping_step=1, **properties)
        found: dict[tuple[int, str], list[bool]] = {}
        for point in result["curves"]:
            found.setdefault((point["stage"], point["pass"]), []).append(point["valid"] is not None)
        return found

    early, fixed = told("early"), told("fixed", stage_epochs=6)
    assert all(all(epochs) and len(epochs) <= 4 for epochs in early.values())
    assert fixed == {(0, "train"): early[0, "train"], (1, "train"): [False] * 6, (2, "train"): [False] * 6}
    some = told("some", stage_epochs=[None, 2, None], scratch=True)
    assert some[1, "train"] == [False] * 2 and all(some[2, "train"])
    assert all(all(epochs) for (_, name), epochs in some.items() if name == "scratch")
    assert told("anew", strategy="FullRetrain", stage_epochs=3) == told("whole", strategy="FullRetrain")


def test_cells_that_nobody_asks_for_are_left_out(log: PlantedDrift, tmp_path: Path) -> None:
    """Those that are tested have the bits of the whole matrix, and so have the weights."""
    whole, all_cells = run(log, tmp_path / "a", "SASRec")
    r = all_cells["matrix"]["ndcg@10"]
    wanted = {
        "diagonal": [[r[t][s] if t == s else None for s in range(3)] for t in range(3)],
        "last_row": [[None] * 3, [None] * 3, r[2]],
    }
    for cells, values in wanted.items():
        runner, result = run(log, tmp_path / cells, "SASRec", matrix_cells=cells)
        assert result["matrix"]["ndcg@10"] == values
        for (name, a), (_, b) in zip(runner.model.state_dict().items(), whole.model.state_dict().items(), strict=True):
            assert torch.equal(a, b), name
        assert result["summary"]["AF"]["ndcg@10"] is None and "not evaluated" in result["reasons"]["AF"]["ndcg@10"]
        if cells == "diagonal":
            assert result["summary"]["LA"] == all_cells["summary"]["LA"]
        else:
            assert result["summary"]["final_average"] == all_cells["summary"]["final_average"]
            assert "stages 1, 2 left out" in result["reasons"]["LA"]["ndcg@10"]


@pytest.mark.parametrize("model", ["SASRec", "LightGCN"])
def test_a_fresh_start_trains_once_for_a_last_row(log: PlantedDrift, tmp_path: Path, model: str) -> None:
    """FullRetrain depends on no stage before: trained at the last one only, it ends with the same bits."""
    every = run(log, tmp_path / "a", model, strategy="FullRetrain")[1]
    once = run(log, tmp_path / "b", model, strategy="FullRetrain", matrix_cells="last_row")[1]
    assert once["matrix"]["ndcg@10"][2] == every["matrix"]["ndcg@10"][2]
    assert {curve["stage"] for curve in once["curves"]} == {2} < {curve["stage"] for curve in every["curves"]}
    beside = {"FullRetrain": {}, "EWC": {"lambda": 10.0, "samples": 50}}
    pairs = [
        run(log, tmp_path / f"beside{cells}", model, strategy=beside, matrix_cells=cells)[1]
        for cells in ("all", "last_row")
    ]
    assert pairs[1]["matrix"]["ndcg@10"][2] == pairs[0]["matrix"]["ndcg@10"][2], "EWC learns from every stage's model"
    joint = run(log, tmp_path / "c", model, strategy="Joint", matrix_cells="last_row")[1]
    assert {curve["stage"] for curve in joint["curves"]} == {0, 1, 2}, "Joint goes on from where it was"


def test_scratch_reference(log: PlantedDrift, tmp_path: Path) -> None:
    _, result = run(log, tmp_path / "a", "SASRec", fwt_reference="stage_only")
    assert result["scratch"]["ndcg@10"][1] is not None
    assert result["reference"]["ndcg@10"] == result["scratch"]["ndcg@10"]
    plain = run(log, tmp_path / "b", "SASRec")[1]
    assert plain["matrix"] == result["matrix"], "the reference models leave no trace in the run"


class Noting(Strategy):
    """Counts the scores that it is shown; what it answers depends on the count."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.ends = 0, list[int]()
        self.passes: set[str] = set()

    def adjust_scores(self, ctx: StageContext, batch: Any, scores: torch.Tensor) -> torch.Tensor:
        self.passes.add(ctx.pass_.name)
        self.seen += len(scores)
        return scores.roll(self.seen, dims=1)

    def end_pass(self, ctx: StageContext) -> None:
        self.ends.append(self.seen)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Any) -> None:
        self.seen = state["seen"]


def test_what_a_strategy_notes_while_it_adjusts_scores_is_put_back(log: PlantedDrift, tmp_path: Path) -> None:
    """Also after a validation: an epoch must not depend on how often was validated. A scratch model stays alone."""
    runner = Runner(configure(log, tmp_path / "run", "SASRec", scratch=True))
    noting = Noting()
    runner.strategy = Composite([noting])
    result = runner.run()
    assert sum(point["valid"] is not None for point in result["curves"]) >= 3, "there were validations"
    assert noting.passes == {"train"} and noting.ends == [0, 0, 0] and noting.seen == 0


def test_next_stage_cells_that_were_trained_on_are_null(log: PlantedDrift, tmp_path: Path) -> None:
    _, result = run(log, tmp_path / "a", "SASRec", stage_split="next_stage", scheduler="TimeSlices", n_stages=2)
    matrix = result["matrix"]["ndcg@10"]
    assert [[v is None for v in row] for row in matrix] == [[False, False], [True, False]]
    assert result["summary"]["AF"]["ndcg@10"] is None and result["reasons"]["AF"]["ndcg@10"]


def test_an_earlier_run_in_the_folder_is_kept(log: PlantedDrift, tmp_path: Path) -> None:
    first = run(log, tmp_path / "run", "BPR", epochs=1)[1]
    run(log, tmp_path / "run", "BPR", epochs=1, seed=5)
    kept = json.loads((tmp_path / "run" / "earlier-1" / "result.json").read_text())
    assert kept["matrix"] == first["matrix"]


def test_python_call_takes_recboles_arguments(log: PlantedDrift, tmp_path: Path) -> None:
    config = configure(log, tmp_path / "a", "BPR")
    small = {"epochs": 1, "embedding_size": 8, "show_progress": False, "output_dir": str(tmp_path / "b")}
    given = {**log.settings(), **small}
    before = json.dumps(given)
    result = run_recbole_cl(model="BPR", dataset=log.name, config_dict=given, args=["--strategy=Pretrain"])
    assert json.dumps(given) == before and config["seed"] == result["seed"]
    assert result["config"]["strategy"] == [["Pretrain", {}]]
    assert (tmp_path / "b" / "result.json").is_file()


class Diverging:
    """Mixin: the loss is NaN from a batch on."""

    batches = 0

    def calculate_loss(self, interaction: Any) -> torch.Tensor:
        self.batches += 1
        loss = super().calculate_loss(interaction)  # type: ignore[misc]
        return loss * float("nan") if self.batches > 20 else loss


def test_a_loss_that_is_not_finite_names_stage_epoch_batch_and_term(log: PlantedDrift, tmp_path: Path) -> None:
    from recbole.model.general_recommender.bpr import BPR

    broken = type("DivergingBPR", (Diverging, BPR), {})
    for extra in ({}, {"checkpoint_steps": 1000}):
        with pytest.raises(TrainingError, match=r"stage 1, pass 'train', epoch \d+, batch \d+: the term 'data' is nan"):
            run(log, tmp_path / "run", broken, epochs=30, stopping_step=30, **extra)


def test_strategies_that_cannot_serve_a_model_are_refused(log: PlantedDrift, tmp_path: Path) -> None:
    for strategy, model in (("EWC", "Pop"), ("SI", "ItemKNN")):
        with pytest.raises(ConfigError, match=f"{strategy} cannot serve the model {model}"):
            Runner(configure(log, tmp_path / model, model, strategy=strategy)).run()


FAMILIES = ("Pop", "ItemKNN", "MultiVAE", "DeepFM", "FM", "NFM", "NARM", "BERT4Rec", "GRU4Rec", "HGN")


@pytest.mark.parametrize("model", FAMILIES)
def test_model_families_walk_a_growing_stream(log: PlantedDrift, tmp_path: Path, model: str) -> None:
    more: dict[str, Any] = {"transform": "mask_itemseq"} if model == "BERT4Rec" else {}
    _, result = run(log, tmp_path / model, model, epochs=1, **more)
    matrix = result["matrix"][result["primary_metric"]]
    assert all(v is not None and np.isfinite(v) for row in matrix for v in row)
