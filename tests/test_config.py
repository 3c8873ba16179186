"""Properties: where they come from, who wins, what is refused and in which words."""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from recbole.model.sequential_recommender import SASRec
from recbole.utils import InputType, ModelType, argument_list

from recbole_cl import schema
from recbole_cl.config import (
    RECBOLE,
    CLConfig,
    find_dataset,
    get_model_class,
    list_datasets,
    list_metrics,
    list_models,
    parse_arguments,
    parse_value,
    properties_dir,
    read_properties,
)
from recbole_cl.errors import ConfigError
from recbole_cl.registry import schedulers, strategies
from recbole_cl.strategy.base import Strategy


class DummyAnchor:
    """A strategy that brings its defaults as an attribute."""

    prefix = "anchor"
    defaults = {"anchor_lambda": 1.0, "anchor_mode": "mean", "epochs": 7}


class DummyReplay:
    """Another one, whose defaults leave the prefix out."""

    prefix = "replay"
    defaults = {"size": 100}


@pytest.fixture(autouse=True)
def dummies(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two strategies for the duration of a test, and no dataset folders of this machine."""
    strategies.names()
    monkeypatch.setattr(strategies, "_members", dict(strategies._members))
    monkeypatch.setattr(strategies, "_names", dict(strategies._names))
    strategies._add("DummyAnchor", DummyAnchor)
    strategies._add("DummyReplay", DummyReplay)
    monkeypatch.delenv("RECBOLE_CL_DATA", raising=False)
    yield


def make(model: Any = "BPR", dataset: str = "ml-100k", **properties: Any) -> CLConfig:
    return CLConfig(model, dataset, config_dict=properties)


def write_log(root: Path, name: str = "shop", header: str = "user_id:token\titem_id:token\ttimestamp:float") -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    row = "\t".join("1" for _ in header.split("\t"))
    (folder / f"{name}.inter").write_text(f"{header}\n{row}\n")
    return folder


# ---------------------------------------------------------------------------------------------- values and files


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-3", -3),
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("0.1", 0.1),
        ("True", True),
        ("false", False),
        ("None", None),
        ("~", None),
        ("[5,10]", [5, 10]),
        ("[64, 32]", [64, 32]),
        ("[]", []),
        ("{rating: 4}", {"rating": 4}),
        ("{'a': None, 'b': [1e-3]}", {"a": None, "b": [1e-3]}),
        ("[2011-06-01, 2012-01-01]", ["2011-06-01", "2012-01-01"]),
        # text stays text
        ("2011-06-01", "2011-06-01"),
        ("12:30", "12:30"),
        ("a: b", "a: b"),
        ("- a", "- a"),
        ("# x", "# x"),
        ("*x", "*x"),
        ("[0,inf)", "[0,inf)"),
        ("(1, 2)", "(1, 2)"),
        ("SASRec", "SASRec"),
        ("", ""),
        (" ", " "),
        ("\t", "\t"),
        ("__import__('os').system('true')", "__import__('os').system('true')"),
        ("!!python/object/apply:os.system ['true']", "!!python/object/apply:os.system ['true']"),
        ("1+1", "1+1"),
        ("[" * 5000, "[" * 5000),
    ],
)
def test_parse_value(text: str, value: Any) -> None:
    got = parse_value(text)
    assert got == value
    assert type(got) is type(value)


def test_arguments() -> None:
    assert parse_arguments(None) == {}
    args = ["--topk=[5,10]", "--learning_rate=1e-4", "--x=a=b", "--resume", "--y=None", "--z='5'", "--seq_separator= "]
    assert parse_arguments(args) == {
        "topk": [5, 10],
        "learning_rate": 1e-4,
        "x": "a=b",
        "resume": True,
        "y": None,
        "z": "5",
        "seq_separator": " ",
    }
    assert parse_arguments(["--dataset=2020", "--gpu_id=0", "--user_inter_num_interval=[5,10]"]) == {
        "dataset": "2020",
        "gpu_id": "0",
        "user_inter_num_interval": "[5,10]",
    }
    assert parse_arguments(["--x=1", "--x=1"]) == {"x": 1}


@pytest.mark.parametrize("args", [["x=1"], ["-x=1"], ["--=1"], ["--"], ["10"], ["--x=1", "--x=2"]])
def test_arguments_that_make_no_sense(args: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"--name=value|given twice"):
        parse_arguments(args)


def test_read_properties(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("a: 1e-4\nb: None\nc: 2011-06-01\nd: [1e3, x]\n")
    assert read_properties(file) == {"a": 1e-4, "b": None, "c": "2011-06-01", "d": [1e3, "x"]}
    file.write_text("# nothing\n")
    assert read_properties(file) == {}
    for text in ("- a\n", "a: [1\n", "1: 2\n", "x: !!python/name:os.system\n", "text"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"a\.yaml"):
            read_properties(file)
    with pytest.raises(ConfigError, match=r"cannot read the config file .*missing\.yaml"):
        read_properties(tmp_path / "missing.yaml")


def bomb(depth: int) -> str:
    """Nested anchors: ten of the line above in each line."""
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, depth))]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("epochs: 3\nseed: 1\nepochs: 4\n", r"the key 'epochs' stands twice, first in line 1; keep one.* line 3"),
        ("eval_args: {mode: full, mode: uni100}\n", r"the key 'mode' stands twice"),
        ("a: &a [*a]\n", "an anchor holds itself"),
        ("a: &a {b: {c: *a}}\n", "an anchor holds itself"),
        (bomb(30), r"its anchors, written out, make \d+ values"),
    ],
)
def test_yaml_that_makes_no_sense(content: str, words: str, tmp_path: Path) -> None:
    """Told at once, with the line."""
    file = tmp_path / "odd.yaml"
    file.write_text(content)
    begun = time.perf_counter()
    with pytest.raises(ConfigError, match=words):
        read_properties(file)
    assert time.perf_counter() - begun < 5.0
    assert parse_value("{a: 1, a: 2}") == "{a: 1, a: 2}", "no mapping, so it is refused where one is asked for"


def test_yaml_anchors_that_make_sense(tmp_path: Path) -> None:
    file = tmp_path / "anchors.yaml"
    file.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n")
    assert read_properties(file) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": [{"x": 1, "y": 2}] * 2}


def test_yaml_loaders_of_others_are_left_alone() -> None:
    before = yaml.safe_load("1e-4"), yaml.load("1e-4", Loader=yaml.FullLoader), yaml.safe_load("2011-06-01")
    make()
    after = yaml.safe_load("1e-4"), yaml.load("1e-4", Loader=yaml.FullLoader), yaml.safe_load("2011-06-01")
    assert after == before
    assert isinstance(yaml.safe_load("None"), str)


# ---------------------------------------------------------------------------------------------- side effects


def test_what_the_caller_owns_is_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "topk": "[10, 20]",
        "train_neg_sample_args": {"distribution": "uniform"},
        "eval_args": {"mode": "full"},
        "strategy": {"DummyAnchor": {"lambda": "5"}},
        "metrics": ["NDCG"],
    }
    before, environment = copy.deepcopy(given), dict(os.environ)
    monkeypatch.setattr(sys, "argv", ["x", "--epochs=99", "--model=Nonsense", "stray"])
    config = CLConfig("BPR", "ml-100k", config_dict=given)
    config["metrics"].append("Hit")
    assert given == before
    assert dict(os.environ) == environment
    assert config["epochs"] != 99
    assert config["topk"] == [10, 20]
    assert config["train_neg_sample_args"]["sample_num"] == 1


def test_global_lists_of_recbole_do_not_grow() -> None:
    names = [name for name in dir(argument_list) if name.endswith("_arguments")]
    before = {name: list(getattr(argument_list, name)) for name in names}
    for model in ("BPR", "SASRec", "DeepFM"):
        make(model)
    assert {name: list(getattr(argument_list, name)) for name in names} == before


def test_nothing_is_evaluated(tmp_path: Path) -> None:
    code = f"__import__('pathlib').Path({str(tmp_path / 'x')!r}).touch()"
    config = CLConfig("BPR", "ml-100k", config_dict={"qqqqq": code}, args=[f"--zzzzzz={code}"])
    assert config["qqqqq"] == config["zzzzzz"] == code
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------------------------------------- who wins


def test_order_of_layers(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("epochs: 1\nn_stages: 2\nseed: 3\nembedding_size: 8\n")
    two.write_text("n_stages: 4\nseed: 5\nembedding_size: 9\n")
    config = CLConfig(
        "BPR", "ml-100k", [str(one), str(two)], {"seed": 6, "embedding_size": 10}, ["--embedding_size=11"]
    )
    assert [config[k] for k in ("epochs", "n_stages", "seed", "embedding_size")] == [1, 4, 6, 11]
    config = CLConfig("BPR", "ml-100k", args=[f"--config_files={one} {two}"])
    assert config["n_stages"] == 4
    assert "config_files" not in config
    assert CLConfig("BPR", "ml-100k", str(one))["n_stages"] == 2


def test_defaults() -> None:
    config = make()
    overall = read_properties(properties_dir() / "overall.yaml")
    special = {"repeatable", "data_path", "topk"}
    assert {k: config[k] for k in overall if k not in special} == {k: overall[k] for k in overall if k not in special}
    assert config["seed"] == 2020
    assert config["embedding_size"] == 64
    assert config["normalize_all"] is False
    assert config["single_spec"] is True
    assert config["local_rank"] == 0
    assert config["device"] == torch.device("cpu")
    assert "nonsense" not in config
    assert config["nonsense"] is None
    assert config.model == config["model"] == "BPR"
    assert config.n_stages == 5
    assert "n_stages" in str(config)
    copy.deepcopy(config)


def test_model_and_dataset_may_be_properties(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model: sasrec\ndataset: ml-100k\n")
    config = CLConfig(config_file_list=[file])
    assert (config["model"], config["dataset"]) == ("SASRec", "ml-100k")
    with pytest.raises(ConfigError, match="no model was given"):
        CLConfig(dataset="ml-100k")
    with pytest.raises(ConfigError, match="no dataset was given"):
        CLConfig("BPR")


RANKING = (["Recall", "MRR", "NDCG", "Hit", "Precision"], "NDCG@10")
VALUE = (["AUC", "LogLoss"], "AUC")


@pytest.mark.parametrize(
    ("model", "metrics", "mode", "negatives", "kind", "repeats"),
    [
        ("BPR", RANKING, "full", 1, ModelType.GENERAL, False),
        ("SASRec", RANKING, "full", "none", ModelType.SEQUENTIAL, True),
        ("DeepFM", VALUE, "labeled", "none", ModelType.CONTEXT, False),
        ("DIN", VALUE, "uni100", 1, ModelType.SEQUENTIAL, True),
        ("CKE", RANKING, "full", 1, ModelType.KNOWLEDGE, False),
    ],
)
def test_recboles_quick_start_is_kept_for_each_type(
    model: str, metrics: tuple[list[str], str], mode: str, negatives: Any, kind: ModelType, repeats: bool
) -> None:
    config = make(model)
    assert (config["metrics"], config["valid_metric"]) == metrics
    assert config["eval_args"]["mode"] == {"valid": mode, "test": mode}
    assert config["train_neg_sample_args"]["sample_num"] == negatives
    assert config["MODEL_TYPE"] == kind
    assert config.repeatable_items is repeats
    assert config["normalize_all"] is False
    assert "timestamp" in config["load_col"]["inter"]
    assert (model in ("DeepFM", "DIN")) == ("user" in config["load_col"])
    assert config["data_path"] == str(RECBOLE / "dataset_example" / "ml-100k")
    assert config.warnings == []


def test_recboles_dataset_and_model_accept_it() -> None:
    from recbole.data import create_dataset
    from recbole.model.general_recommender import BPR

    config = make("BPR", val_interval={"timestamp": "[0,876000000)"})
    data = create_dataset(config).build()[0]
    assert data.inter_feat["timestamp"].max() > 1e8
    BPR(config, data)


# ---------------------------------------------------------------------------------------------- models


def test_models_are_found_by_name() -> None:
    assert get_model_class("bpr").__name__ == "BPR"
    assert get_model_class("kd_dagfm").__name__ == "KD_DAGFM"
    assert issubclass(get_model_class("SASREC"), torch.nn.Module)
    names = list_models()
    assert {"BPR", "SASRec", "DeepFM", "KGAT", "NCL", "LightGCN", "EASE"} <= set(names)
    assert not {"LightGBM", "XGBoost", "lightgbm", "xgboost"} & set(names)
    assert len(names) == len(set(names)) > 85
    with pytest.raises(ConfigError, match=r"unknown model 'SASRek'; did you mean 'SASRec'\?"):
        get_model_class("SASRek")
    for tree in ("lightgbm", "XGBoost"):
        with pytest.raises(ConfigError, match="cannot be trained in stages"):
            make(tree)


def test_a_model_whose_package_is_missing_says_so() -> None:
    import importlib.util

    if importlib.util.find_spec("dgl") is not None:
        pytest.skip("dgl is installed")
    with pytest.raises(ConfigError, match=r"'KGAT' needs the package 'dgl'.*pip install"):
        get_model_class("KGAT")


def test_strategies_that_set_a_general_property_otherwise_are_refused() -> None:
    class Short(Strategy):
        defaults = {"epochs": 3, "own": 1}

    class Long(Strategy):
        defaults = {"epochs": 9}

    strategies._add("Short", Short)
    strategies._add("Long", Long)
    assert make(strategy="Short")["epochs"] == 3
    assert make(strategy=["Short", "FineTune"])["epochs"] == 3
    with pytest.raises(ConfigError, match=r"Short sets the property 'epochs' to 3, Long to 9; say which with --epochs"):
        make(strategy=["Short", "Long"])
    assert make(strategy=["Short", "Long"], epochs=5)["epochs"] == 5


def test_models_that_no_stream_can_serve_say_why() -> None:
    for name, why in (("FEARec", "augmented sequences"), ("RippleNet", "without training interactions")):
        with pytest.raises(ConfigError, match=f"{name}' cannot be trained in stages: .*{why}"):
            get_model_class(name)


def test_a_class_as_model() -> None:
    class Mine(SASRec):
        defaults = {"hidden_size": 32, "my_own": 5}

    config = make(Mine, my_own=6)
    assert config["model"] == "Mine"
    assert config.model_class is Mine
    assert (config["hidden_size"], config["my_own"], config["n_layers"]) == (32, 6, 2)
    assert config["train_neg_sample_args"]["distribution"] == "none"
    assert make(Mine, hidden_size=16)["hidden_size"] == 16


def test_a_class_with_a_file_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_model_file.py").write_text(
        "from recbole.model.general_recommender import BPR\n"
        "class Nearby(BPR):\n"
        "    def f(self, config): return config['nearby_size']\n"
    )
    (tmp_path / "Nearby.yaml").write_text("embedding_size: 12   # (int) Size.\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__("my_model_file")
    config = make(module.Nearby, nearby_size=3)
    assert config["embedding_size"] == 12
    assert config.warnings == []
    with pytest.raises(ConfigError, match=r"'embedding_size' is 'big'"):
        make(module.Nearby, embedding_size="big")


def test_a_class_that_is_no_model() -> None:
    with pytest.raises(ConfigError, match="AbstractRecommender"):
        make(torch.nn.Linear)


# ---------------------------------------------------------------------------------------------- strategies


@pytest.mark.parametrize(
    ("strategy", "flat", "specs"),
    [
        ("dummyanchor", {}, [("DummyAnchor", {"lambda": 1.0, "mode": "mean"})]),
        ("DummyAnchor", {"anchor_lambda": 2}, [("DummyAnchor", {"lambda": 2, "mode": "mean"})]),
        ({"DummyAnchor": {"lambda": 3}}, {"anchor_lambda": 2}, [("DummyAnchor", {"lambda": 3, "mode": "mean"})]),
        ({"DummyAnchor": {"anchor_lambda": 3}}, {}, [("DummyAnchor", {"lambda": 3, "mode": "mean"})]),
        ({"DummyAnchor": None}, {}, [("DummyAnchor", {"lambda": 1.0, "mode": "mean"})]),
        (
            ["DummyReplay", {"DummyAnchor": {"mode": "max"}}],
            {},
            [("DummyReplay", {"size": 100}), ("DummyAnchor", {"lambda": 1.0, "mode": "max"})],
        ),
        (
            {"DummyAnchor": {"lambda": "1e-2"}, "DummyReplay": {"size": 5}},
            {},
            [("DummyAnchor", {"lambda": 0.01, "mode": "mean"}), ("DummyReplay", {"size": 5})],
        ),
        ("[DummyAnchor, DummyReplay]", {"replay_size": 9}, None),
    ],
)
def test_strategy_forms(strategy: Any, flat: dict[str, Any], specs: Any) -> None:
    config = make(strategy=strategy, **flat)
    if specs is None:
        specs = [("DummyAnchor", {"lambda": 1.0, "mode": "mean"}), ("DummyReplay", {"size": 9})]
    assert config.strategy_specs() == specs
    assert config.strategy_name == "+".join(name for name, _ in specs)
    assert config.strategy_classes == [strategies.get(name) for name, _ in specs]
    for name, parameters in specs:
        for key, value in parameters.items():
            assert config[f"{strategies.get(name).prefix}_{key}"] == value
    if specs[0][0] == "DummyAnchor":
        assert config["epochs"] == 7  # a general property among the strategy's defaults
        assert make(strategy="DummyAnchor", epochs=8)["epochs"] == 8
    config.strategy_specs()[0][1].clear()
    assert config.strategy_specs() == specs


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("DummyAnchr", "unknown strategy 'DummyAnchr'; did you mean 'DummyAnchor'"),
        ({"DummyAnchor": {"lamda": 1}}, "unknown parameter 'lamda' of strategy 'DummyAnchor'; did you mean 'lambda'"),
        ({"DummyAnchor": {"lambda": 1, "anchor_lambda": 2}}, "twice"),
        ({"DummyAnchor": 5}, "gives 'DummyAnchor' the parameters 5"),
        (["DummyAnchor", "dummyanchor"], "twice"),
        ([], "property 'strategy'"),
        (5, "property 'strategy'"),
        (None, "property 'strategy'"),
        ([5], "lists 5"),
        ({5: {}}, "named by text"),
        ({"FineTune": {"x": 1}}, "has no parameters"),
    ],
)
def test_strategies_that_make_no_sense(strategy: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(strategy=strategy)


def test_declared_types_of_a_strategys_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "typed_strategy.py").write_text("class Typed:\n    prefix = 'typed'\n")
    (tmp_path / "Typed.yaml").write_text("typed_rate: 0.5   # (float) Rate.\ntyped_size: ~   # (int or list) Size.\n")
    monkeypatch.syspath_prepend(tmp_path)
    strategies._add("Typed", __import__("typed_strategy").Typed)
    assert make(strategy="Typed").strategy_specs() == [("Typed", {"rate": 0.5, "size": None})]
    make(strategy={"Typed": {"size": [1, 2]}}, typed_rate=1)
    for bad in ({"strategy": {"Typed": {"rate": "x"}}}, {"strategy": "Typed", "typed_rate": True}):
        with pytest.raises(ConfigError, match=r"'typed_rate' is .*; it must be of type float"):
            make(**bad)


def test_scheduler_is_resolved() -> None:
    config = make(scheduler="timeslices")
    assert config["scheduler"] == "TimeSlices"
    assert config.scheduler_class is schedulers.get("TimeSlices")
    with pytest.raises(ConfigError, match=r"unknown scheduler 'TimeSlice'; did you mean 'TimeSlices'"):
        make(scheduler="TimeSlice")
    with pytest.raises(ConfigError, match=r"'n_stages' is None; the scheduler 'TimeSlices'"):
        make(n_stages=None)


# ---------------------------------------------------------------------------------------------- schema


def test_schema_and_overall_yaml_have_the_same_keys() -> None:
    file = properties_dir() / "overall.yaml"
    overall = read_properties(file)
    assert set(schema.SCHEMA) == set(overall)
    schema.check(overall)
    declared = schema.declared_types(file)
    theirs = set(read_properties(RECBOLE / "properties" / "overall.yaml")) | {"MAX_ITEM_LIST_LENGTH"}
    for key, value in overall.items():
        if key not in theirs or key == "repeatable":
            assert key in declared, f"{key} has no comment '# (type) meaning'"
            schema.check_declared(key, value, declared[key])
    for line in file.read_text().splitlines():
        key = line.partition(":")[0]
        assert key not in declared or len(line.partition("# (")[2].partition(") ")[2]) > 10


BAD = [
    ("n_stages", 0, "integer of at least 1"),
    ("n_stages", 2.0, "integer of at least 1"),
    ("n_stages", True, "integer of at least 1"),
    ("n_stages", "many", "integer of at least 1"),
    ("base_ratio", 0, "between 0 and 1"),
    ("base_ratio", 1.0, "between 0 and 1"),
    ("head_ratio", float("nan"), "between 0 and 1"),
    ("stage_ratios", [0.8, 0.2], "three numbers"),
    ("stage_ratios", [0, 0.5, 0.5], "three numbers"),
    ("stage_ratios", [0.8, -0.1, 0.1], "three numbers"),
    ("stage_by", "counts", "one of 'count', 'time'; did you mean 'count'?"),
    ("boundaries", [], "not empty"),
    ("boundaries", [3, 2], "increasing"),
    ("boundaries", ["June"], "ISO dates"),
    ("boundaries", "2011-06-01", "list"),
    ("time_range", [1, 2, 3], "first and the last"),
    ("time_range", ["2012-01-01", "2011-01-01"], "first and the last"),
    ("stage_split", "random", "'leave_one_out'"),
    ("valid_split", "head", "'tail', 'random'"),
    ("min_user_inter", -1, "integer of at least 0"),
    ("history", "none", "'all', 'stage'"),
    ("vocabulary", "grow", "did you mean 'growing'"),
    ("candidates", "unseen", "'seen', 'trained', 'all'"),
    ("cold_targets", None, "'keep', 'drop'"),
    ("repeatable", "sometimes", "'auto', True or False"),
    ("task_id", 1, "'given', 'latest'"),
    ("scratch", 1, "True or False"),
    ("resume", "maybe", "True or False"),
    ("fwt_reference", "random", "'untrained', 'stage_only'"),
    ("stage_lr_scale", [1, "x"], "list of such numbers"),
    ("stage_lr_scale", -1, "at least 0"),
    ("stage_epochs", 0, "at least 1"),
    ("stage_epochs", [None, 1.5], "list of such numbers"),
    ("stage_optimizer", "keep", "'reset', 'carry'"),
    ("train_positions", "first", "'all', 'last'"),
    ("window", 0, "at least 1"),
    ("window_stride", 51, "never be trained on"),
    ("window_shift", "sometimes", "True or False"),
    ("graph", "none", "'all', 'stage'"),
    ("new_rows", "zero", "'random', 'mean'"),
    ("checkpoint_steps", 0, "at least 1"),
    ("checkpoint_keep", 0, "at least 1"),
    ("output_dir", [], "a text"),
    ("epochs", 0, "at least 1"),
    ("seed", -1, "from 0"),
    ("seed", 2**32, "from 0"),
    ("train_batch_size", 0, "at least 1"),
    ("eval_batch_size", 1.5, "at least 1"),
    ("learning_rate", 0, "above 0"),
    ("learning_rate", float("inf"), "above 0"),
    ("MAX_ITEM_LIST_LENGTH", 0, "at least 1"),
    ("topk", 0, "at least 1"),
    ("topk", [], "at least 1"),
    ("topk", [5, "x"], "at least 1"),
    ("metrics", [], "metric"),
    ("learner", "adamm", "did you mean 'adam'"),
    ("state", "loud", "'debug'"),
    ("eval_args", "full", "a dict"),
    ("threshold", {"rating": "high"}, "dict"),
    ("use_gpu", "maybe", "True or False"),
    # numbers without sense
    ("epochs", 10**18, "at most 2147483647"),
    ("train_batch_size", 10**18, "at most 2147483647"),
    ("hidden_size", 10**18, "at most 1000000"),
    ("topk", 10**6, "at most 10000"),
    ("metric_decimal_place", 10**9, "at most 300"),
    ("n_layers", -1, "integer of at least 1"),
    ("n_heads", 0, "integer of at least 1"),
    ("inner_size", 2.5, "integer of at least 1"),
    ("hidden_dropout_prob", float("nan"), "from 0 to 1, 1 excluded"),
    ("attn_dropout_prob", 1.0, "from 0 to 1, 1 excluded"),
    ("dropout_prob", -0.1, "from 0 to 1, 1 excluded"),
    ("dropout_probs", [0.2, 1.2], "a list, each of its values a number from 0 to 1"),
    ("initializer_range", 0, "above 0"),
    ("layer_norm_eps", -1, "above 0"),
    ("reg_weight", [0.1, -1], "at least 0"),
    ("mlp_hidden_size", [64, 0], "integer of at least 1"),
    ("mlp_hidden_size", 64, "a list"),
    ("hidden_act", "geluu", "did you mean 'gelu'"),
    # how a log is read
    ("load_col", {"inter": "user_id"}, "a dict of lists of columns"),
    ("load_col", {"inter": None}, "a dict of lists of columns"),
    ("load_col", ["user_id"], "a dict of lists of columns"),
    ("unload_col", {"inter": 3}, "a dict of lists of columns"),
    ("encoding", "utf-88", "such as utf-8, utf-8-sig"),
    ("encoding", "base64", "such as utf-8, utf-8-sig"),
    ("field_separator", "", "a text without an end of line"),
    ("field_separator", "\n", "a text without an end of line"),
    ("seq_separator", 5, "a text without an end of line"),
    ("val_interval", "[1,2]", "such as {rating: '[3,inf)'}"),
    ("val_interval", {"rating": "[3"}, "such as {rating: '[3,inf)'}"),
    ("val_interval", {"rating": "[5,3]"}, "such as {rating: '[3,inf)'}"),
    ("user_inter_num_interval", "[5", "an interval, such as '[5,inf)'"),
    ("item_inter_num_interval", "5", "an interval, such as '[5,inf)'"),
    ("clip_grad_norm", 5, "such as {max_norm: 5}"),
    ("clip_grad_norm", {"max": 5}, "such as {max_norm: 5}"),
    ("clip_grad_norm", {"max_norm": -1}, "such as {max_norm: 5}"),
    ("clip_grad_norm", {"max_norm": 5, "norm_type": "two"}, "such as {max_norm: 5}"),
    ("transform", "mask_itemsec", "did you mean 'mask_itemseq'"),
    # where it is kept
    ("output_dir", "a\0b", "without the character NUL"),
    ("output_dir", "~nosuchperson/x", "without the home (~) of an unknown user"),
    ("data_path", "a\0b", "without the character NUL"),
    ("text_cache", "~nosuchperson/x", "without the home (~) of an unknown user"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), BAD)
def test_a_value_out_of_its_range_is_refused(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**{key: value})
    assert f"property {key!r} is " in str(caught.value)
    assert allowed in str(caught.value)


def test_values_within_their_range_are_accepted() -> None:
    make(
        boundaries=["2011-01-01", "2011-06-01T12:00:00Z", 2e9],
        time_range=[0, "2030-01-01"],
        stage_lr_scale=[1, 0.5],
        stage_epochs=[None, 4],
        window=20,
        window_stride=20,
        topk=5,
        valid_metric="ndcg@5",
        learner="AdamW",
        state=None,
        stage_ratios=[1, 0, 0],
        hidden_dropout_prob=0,
        reg_weight=[0, 1e-3],
        mlp_hidden_size=[],
        load_col={"inter": ["user_id", "item_id", "timestamp"], "item": "*"},
        encoding="latin-1",
        val_interval={"rating": "[3,inf);(0,1]", "item_id": ["1", "2"]},
        user_inter_num_interval="[5,inf)",
        clip_grad_norm={"max_norm": 5, "norm_type": float("inf")},
        output_dir="~/somewhere",
    )


def test_defaults_of_all_models_are_within_their_ranges() -> None:
    """RecBole's, as they are, and ours."""
    rules = {**schema.RECBOLE_SCHEMA, **schema.MODEL_SCHEMA}
    seen = set()
    for file in [*(RECBOLE / "properties").rglob("*.yaml"), *properties_dir().rglob("*.yaml")]:
        if file.parent.name in ("study", "tasks", "hyper"):
            continue
        for key, value in read_properties(file).items():
            if key in rules:
                rules[key].check(f"{file.name}: {key}", value)
                seen.add(key)
    assert set(schema.MODEL_SCHEMA) <= seen, "a rule that no file uses is a slip"


def test_heads_divide_the_width() -> None:
    with pytest.raises(ConfigError, match=r"'n_heads' is 3, which does not divide property 'hidden_size' 64"):
        make("SASRec", n_heads=3)


def test_a_loss_without_an_input_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"loss_type: 'BCE' is none of BPR, CE; did you mean 'CE'\? The model 'SASRec'"
    ):
        make("SASRec", loss_type="BCE")


