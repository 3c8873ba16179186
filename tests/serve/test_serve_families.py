"""Lists of a loaded run are the evaluator's, for every family of models, in a process that has never seen the run."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import SMALL
from serve_helpers import answers, fresh, same_ranking

import recbole_cl
from recbole_cl.config import CLConfig
from recbole_cl.errors import ConfigError
from recbole_cl.serve.forget import forget
from recbole_cl.serve.update import update
from recbole_cl.training.runner import Runner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "contracts"))
from conformance_helpers import START, Log, write_atomic, write_log

NAMES = {"user": "user", "item": "item", "time": "time"}
RANKED = {"eval_args": {"mode": "full"}, "metrics": ["Hit", "NDCG"], "valid_metric": "NDCG@10"}
KNOWLEDGE = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"], "kg": ["head_id", "relation_id", "tail_id"],
                 "link": ["item_id", "entity_id"]},
    "kg_embedding_size": 8,
}  # fmt: skip
PESO: dict[str, Any] = {
    "vocabulary": "global", "candidates": "all", "llm_hidden": 16, "llm_intermediate": 32, "llm_layers": 1,
    "llm_heads": 2, "llm_kv_heads": 1, "lora_rank": 2, "base_epochs": 2, "adapter_epochs": 1, "beam_size": 12,
    "strategy": "PESO",
}  # fmt: skip
PROTOFED: dict[str, Any] = {
    "hidden_size": 16, "n_layers": 2, "protofed_tokens": 2, "protofed_hidden": 16, "protofed_prototypes": 4,
    "protofed_width": 4, "protofed_shared_epochs": 1, "protofed_rounds": 1, "protofed_noise_multiplier": 1.5,
    "protofed_epsilon": 50.0,
}  # fmt: skip
LIBER: dict[str, Any] = {
    "liber_backbone": "SASRec", "liber_partition_size": 5, "liber_encoder": "hash", "liber_size": 8, "liber_hidden": 8,
    "liber_item_fields": [],
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "NeuMF": {}, "MultiVAE": {"latent_dimension": 8}, "LightGCN": {}, "ItemKNN": {}, "GRU4Rec": {}, "BERT4Rec": {},
    "NARM": {}, "FM": {}, "WideDeep": {}, "CKE": KNOWLEDGE, "PCL": {"pcl_encoder": "random"}, "PESO": PESO,
    "ProtoFedSP": PROTOFED, "LIBER": LIBER,
}  # fmt: skip


def missing(model: str) -> str | None:
    """Returns why a family cannot be tried here."""
    if model == "ProtoFedSP" and importlib.util.find_spec("dp_accounting") is None:
        return "dp-accounting, of the extra 'federated', is not installed"
    return None


def made(log: Log, folder: Path, model: str) -> Runner:
    """Returns a finished run."""
    given = {**SMALL, **RANKED, **FAMILIES[model], "n_stages": 3, "epochs": 1, "output_dir": str(folder)}
    if model == "LIBER":
        given["liber_cache"] = str(folder.parent / "texts")
    config = CLConfig(model=model, dataset="log", config_dict={**given, "data_path": str(log.folder)})
    config["saved"] = True
    runner = Runner(config)
    runner.run()
    return runner


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    log = write_log(tmp_path_factory.mktemp("log"))
    folder = log.folder / "log"
    codes = {f"i{k}": [f"<a_{k % 3}>", f"<b_{k // 3 % 4}>", f"<c_{k // 12}>"] for k in range(45)}
    (folder / "index.json").write_text(json.dumps(codes))
    items = sorted({item for _, item, _ in log.rows})
    write_atomic(folder / "log.link", ["item_id:token", "entity_id:token"], [(i, f"e{i[1:]}") for i in items])
    triples = [(f"e{i[1:]}", "in", f"group{int(i[1:]) % 3}") for i in items]
    write_atomic(folder / "log.kg", ["head_id:token", "relation_id:token", "tail_id:token"], triples)
    return log


@pytest.fixture(scope="module")
def runs(log: Log, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs, and what evaluator and model said; then what a fresh process says, all in one."""
    root = tmp_path_factory.mktemp("families")
    there = [model for model in FAMILIES if missing(model) is None]
    for model in there:
        runner = made(log, root / model / "run", model)
        ctx = runner.standing(len(runner.stream) - 1)
        outcome = runner.evaluator.evaluate(ctx, runner.known, runner.stream.stages[-1])
        told = {} if model == "PESO" else answers(ctx)
        np.savez(root / f"{model}.npz", recommended=outcome.recommended, **told)
    code = """
import sys
from serve_helpers import ask
for model in sys.argv[2:]:
    ask(f"{sys.argv[1]}/{model}/run", f"{sys.argv[1]}/{model}-asked.npz", f"{sys.argv[1]}/{model}.npz")
"""
    done = fresh(code, str(root), *there, cwd=root)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("model", FAMILIES)
