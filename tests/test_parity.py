"""``parity: recbole``: the losses of every batch have the bits of RecBole's own trainer, the metrics are its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from recbole.utils import argument_list

from recbole_cl import cli
from recbole_cl.config import CLConfig
from recbole_cl.config.parity import IMPLIED
from recbole_cl.errors import ConfigError
from recbole_cl.stream.parity import ParityLoader
from recbole_cl.study.parity import compare, comparison_table
from recbole_cl.training.runner import Runner

SMALL: dict[str, Any] = {
    "embedding_size": 16,
    "hidden_size": 16,
    "inner_size": 32,
    "n_layers": 1,
    "n_heads": 2,
    "mlp_hidden_size": [16, 8],
    "latent_dimension": 16,
    "kg_embedding_size": 16,
    "MAX_ITEM_LIST_LENGTH": 10,
    "train_batch_size": 64,
    "learning_rate": 0.01,
    "epochs": 2,
    "show_progress": False,
    "parity": "recbole",
}
WEEK = {"val_interval": {"timestamp": "[874724710,875400000]"}}
"""The first week of ml-100k."""
MODELS = ["BPR", "LightGCN", "NeuMF", "MultiVAE", "GRU4Rec", "SASRec", "FM", "DeepFM", "CKE"]


def configure(model: str, dataset: str = "ml-100k", **properties: Any) -> CLConfig:
    return CLConfig(model=model, dataset=dataset, config_dict={**SMALL, **properties})


def check(found: dict[str, Any], epochs: int = 2) -> None:
    theirs, ours = found["recbole"], found["recbole_cl"]
    assert found["equal_losses"], found["first_difference"]
    assert ours["losses"] == theirs["losses"]
    assert len(ours["losses"]) == epochs and all(ours["losses"])
    assert found["batches"] == sum(map(len, ours["losses"]))
    assert ours["test_result"] and set(ours["test_result"]) == set(theirs["test_result"])
    assert ours["test_result"] == pytest.approx(theirs["test_result"], abs=1e-6)
    assert len(ours["valid"]) == len(theirs["valid"]) == epochs
    for mine, their in zip(ours["valid"], theirs["valid"], strict=True):
        assert mine == pytest.approx(their, abs=1e-6)
    assert ours["best_valid_result"] == pytest.approx(theirs["best_valid_result"], abs=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_losses_have_recboles_bits(model: str) -> None:
    check(compare(configure(model, **WEEK)))


def test_a_model_that_draws_while_it_is_evaluated_agrees_without_validation() -> None:
    found = compare(configure("BERT4Rec", eval_step=0, **WEEK))
    assert found["equal_losses"] and found["largest_metric_gap"] < 1e-6
    assert found["recbole_cl"]["valid"] == found["recbole"]["valid"] == []


@pytest.fixture
def awkward(tmp_path: Path) -> Path:
    """A log out of order with ties, users of one to three interactions, items without a link, unlinked item rows."""
    rng = np.random.default_rng(3)
    folder = tmp_path / "awkward"
    folder.mkdir()
    lines = []
    for user in range(40):
        for item in rng.choice(60, size=1 + user % 3 if user < 12 else int(rng.integers(4, 16)), replace=False):
            # Seconds of today: float32 knows 128 s steps, so most of these are ties to RecBole.
            lines.append(f"u{user}\ti{item}\t{rng.integers(1, 6)}.0\t{1_700_000_000 + int(rng.integers(0, 900))}")
    rng.shuffle(lines)
    columns = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (folder / "awkward.inter").write_text("\n".join([columns, *lines]) + "\n")
    items = [f"i{item}\t{item * 1.5 if item % 5 else ''}\tc{item % 4}" for item in rng.permutation(70)]
    (folder / "awkward.item").write_text("\n".join(["item_id:token\tprice:float\tclass:token", *items]) + "\n")
    links = [f"i{item}\te{item}" for item in range(60) if item % 7]
    (folder / "awkward.link").write_text("\n".join(["item_id:token\tentity_id:token", *links]) + "\n")
    triples = [f"e{rng.integers(60)}\tr{rng.integers(3)}\te{rng.integers(60, 80)}" for _ in range(150)]
    (folder / "awkward.kg").write_text("\n".join(["head_id:token\trelation_id:token\ttail_id:token", *triples]) + "\n")
    return tmp_path


@pytest.mark.parametrize(
    ("model", "properties"),
    [
        ("BPR", {"train_neg_sample_args": {"distribution": "popularity", "sample_num": 2}}),
        ("SASRec", {"loss_type": "BPR", "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}}),
        ("GRU4Rec", {}),
        ("LightGCN", {}),
        (
            "DeepFM",
            {
                "threshold": {"rating": 4},
                "load_col": {
                    "inter": ["user_id", "item_id", "rating", "timestamp"],
                    "item": ["item_id", "price", "class"],
                },
                "normalize_field": ["price"],
                "eval_args": {"mode": "labeled"},
            },
        ),
        (
            "CKE",
            {
                "load_col": {
                    "inter": ["user_id", "item_id", "rating", "timestamp"],
                    "kg": ["head_id", "relation_id", "tail_id"],
                    "link": ["item_id", "entity_id"],
                    "item": ["item_id", "class"],
                }
            },
        ),
    ],
)
def test_an_awkward_log(model: str, properties: dict[str, Any], awkward: Path) -> None:
    check(compare(configure(model, "awkward", data_path=str(awkward), **properties)))


def test_the_comparison_leaves_no_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest", "--learning_rate=0.5"])  # RecBole's Config would read it
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    arguments, resolvers = list(argument_list.dataset_arguments), vars(yaml.FullLoader).get("yaml_implicit_resolvers")
    check(compare(configure("BPR", **WEEK)))
    assert not list(tmp_path.iterdir())
    assert sys.argv[1] == "--learning_rate=0.5" and os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    assert argument_list.dataset_arguments == arguments
    assert vars(yaml.FullLoader).get("yaml_implicit_resolvers") == resolvers
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: with an order of its own the run differs from the first batch on."""
    load = ParityLoader.__init__

    def reseeded(self: ParityLoader, loader: Any) -> None:
        load(self, loader)
        loader.generator.manual_seed(1)

    monkeypatch.setattr(ParityLoader, "__init__", reseeded)
    found = compare(configure("BPR", **WEEK))
    assert not found["equal_losses"] and found["first_difference"] == (0, 0)
    assert "losses differ from epoch 0, batch 0 on" in comparison_table(found)