def test_every_key_of_the_schema_refuses_an_object() -> None:
    for key, rule in {**schema.SCHEMA, **schema.RECBOLE_SCHEMA, **schema.MODEL_SCHEMA}.items():
        with pytest.raises(ConfigError, match=f"property '{key}'"):
            rule.check(key, 3j)


def test_stage_only_needs_scratch_models() -> None:
    assert make(fwt_reference="stage_only")["scratch"] is True
    assert make()["scratch"] is False


# ---------------------------------------------------------------------------------------------- unknown keys


def test_a_slip_is_refused_and_another_key_is_kept_with_a_warning() -> None:
    with pytest.raises(ConfigError, match=r"unknown property 'n_stage'; did you mean 'n_stages'\?"):
        make(n_stage=3)
    with pytest.raises(ConfigError, match=r"unknown property 'n-stages'; did you mean 'n_stages'\?"):
        CLConfig("BPR", "ml-100k", args=["--n-stages=3"])
    with pytest.raises(ConfigError, match=r"unknown property 'learning_rat'; did you mean 'learning_rate'\?"):
        make(learning_rat=0.1)
    config = make(qqqq_wwww=3)
    assert config["qqqq_wwww"] == 3
    assert len(config.warnings) == 1
    assert "'qqqq_wwww'" in config.warnings[0]
    assert make().warnings == []
    with pytest.raises(ConfigError, match="named by strings"):
        CLConfig("BPR", "ml-100k", config_dict={1: 2})


