"""The model PESO over a small log: what it trains, answers and refuses, and that a killed run has the same bits."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent / "contracts"))
from conformance_helpers import (
    FUSE,
    Job,
    Walk,
    assert_reported,
    assert_resumes,
    checkpoints,
    matrix,
    write_log,
)

from recbole_cl import checkpoint
from recbole_cl.errors import CheckpointError, ConfigError, DataError
from recbole_cl.evaluation.evaluator import Evaluator
from recbole_cl.model import peso
from recbole_cl.stream.loader import make_loader
from recbole_cl.training.runner import Runner

N_ITEMS = 45
SETTINGS: dict[str, Any] = {
    "vocabulary": "global",
    "candidates": "all",
    "llm_hidden": 16,
    "llm_intermediate": 32,
    "llm_layers": 1,
    "llm_heads": 2,
    "llm_kv_heads": 1,
    "lora_rank": 2,
    "base_epochs": 2,
    "adapter_epochs": 1,
    "beam_size": 6,
    "stage_lr_scale": 1.0,
    "strategy": "PESO",
    "peso_lambda": 5.0,
    "checkpoint_keep": 100,
    "fwt_reference": "untrained",
}


class PESO(peso.PESO):
    """The model, which counts its steps and keeps its lists."""

    lists: list[torch.Tensor] = []

    def calculate_loss(self, interaction: Any) -> torch.Tensor:
        FUSE.tick()
        return super().calculate_loss(interaction)

    def recommend(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = super().recommend(*args)
        self.lists.append(found[0])
        return found


def write_index(path: Path, n: int = N_ITEMS) -> Path:
    """Writes codes of three levels; items 0 and 1 share a leaf."""
    codes = {f"i{k}": [f"<a_{k % 3}>", f"<b_{k // 3 % 4}>", f"<c_{max(k, 1) // 12}>"] for k in range(n)}
    codes["i0"] = codes["i1"]
    path.write_text(json.dumps(codes))
    return path


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    log = write_log(tmp_path_factory.mktemp("log"), n_items=N_ITEMS)
    write_index(log.folder / "log" / "index.json")
    return Job(PESO, log.folder, SETTINGS)


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    PESO.lists.clear()
    return job.walk(tmp_path_factory.mktemp("whole"))


def batch_of(walk: Walk, stage: int = 2) -> Any:
    """Returns the test rows of a stage."""
    runner = walk.runner
    ctx = context(runner, stage)
    return ctx.batcher.rows(ctx.stage.test, evaluation=True)


def context(runner: Runner, stage: int = 2) -> Any:
    """Returns the last model's context at a stage."""
    return runner.state.models.context(stage, runner.model, runner.stream.view(stage))