def test_lists_are_the_evaluators(runs: Path, model: str) -> None:
    if missing(model):
        pytest.skip(str(missing(model)))
    if model == "LIBER":
        pytest.skip("what it knows of a user goes by the user and the clock, which a given history does not tell")
    before, after = np.load(runs / f"{model}.npz"), np.load(runs / f"{model}-asked.npz")
    assert len(before["recommended"]) > 10 and (before["recommended"] > 0).any(axis=1).mean() > 0.8  # but for the cold
    assert same_ranking(after["lists"], after["scores"], before["recommended"], 2e-5)
    for name in ("hash", "predict"):
        if name in before:
            assert np.array_equal(before[name], after[name]), f"{name} of {model} differs after load"


UPDATED = ("NeuMF", "MultiVAE", "ItemKNN", "GRU4Rec", "BERT4Rec", "FM", "PESO", "ProtoFedSP", "LIBER")


def rows_of(path: Path, n: int, items: int) -> Path:
    """Writes rows after the log's end: users and items as before, and some new ones."""
    lines = [f"u{k % 43},i{k % 3 + 3 * (k // 7 % (items // 3))},{START + 7 * 900 + 5 * k}" for k in range(n)]
    path.write_text("user,item,time\n" + "\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("model", UPDATED)
def test_every_family_is_updated(log: Log, runs: Path, tmp_path: Path, model: str) -> None:
    if missing(model):
        pytest.skip(str(missing(model)))
    folder = runs / model / "run"
    done = update(folder, rows_of(tmp_path / "new.csv", 200, 45 if model == "PESO" else 48), columns=NAMES, margin=1.0)
    assert done.promoted and done.champion == 1, done.reason
    assert done.rows["new_users"] > 0 and done.old is not None
    served = recbole_cl.load(folder)
    assert served.position.stage == 4
    answer = served.recommend("u1", 5, filter_seen=False)[0]
    assert len(answer.items) == 5 and answer.scores == sorted(answer.scores, reverse=True)
    assert served.recommend("u41", 5, filter_seen=False)[0].items, "a user who came with the new rows"


def test_a_knowledge_graph_is_refused_with_the_reason(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model: CKE: the run cannot be updated.*links into its knowledge graph"):
        update(runs / "CKE" / "run", rows_of(tmp_path / "new.csv", 200, 48), columns=NAMES)
    told = recbole_cl.load(runs / "CKE" / "run").recommend("u1", 5)[0]
    assert len(told.items) == 5, "it is served all the same"


@pytest.mark.parametrize("model", ["LIBER", "ProtoFedSP", "CKE", "MultiVAE"])
def test_users_are_forgotten_by_every_family(log: Log, tmp_path: Path, model: str) -> None:
    if missing(model):
        pytest.skip(str(missing(model)))
    folder = made(log, tmp_path / "run", model).folder
    told = forget(folder, ["u1"])
    assert told.users == 1 and told.versions == [0]
    served = recbole_cl.load(folder)
    assert served.recommend("u1")[0].status == "unknown" and served.recommend("u2", 5)[0].items
    if model == "LIBER":
        knowledge = served.saved.state["model"]["owned"]["knowledge"]
        gone = np.flatnonzero(np.char.startswith(served.stream.dataset.field2id_token["user_id"], "[FORGOTTEN"))
        assert told.texts > 0 and len(knowledge["user"]) and not np.isin(knowledge["user"], gone).any()
    if model == "ProtoFedSP":
        clients = served.saved.state["model"]["owned"]["clients"]
        gone = np.flatnonzero(np.char.startswith(served.stream.dataset.field2id_token["user_id"], "[FORGOTTEN"))
        assert len(clients["users"]) and not np.isin(clients["users"], gone).any()