def test_keys_of_recbole_are_known() -> None:
    keys = {"n_heads": 2, "reg_weight": 0.1, "numerical_features": [], "log_wandb": False, "nproc": 1}
    assert make(**keys).warnings == []


# ---------------------------------------------------------------------------------------------- datasets


def test_where_a_dataset_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"dataset 'shop' was not found.*shop\.inter.*dataset/shop"):
        make(dataset="shop")
    local = write_log(tmp_path / "dataset")
    assert make(dataset="shop")["data_path"] == str(local)
    variable = write_log(tmp_path / "variable")
    monkeypatch.setenv("RECBOLE_CL_DATA", str(tmp_path / "variable"))
    assert make(dataset="shop")["data_path"] == str(variable)
    explicit = write_log(tmp_path / "explicit")
    assert make(dataset="shop", data_path=str(tmp_path / "explicit"))["data_path"] == str(explicit)
    assert make(dataset="shop", data_path=str(explicit))["data_path"] == str(explicit)
    (tmp_path / "empty").mkdir()
    config = make(dataset="shop", data_path=str(tmp_path / "empty"))
    assert config["data_path"] == str(variable)
    assert "is not in data_path" in config.warnings[0]
    own = write_log(tmp_path / "own", "ml-100k")
    assert make(data_path=str(tmp_path / "own"))["data_path"] == str(own)
    assert list_datasets() == ["ml-100k", "shop"]
    assert "ml-100k" in list_datasets(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="did you mean 'shop'"):
        make(dataset="shopp")
    for name in ("../shop", "a/b", "..", ""):
        with pytest.raises(ConfigError, match=r"is not a name|no dataset"):
            find_dataset(name)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("utf-8-sig", r"begins with a byte order mark.*set encoding: utf-8-sig"),
        ("utf-16", r"set encoding to what it is written in, such as utf-16"),
        ("latin-1", r"set encoding to what it is written in, such as latin-1"),
    ],
)
def test_a_log_in_another_encoding_names_one_to_try(written: str, words: str, tmp_path: Path) -> None:
    header = "user_id:token\titem_id:token\ttimestamp:float\tcaf\u00e9:token"
    folder = write_log(tmp_path, header=header)
    (folder / "shop.inter").write_text(f"{header}\n1\t1\t1\t1\n", encoding=written)
    with pytest.raises(ConfigError, match=words):
        make(dataset="shop", data_path=str(tmp_path))
    config = make(dataset="shop", data_path=str(tmp_path), encoding=written)
    assert config.log_files.columns[-1] == "caf\u00e9"