def by_hand(model: Any, history: list[int], item: int) -> float:
    """Returns the negative log-likelihood of an item after a history by one pass over one row, in float64."""
    tokens = [1]
    for one in [*history, item]:
        tokens += [first + int(code) for first, code in zip(model.tokens.first, model.codes[one], strict=True)]
    with torch.no_grad():
        logits = model.llm(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    levels = model.ids.levels
    start = len(tokens) - levels
    return -float(sum(logits[start + j - 1, tokens[start + j]] for j in range(levels)))


def test_a_killed_run_has_the_same_bits(job: Job, whole: Walk, tmp_path: Path) -> None:
    """Killed in an increment, where the anchor is, and in both passes of the base stage."""
    assert_reported(whole)
    told = checkpoints(whole)
    steps = [checkpoint.read(path) for path in told]
    passes = {(s["stage"], s.get("progress", {}).get("number")) for s in steps if s["phase"] == "train"}
    assert passes == {(0, 0), (0, 1), (1, 0), (2, 0)}
    for step, stage in ((4, 0), (whole.ticks * 5 // 12, 0), (whole.ticks - 2, 2)):
        folder = tmp_path / str(step)
        folder.mkdir()
        assert_resumes(job, folder, whole, step, stage)


def test_lists_hold_items_only(whole: Walk) -> None:
    lists = torch.cat([items.flatten() for items in PESO.lists])
    assert len(lists) and (lists > 0).all() and (lists < whole.runner.stream.table.n_items).all()


def test_the_base_is_frozen_byte_for_byte(whole: Walk) -> None:
    """The first pass trains the base and not the adapter, all later ones the adapter alone."""
    states = [checkpoint.read(path) for path in checkpoints(whole)]
    held = [{**s["model"]["tensors"], **s["model"]["frozen"]} for s in states]
    tensors = [(s["stage"], s.get("progress", {}).get("number"), t) for s, t in zip(states, held, strict=True)]
    first = [t for stage, number, t in tensors if (stage, number) == (0, 0)]
    later = [t for stage, number, t in tensors if (stage, number) != (0, 0)]
    adapter = [name for name in later[0] if "lora_" in name]
    base = [name for name in later[0] if "lora_" not in name]
    assert adapter and base
    assert all(torch.equal(first[0][name], one[name]) for one in first for name in adapter)
    assert any(not torch.equal(first[0][name], first[-1][name]) for name in base)
    assert all(torch.equal(first[-1][name], one[name]) for one in later for name in base)
    assert any(not torch.equal(later[0][name], later[-1][name]) for name in adapter)
    for name in adapter:  # the second pass is what gives B a direction
        done = next(s for s in states if s["phase"] == "done" and s["stage"] == 0)
        assert "lora_B" not in name or done["model"]["tensors"][name].abs().sum() > 0
    for state in states:
        names = set(state["model"]["frozen"])
        trains_base = (state["stage"], state.get("progress", {}).get("number")) == (0, 0)
        assert names == (set() if trains_base else set(base)), "what is frozen is not written again"
    costs = whole.result["cost"]
    assert costs[-1]["trainable_parameters"] == sum(later[-1][name].numel() for name in adapter)


def test_the_frozen_base_is_written_once(whole: Walk, tmp_path: Path) -> None:
    """All checkpoints share one file; a moved folder finds it, and one that is changed or gone is refused by name."""
    folder = tmp_path / "moved"
    shutil.copytree(whole.runner.folder, folder)
    paths = sorted((folder / "checkpoints").iterdir())
    states = [checkpoint.read(path) for path in paths]
    state = states[-1]
    name = state["model"]["frozen"].name
    file = folder / "frozen" / f"{name}.safetensors"
    first = states[0]["stage_start"]["model"]["frozen"].name  # the weights that the base began with
    assert {path.stem for path in (folder / "frozen").iterdir()} == {first, name}
    assert state["previous"]["model"]["frozen"].name == name
    assert json.loads((paths[-1] / "manifest.json").read_text())["frozen"] == [name]
    with safe_open(str(paths[-1] / "tensors.safetensors"), framework="pt") as opened:
        assert not [key for key in opened.keys() if "embed_tokens" in key]  # noqa: SIM118
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"frozen/{name}.safetensors is truncated or was changed"):
        checkpoint.read(paths[-1])
    file.unlink()
    with pytest.raises(CheckpointError, match=f"frozen/{name}.safetensors is missing"):
        checkpoint.read(paths[-1])


def test_bases_that_no_checkpoint_needs_are_removed(job: Job, tmp_path: Path) -> None:
    """A base trained anew at every stage is a file a stage; those of checkpoints that are gone go with them."""
    for keep, expected in ((100, 4), (1, 1)):
        walk = job.walk(tmp_path / str(keep), strategy="FullRetrain", checkpoint_keep=keep)
        needed = {
            name for path in checkpoints(walk) for name in json.loads((path / "manifest.json").read_text())["frozen"]
        }
        files = {file.stem for file in (walk.runner.folder / "frozen").iterdir()}
        assert files == needed and len(files) == expected, "what the first began with, and what each stage made"


def test_nll_in_the_matrix_is_that_of_one_row_at_a_time(whole: Walk) -> None:
    """Two ways to one number: passes of many rows over a cache, one pass a row."""
    runner, model = whole.runner, whole.runner.model.eval()
    table = runner.stream.table
    for stage in runner.stream.stages:
        values = [
            by_hand(model, table.item[table.seq[max(lo, hi - 8) : hi]].tolist(), int(label))
            for lo, hi, label in zip(stage.test.lo, stage.test.hi, stage.test.label, strict=True)
        ]
        assert matrix(whole, "nll")[-1, stage.index] == pytest.approx(np.mean(values), abs=1e-4)
    assert whole.result["cold"] and all(cell["n_cold"] == 0 for cell in whole.result["cold"])


def test_lists_are_brute_force_where_the_beam_is_wide(whole: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    model = whole.runner.model.eval()
    monkeypatch.setitem(model.config.final_config_dict, "beam_size", 50)
    batch = batch_of(whole)
    allowed = torch.ones(model.n_items, dtype=torch.bool)
    allowed[[0, 7]] = False
    row, item = torch.tensor([0, 0, 2]), torch.tensor([3, 9, 4])
    items, scores = model.recommend(batch, 10, allowed, (row, item))
    candidates = torch.arange(model.n_items).expand(len(batch), -1)
    every = model.scores(batch, candidates).masked_fill(~allowed, -torch.inf)
    every[row, item] = -torch.inf
    values, _ = every.topk(10, dim=1)
    assert torch.allclose(values, scores, atol=1e-4, rtol=0)
    assert torch.allclose(every.gather(1, items), scores, atol=1e-4, rtol=0)
    full = model.full_sort_predict(batch)
    assert (torch.isfinite(full).sum(1) == 5).all() and (full[:, 0] == -torch.inf).all()
    found = model.predict(batch)
    assert torch.allclose(found, every.new_tensor([by_hand_of(model, batch, r) for r in range(len(batch))]), atol=1e-4)


def by_hand_of(model: Any, batch: Any, row: int) -> float:
    history = batch[model.ITEM_SEQ][row, : int(batch[model.ITEM_SEQ_LEN][row])].tolist()
    return -by_hand(model, history, int(batch[model.ITEM_ID][row]))


def test_windows_train_what_rows_train(whole: Walk) -> None:
    """All positions in one pass: the mean over targets is that of a pass for each target's window."""
    runner, model = whole.runner, whole.runner.model.eval()
    ctx = context(runner, 1)
    ctx.pass_ = ctx.pass_
    loader = make_loader(ctx, ctx.stage.train, "test")
    losses, weights = [], []
    for rows in loader:
        wanted = rows["_targets"] > 0
        with torch.no_grad():
            each, mean = model.per_sample_loss(rows), peso.PESO.calculate_loss(model, rows)
        hand = []
        for r in range(len(rows)):
            history = rows[model.ITEM_SEQ][r].tolist()
            at = wanted[r].nonzero().squeeze(1).tolist()
            mine = [by_hand(model, history[: j + 1], int(rows["_targets"][r, j])) / model.ids.levels for j in at]
            hand.append(np.mean(mine))
            losses += mine
        weights.append((float(mean), int(wanted.sum())))
        assert each.tolist() == pytest.approx(hand, abs=1e-4)
    assert np.mean(losses) == pytest.approx(sum(m * n for m, n in weights) / sum(n for _, n in weights), abs=1e-4)
    single = ctx.batcher.rows(ctx.stage.train[:20])
    with torch.no_grad():
        assert model.per_sample_loss(single).tolist() == pytest.approx(
            [-by_hand_of(model, single, r) / model.ids.levels for r in range(20)], abs=1e-4
        )


def test_items_that_share_a_leaf_are_one_at_the_level_of_codes(whole: Walk) -> None:
    levels = whole.runner.model.item_levels()["code"]
    tokens = whole.runner.stream.dataset.field2id_token["item_id"]
    ids = {str(token): k for k, token in enumerate(tokens)}
    assert levels[0] == 0 and levels[ids["i0"]] == levels[ids["i1"]] > 0
    assert len(np.unique(levels[1:])) == whole.runner.model.n_items - 2


@pytest.mark.parametrize("name", ["SingleLoRA", "FineTune"])
def test_without_a_pull_it_is_a_single_lora(job: Job, tmp_path: Path, name: str) -> None:
    free = job.walk(tmp_path / "free", strategy="PESO", peso_lambda=0.0, n_stages=2)
    single = job.walk(tmp_path / "single", strategy=name, n_stages=2)
    assert free.result["matrix"] == single.result["matrix"]


def test_a_pull_holds(job: Job, tmp_path: Path) -> None:
    """The stronger it is, the less the adapter moves; the meter is in the curves and the report."""
    drifts, ratios = [], []
    for strength in (0.0, 1e2, 1e4):
        walk = job.walk(tmp_path / str(strength), peso_lambda=strength, n_stages=2)
        states = [checkpoint.read(path) for path in checkpoints(walk)]
        done = [s["model"]["tensors"] for s in states if s["phase"] == "done"]
        names = [name for name in done[0] if "lora_" in name]
        drifts.append(sum(float((done[1][name] - done[0][name]).square().sum()) for name in names))
        ratios.append([p["terms"].get("PESO/ratio", 0.0) for p in walk.result["curves"] if p["stage"] == 1][-1])
        told = json.dumps(walk.result.get("reports", walk.result))
        assert "gradient of PESO over that of the data" in told
    assert drifts[0] > drifts[1] > drifts[2] and ratios[0] == 0.0 and ratios[2] > 1e-3


def test_a_pull_that_does_nothing_is_told(job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="recbole_cl"):
        job.walk(tmp_path, peso_lambda=1e-3, n_stages=2)
    assert "it does practically nothing; raise peso_lambda" in caplog.text


# -- what is refused ----------------------------------------------------------------------------------------------


def test_other_codes_are_another_vocabulary(job: Job, whole: Walk, tmp_path: Path) -> None:
    other = write_index(tmp_path / "other.json")
    content = json.loads(other.read_text())
    content["i3"], content["i4"] = content["i4"], content["i3"]
    other.write_text(json.dumps(content))
    job.killed(tmp_path, whole.ticks - 2)
    (job.data / "log" / "index.json").rename(tmp_path / "kept.json")
    try:
        (job.data / "log" / "index.json").write_text(other.read_text())
        with pytest.raises(CheckpointError, match=r"trained on the frozen base 'index.json' .* under 'semantic_ids'"):
            job.walk(tmp_path, resume=True)
    finally:
        (tmp_path / "kept.json").replace(job.data / "log" / "index.json")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"semantic_ids": "nowhere.json"},
            "'nowhere.json', which is no file, neither here nor in the dataset's folder",
        ),
        ({"lora_targets": ["q_proj", "queries"]}, "of which .'queries'. matches no layer .* q_proj"),
        ({"lora_targets": []}, "matches no layer"),
        ({"beam_normaliser": "row"}, "beam_normaliser"),
        ({"llm_heads": 3}, "'llm_heads' is 3; it must divide 16"),
        ({"peso_reduction": "max"}, "peso_reduction"),
        ({"peso_lambda": -1.0}, "peso_lambda"),
        ({"model": "SASRec", "loss_type": "CE"}, "continual_lora"),
    ],
)
def test_what_makes_no_sense_is_refused(job: Job, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    if "model" in changed:
        from recbole_cl.model.sasrec import SASRec

        given = {k: v for k, v in SETTINGS.items() if not k.startswith(("llm", "lora", "beam", "base", "adapter"))}
        job, changed = Job(SASRec, job.data, given), {"loss_type": "CE"}
    with pytest.raises(ConfigError, match=message):
        job.walk(tmp_path, **changed)


def test_items_without_codes_are_told(job: Job, tmp_path: Path) -> None:
    short = write_index(tmp_path / "short.json", 40)
    with pytest.raises(DataError, match=r"semantic_ids: 4 of 44 items have no codes in 'short.json'"):
        job.walk(tmp_path, semantic_ids=str(short))


def test_no_index_and_two(job: Job, tmp_path: Path) -> None:
    log = write_log(tmp_path / "bare", n_items=N_ITEMS)
    bare = Job(PESO, log.folder, SETTINGS)
    with pytest.raises(ConfigError, match=r"there is no index\*.json in the dataset's folder .* semantic-ids"):
        bare.walk(tmp_path / "one")
    for name in ("index.a.json", "index.b.json"):
        write_index(log.folder / "log" / name)
    with pytest.raises(ConfigError, match=r"holds index.a.json, index.b.json; name one"):
        bare.walk(tmp_path / "two")
    walk = bare.walk(tmp_path / "three", semantic_ids="index.b.json", n_stages=2, epochs=1, base_epochs=1)
    assert isinstance(walk.runner.evaluator, Evaluator)