@pytest.mark.parametrize("model", ["CKE", "NeuMF"])
def test_a_resumed_run_goes_on_with_the_same_bits(model: str, tmp_path: Path) -> None:
    def settings(folder: str, epochs: int) -> CLConfig:
        config = configure(model, output_dir=str(tmp_path / folder), **{**WEEK, "epochs": epochs})
        config["saved"] = True
        return config

    whole = Runner(settings("whole", 3))
    whole.run()

    class Killed(Exception):
        pass

    class Dies(Runner):
        def _save(self, ctx: Any, phase: str, inside: Any = None) -> None:
            super()._save(ctx, phase, inside)
            if inside is not None and inside["progress"]["epoch"] == 1:
                raise Killed

    with pytest.raises(Killed):
        Dies(settings("parts", 3)).run()
    config = settings("parts", 3)
    config["resume"] = True
    resumed = Runner(config)
    resumed.run()
    assert [p["train_loss"] for p in resumed.journal.curves] == [p["train_loss"] for p in whole.journal.curves]
    assert resumed.journal.records == whole.journal.records


OTHER: dict[str, Any] = {
    "n_stages": 3,
    "scheduler": "BaseThenIncrements",
    "strategy": "FullRetrain",
    "vocabulary": "growing",
    "candidates": "seen",
    "train_positions": "all",
    "stage_split": "tail",
    "stage_ratios": [0.7, 0.1, 0.2],
    "valid_split": "random",
    "min_user_inter": 2,
    "history": "stage",
    "graph": "stage",
    "time_range": [0, 900000000],
    "scratch": True,
    "stage_lr_scale": [0.5],
    "stage_epochs": 2,
    "cold_targets": "drop",
    "checkpoint_steps": 5,
    "worker": 2,
}


@pytest.mark.parametrize("key", IMPLIED)
def test_what_has_no_counterpart_is_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigError, match=f"property '{key}' is .*'parity' is 'recbole'"):
        configure("SASRec", **{key: OTHER[key]})
    asked = configure("SASRec", **{key: IMPLIED[key]})
    assert asked[key] == configure("SASRec")[key] == IMPLIED[key]


def test_other_splits_modes_and_words_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"property 'eval_args'.*LS"):
        configure("BPR", eval_args={"split": {"RS": [0.8, 0.1, 0.1]}})
    with pytest.raises(ConfigError, match=r"mode 'uni100'.*'parity'"):
        configure("BPR", eval_args={"mode": "uni100"})
    with pytest.raises(ConfigError, match="property 'parity' is 'Recbole'"):
        configure("BPR", parity="Recbole")
    with pytest.raises(ConfigError, match=r"'parity' is 'recbole'.*model 'DIEN'"):
        configure("DIEN")
    with pytest.raises(ConfigError, match="property 'parity' is not set"):
        compare(configure("BPR", parity=None))
    with pytest.raises(ConfigError, match="property 'resume' is True"):
        compare(configure("BPR", resume=True))


def test_the_command_prints_both(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    settings = {**SMALL, **WEEK, "state": "warning"}
    del settings["parity"]
    given = [f"--{key}={yaml.safe_dump(value, default_flow_style=True).strip()}" for key, value in settings.items()]
    given = [text.removesuffix("\n...") for text in given]
    assert cli.main(["compare", "-m", "BPR", *given]) == 0
    printed = capsys.readouterr().out
    assert "have the same bits" in printed and "RecBole-CL" in printed
    assert "epoch 1 loss" in printed and "test ndcg@10" in printed
    assert cli.main(["compare", "-m", "BPR", "--n_stages=2"]) == 2
    assert "property 'n_stages' is 2" in capsys.readouterr().err