def test_columns_that_a_stream_needs_are_loaded(tmp_path: Path) -> None:
    header = "user_id:token\titem_id:token\ttimestamp:float\tweek:float\tprice:float"
    write_log(tmp_path, "weeks", header)
    config = make(dataset="weeks", data_path=str(tmp_path), period_field="week")
    assert config["load_col"] == {"inter": ["user_id", "item_id", "timestamp", "week"]}
    config = make(dataset="weeks", data_path=str(tmp_path), load_col={"inter": ["user_id", "item_id", "price"]})
    assert config["load_col"] == {"inter": ["user_id", "item_id", "price", "timestamp"]}
    assert make(dataset="weeks", data_path=str(tmp_path), load_col=None)["load_col"] is None
    for key, value in (
        ("period_field", "weak"),
        ("USER_ID_FIELD", "user"),
        ("load_col", {"inter": ["user_id", "item_id", "prize"]}),
        ("threshold", {"rating": 4}),
    ):
        with pytest.raises(ConfigError, match=f"property '{key}' names .*no column of weeks.inter"):
            make(dataset="weeks", data_path=str(tmp_path), **{key: value})
    write_log(tmp_path, "bare", "user_id,item_id")
    with pytest.raises(ConfigError, match="field_separator"):
        make(dataset="bare", data_path=str(tmp_path))
    with pytest.raises(ConfigError, match="benchmark_filename"):
        make(dataset="weeks", data_path=str(tmp_path), benchmark_filename=["a", "b", "c"])
    with pytest.raises(ConfigError, match=r"no file\s+weeks\.kg"):
        make("CKE", "weeks", data_path=str(tmp_path))


@pytest.mark.parametrize("file", sorted(p.stem for p in (properties_dir() / "dataset").glob("*.yaml")))
def test_dataset_properties_load(file: str, tmp_path: Path) -> None:
    values = read_properties(properties_dir() / "dataset" / f"{file}.yaml")
    columns = values.get("load_col", {}).get("inter", ["user_id", "item_id", "timestamp"])
    write_log(tmp_path, file, "\t".join(f"{c}:token" if c.endswith("_id") else f"{c}:float" for c in columns))
    config = make(dataset=file, data_path=str(tmp_path))
    assert "timestamp" in config["load_col"]["inter"]
    assert not config["normalize_all"]
    if file == "diginetica-weeks":
        assert (config["USER_ID_FIELD"], config["period_field"]) == ("session_id", "period")


def test_context_model_without_labels_learns_from_sampled_negatives(tmp_path: Path) -> None:
    write_log(tmp_path)
    config = make("DeepFM", "shop", data_path=str(tmp_path))
    assert config["train_neg_sample_args"]["distribution"] == "uniform"
    assert config["eval_args"]["mode"] == {"valid": "uni100", "test": "uni100"}
    assert config["valid_neg_sample_args"] == {"distribution": "uniform", "sample_num": 100}
    assert (config["metrics"], config["valid_metric"]) == RANKING
    assert config["MODEL_INPUT_TYPE"] == InputType.POINTWISE
    assert "no labels" in config.warnings[0]
    config = make("DeepFM", "shop", data_path=str(tmp_path), metrics=["AUC"], valid_metric="AUC")
    assert config["metrics"] == ["AUC"]
    write_log(tmp_path, "clicks", "user_id:token\titem_id:token\ttimestamp:float\tlabel:float")
    config = make("DeepFM", "clicks", data_path=str(tmp_path))
    assert config["eval_args"]["mode"]["test"] == "labeled"
    assert (config["metrics"], config["valid_metric"]) == VALUE
    assert "label" in config["load_col"]["inter"]


# ---------------------------------------------------------------------------------------------- what follows


@pytest.mark.parametrize(
    ("model", "choice", "recbole", "items"),
    [
        ("SASRec", "auto", True, True),
        ("SASRec", False, True, False),
        ("SASRec", "false", True, False),
        ("SASRec", True, True, True),
        ("BPR", "auto", False, False),
        ("BPR", True, True, True),
        ("BPR", "True", True, True),
        ("DeepFM", "auto", False, False),
        ("CKE", "auto", False, False),
    ],
)
def test_repeatable(model: str, choice: Any, recbole: bool, items: bool) -> None:
    config = make(model, repeatable=choice)
    assert config["repeatable"] is recbole
    assert config.repeatable_items is items
    assert config.fingerprint()["repeatable_items"] is items


def test_cross_entropy_has_no_negative_samples() -> None:
    for model in ("SASRec", "GRU4Rec", "Caser", "SINE"):
        assert make(model)["train_neg_sample_args"]["distribution"] == "none"
    assert make("SASRec", train_neg_sample_args=None)["train_neg_sample_args"]["distribution"] == "none"
    assert make("SASRec", loss_type="BPR")["train_neg_sample_args"]["distribution"] == "uniform"
    assert make("SASRec", loss_type="BPR")["MODEL_INPUT_TYPE"] == InputType.PAIRWISE
    with pytest.raises(ConfigError, match=r"'train_neg_sample_args' is .*'SASRec' has loss_type 'CE'"):
        make("SASRec", train_neg_sample_args={"distribution": "uniform", "sample_num": 1})


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ({"metrics": ["NDCGG"]}, r"unknown metric 'NDCGG' in property 'metrics'; did you mean 'NDCG'"),
        ({"metrics": ["NDCG", "AUC"]}, "keep one kind"),
        ({"metrics": ["Recall"]}, r"'valid_metric' is 'NDCG@10', but property 'metrics' is \['Recall'\]"),
        ({"topk": [5]}, r"'valid_metric' is 'NDCG@10'.*ndcg@5|NDCG@5"),
        ({"valid_metric": "NDCG"}, "set it to one of them"),
        ({"metrics": ["AUC"], "valid_metric": "AUC"}, "'labeled' or 'uni100'"),
        ({"eval_args": {"mode": "labeled"}}, "'full' or 'uni100'"),
        ({"eval_args": {"mode": "unix"}}, "mode 'unix'"),
        ({"eval_args": {"mode": {"valid": "full", "test": "sampled"}}}, "mode 'sampled'"),
        ({"train_neg_sample_args": {"distribution": "normal"}}, "uniform or popularity"),
        ({"train_neg_sample_args": 5}, "sample_num: 1"),
    ],
)
def test_tasks_that_make_no_sense(properties: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**properties)


def test_metrics_as_recbole_takes_them() -> None:
    config = make(
        metrics="NDCG", topk=5, valid_metric="NDCG@5", eval_args={"mode": {"valid": "uni100", "test": "full"}}
    )
    assert (config["metrics"], config["topk"], config["valid_metric_bigger"]) == (["NDCG"], [5], True)
    assert config["eval_args"]["mode"] == {"valid": "uni100", "test": "full"}
    config = make("DeepFM", valid_metric="LogLoss")
    assert config["valid_metric_bigger"] is False
    assert {"NDCG", "AUC", "GAUC", "ItemCoverage"} <= set(list_metrics())


def test_intervals_stay_text(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("user_inter_num_interval: [5,10]\n")
    assert CLConfig("BPR", "ml-100k", [file])["user_inter_num_interval"] == "[5,10]"
    assert make(item_inter_num_interval="[5,10]")["item_inter_num_interval"] == "[5,10]"


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = make(use_gpu=True)
    assert config["device"] == torch.device("cpu")
    assert "no CUDA device" in config.warnings[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert make()["device"] == torch.device("cpu")
    assert make(use_gpu=True)["device"] == torch.device("cuda", 0)
    assert make(use_gpu=True, gpu_id=1)["device"] == torch.device("cuda", 1)
    assert make(use_gpu=True, gpu_id="")["device"] == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"'gpu_id' is 7, .*0 to 1"):
        make(use_gpu=True, gpu_id=7)


# ---------------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_is_json_and_the_same_for_the_same_run() -> None:
    for model in ("BPR", "SASRec", "DeepFM"):
        one, two = make(model).fingerprint(), make(model).fingerprint()
        assert one == two == json.loads(json.dumps(one, allow_nan=False))
        assert one["device"] == "cpu"
        assert one["seed"] == 2020
    forms = [
        make(strategy={"DummyAnchor": {"lambda": 2.0}}),
        make(strategy="DummyAnchor", anchor_lambda=2.0),
        make(strategy=["dummyanchor"], anchor_lambda=2.0),
    ]
    assert forms[0].fingerprint() == forms[1].fingerprint() == forms[2].fingerprint()
    assert make(seed=1).fingerprint() != make(seed=2).fingerprint()
    odd = make(qqqqq={"a": (1, torch.tensor([1.5])), "b": Path("x"), "c": {3, 1}, "d": object(), "e": float("nan")})
    fingerprint = odd.fingerprint()["qqqqq"]
    assert fingerprint == {"a": [1, [1.5]], "b": "x", "c": [1, 3], "d": "object", "e": "nan"}


def test_what_a_resumed_run_may_change_changes_no_number() -> None:
    may = CLConfig.RESUME_MAY_CHANGE
    assert {"resume", "output_dir", "show_progress", "state", "data_path", "checkpoint_steps", "checkpoint_keep"} <= may
    numbers = {
        "seed",
        "epochs",
        "device",
        "use_gpu",
        "learning_rate",
        "eval_batch_size",
        "strategy",
        "n_stages",
        "worker",
    }
    assert not may & (
        numbers
        | (
            set(schema.SCHEMA)
            - {"resume", "output_dir", "checkpoint_steps", "checkpoint_keep", "data_path", "text_cache", "serve"}
        )
    )
