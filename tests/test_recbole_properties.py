"""What becomes of each property that RecBole documents: the table of answers is complete and true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recbole.utils import argument_list

from recbole_cl import run_recbole_cl
from recbole_cl.config import RECBOLE, CLConfig, read_properties
from recbole_cl.config.recbole_properties import ANSWERS, FORMER, REFUSED, UNREAD, answer_of, defaults_of_recbole
from recbole_cl.errors import ConfigError, DataError

FILES = (RECBOLE / "properties" / "overall.yaml", RECBOLE / "properties" / "dataset" / "sample.yaml")
LOG = {"inter": ["user_id", "item_id", "timestamp", "rating"], "item": ["item_id", "kind", "price", "tags"]}


def make(model: str = "BPR", **properties: Any) -> CLConfig:
    return CLConfig(model, "ml-100k", config_dict=properties)


@pytest.fixture
def log(tmp_path: Path) -> dict[str, Any]:
    """Sixty rated interactions of six users with ten items, of which three kinds and a price are known."""
    folder = tmp_path / "shop"
    folder.mkdir()
    rows = [f"u{n % 6}\ti{(n * n + n // 6) % 10}\t{1000 + n}\t{1 + n % 5}" for n in range(60)]
    (folder / "shop.inter").write_text(
        "\n".join(["user_id:token\titem_id:token\ttimestamp:float\trating:float", *rows]) + "\n"
    )
    items = [f"i{n}\tk{n % 3}\t{n * 1.5}\ta b{n % 2} c" for n in range(10)]
    (folder / "shop.item").write_text(
        "\n".join(["item_id:token\tkind:token\tprice:float\ttags:token_seq", *items]) + "\n"
    )
    return {
        **{"data_path": str(tmp_path), "output_dir": str(tmp_path / "run"), "n_stages": 2, "epochs": 1, "topk": [3]},
        **{"metrics": ["NDCG"], "valid_metric": "NDCG@3", "embedding_size": 8, "show_progress": False, "saved": False},
    }


def walk(model: str, log: dict[str, Any], **properties: Any) -> dict[str, Any]:
    return run_recbole_cl(model, "shop", config_dict={**log, **properties})


def test_every_documented_property_has_an_answer() -> None:
    documented = {key for file in FILES for key in read_properties(file)}
    documented |= {k for n in dir(argument_list) if n.endswith("_arguments") for k in getattr(argument_list, n)}
    answered = [key for answers in ANSWERS.values() for key in answers]
    assert documented <= set(answered)
    assert len(answered) == len(set(answered))
    # What has an answer without a default in RecBole's files is read by its code, or set by those who start it.
    others = set(answered) - documented
    assert others == {"encoding", "nproc", "world_size", "ip", "port", "offset", "local_rank", "single_spec"}
    assert not FORMER.keys() & set(answered)


@pytest.mark.parametrize("key", [k for a in ANSWERS.values() for k, answer in a.items() if answer.kind == REFUSED])
def test_what_is_refused_says_why(key: str) -> None:
    answer = answer_of(key)
    assert answer is not None and answer.example is not None
    with pytest.raises(ConfigError) as caught:
        make(**{key: answer.example})
    assert str(caught.value) == f"property {key!r} is {answer.example!r}, which nothing here reads: {answer.note}"
    for value in (defaults_of_recbole().get(key), *answer.default, None):
        assert make(**{key: value}).warnings == []


@pytest.mark.parametrize("key", [k for a in ANSWERS.values() for k, answer in a.items() if answer.kind == UNREAD])
def test_what_nothing_reads_is_told(key: str) -> None:
    answer = answer_of(key)
    assert answer is not None
    assert make(**{key: answer.example}).warnings == [f"property {key!r} has no effect: {answer.note}"]
    assert make(**{key: defaults_of_recbole()[key]}).warnings == []


@pytest.mark.parametrize("key", FORMER)
def test_former_names_tell_todays(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key!r} is of an earlier RecBole") as caught:
        make(**{key: 5})
    assert str(caught.value).endswith(FORMER[key])


IDLE = [
    ("BPR", {"eval_args": {"split": {"RS": [0.5, 0.3, 0.2]}}}, r"set stage_split and stage_ratios"),
    ("SASRec", {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO"}}, r"stage_split: leave_one_out"),
    ("BPR", {"eval_args": {"group_by": "none"}, "stage_split": "user_tail"}, r"goes by user"),
    ("BPR", {"eval_args": {"splitt": {"RS": [0.8, 0.1, 0.1]}}}, r"it must be a dict of mode"),
    ("BPR", {"eval_args": {"order": "OT"}}, r"order \(TO or RO\)"),
    ("BPR", {"valid_metric_bigger": False}, r"follows from valid_metric 'NDCG@10', of which more is better"),
    ("BPR", {"threshold": {"rating": 4}}, r"takes every interaction for a positive; .*\{rating: '\[4,inf"),
    ("SASRec", {"threshold": {"rating": 4}}, r"SASRec takes every interaction for a positive"),
    ("NeuMF", {"threshold": {"rating": 4}}, r"where negatives are sampled \(train_neg_sample_args\)"),
    ("BPR", {"require_pow": True}, r"which model 'BPR' does not read"),
    ("BPR", {"preload_weight": {"iid": "vector"}}, r"which model 'BPR' does not read"),
    ("BPR", {"transform": "crop_itemseq"}, r"changes sequences, and BPR reads none"),
    ("SASRec", {"transform": "crop_itemseq", "eta": 0.2}, r"set train_positions: last"),
    ("SASRec", {"transform": "crop_itemseq", "train_positions": "last"}, r"needs property 'eta'"),
    ("SASRec", {"transform": "user_defined"}, r"does nothing"),
    ("BPR", {"ITEM_LIST_LENGTH_FIELD": ""}, r"a text"),
    ("SASRec", {"ITEM_LIST_LENGTH_FIELD": "rating"}, r"is a column of ml-100k"),
    ("BPR", {"alias_of_item_id": ["user_id"], "load_col": None}, r"set vocabulary: global"),
    ("BPR", {"alias_of_item_id": ["rating"]}, r"declares as 'float'; it must be a column of type token"),
    ("BPR", {"val_interval": {"ratin": "[4,5]"}}, r"did you mean 'rating'"),
    ("BPR", {"seq_len": {"movie_title": 3}}, r"not loaded; add it to the list 'item' of load_col"),
    ("BPR", {"normalize_field": ["release_year"]}, r"declares as 'token'"),
    ("BPR", {"numerical_features": ["rating", "age"]}, r"'age', which .user declares as 'token'"),
    ("BPR", {"discretization": {"rating": {"method": "ED"}}}, r"bucket: 10"),
    ("BPR", {"discretization": {"rating": {"method": "LD"}}}, r"add it to numerical_features: \[rating\]"),
    ("BPR", {"unused_col": {"inter": ["timestamp"]}}, r"'timestamp' \(TIME_FIELD\) is needed"),
    ("BPR", {"unload_col": {"inter": ["item_id"]}}, r"'item_id' \(ITEM_ID_FIELD\) is needed"),
    ("BPR", {"unload_col": {"inter": ["rating"]}}, r"set load_col: ~ to load all other columns"),
    ("BPR", {"additional_feat_suffix": ["user"], "load_col": {"inter": ["user_id"]}}, None),
    ("BPR", {"RATING_FIELD": "stars"}, r"names 'stars', which is no column"),
    ("BPR", {"rm_dup_inter": "any"}, r"one of 'first', 'last'"),
    *(
        ("BPR", {"train_neg_sample_args": {"distribution": "uniform", **wrong}}, r"sample_num: 1\}")
        for wrong in (
            {"sample_num": 0}, {"sample_num": 1.5}, {"sample_num": "none"}, {"sample_num": None}, {"samplenum": 2},
            {"sample_num": 10**18}, {"alpha": 0.5}, {"dynamic": True}, {"dynamic": "yes", "candidate_num": 3},
            {"candidate_num": 3}, {"dynamic": True, "candidate_num": -2},
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "properties", "told"), IDLE)
def test_what_would_have_no_effect_is_refused(model: str, properties: dict[str, Any], told: str | None) -> None:
    if told is None:
        make(model, **properties)
        return
    with pytest.raises(ConfigError, match=told):
        make(model, **properties)


def test_what_says_the_same_as_the_stream_is_no_contradiction() -> None:
    make(eval_args={"split": {"RS": [0.8, 0.1, 0.1]}, "group_by": "user", "order": "RO", "mode": "full"})
    make(eval_args={"split": {"RS": [0.7, 0.2, 0.1]}, "order": "TO"}, stage_ratios=[0.7, 0.2, 0.1])
    make("SASRec", eval_args={"split": {"LS": "valid_and_test"}, "order": "TO"}, stage_split="leave_one_out")
    make("LightGCN", require_pow=True)
    make("DeepFM", threshold={"rating": 3})
    make("BPR", threshold={"rating": 3}, eval_args={"mode": "labeled"}, metrics=["AUC"], valid_metric="AUC")
    make("SASRec", transform="crop_itemseq", eta=0.5, train_positions="last")
    assert make(kg_reverse_r=True).warnings == ["property 'kg_reverse_r' has no effect: BPR reads no knowledge graph"]


def test_the_liked_only(log: dict[str, Any]) -> None:
    """What the refusal of a threshold names does what it says, also where ratings are not loaded otherwise."""

    def interactions(result: dict[str, Any]) -> int:
        return sum(stage[f"n_{part}"] for stage in result["stages"] for part in ("train", "valid", "test"))

    assert interactions(walk("BPR", log)) == 60
    load = {"inter": ["user_id", "item_id", "timestamp"]}
    result = walk("SASRec", log, hidden_size=8, inner_size=8, load_col=load, val_interval={"rating": "[4,inf)"})
    assert interactions(result) <= 24  # first interactions of a user have no history, and are no targets
    assert any("36 of 60 interactions were dropped" in warning for warning in result["warnings"])


def test_labels_that_nobody_reads_are_counted(log: dict[str, Any]) -> None:
    file = Path(log["data_path"]) / "shop" / "shop.inter"
    head, *rows = file.read_text().splitlines()
    file.write_text(
        "\n".join([f"{head}\tlabel:float", *(f"{row}\t{n % 3 > 0:d}" for n, row in enumerate(rows))]) + "\n"
    )
    told = "LABEL_FIELD: 20 of 60 interactions have the label 0 (label), but {} takes every interaction for a positive"
    for model in ("BPR", "NeuMF"):
        assert any(told.format(model) in warning for warning in walk(model, log)["warnings"])
    result = walk("BPR", log, val_interval={"label": "[1,inf)"})
    assert not any("takes every" in warning for warning in result["warnings"])


def test_what_was_not_liked_is_no_target(log: dict[str, Any]) -> None:
    """A model that learns from labels is asked for what was liked only, where it ranks."""
    given = {"load_col": LOG, "threshold": {"rating": 4}, "mlp_hidden_size": [8], "stage_ratios": [0.4, 0.1, 0.5]}
    for mode in ("full", "uni3"):
        result = walk("DeepFM", log, eval_args={"mode": mode}, **given)
        rows = [line.split(",") for line in (Path(log["output_dir"]) / "records.csv").read_text().splitlines()]
        n, metric, t, s, stratum = (rows[0].index(name) for name in ("n", "metric", "t", "s", "stratum"))
        [tested] = {int(r[n]) for r in rows[1:] if (r[metric], r[t], r[s], r[stratum]) == ("ndcg@3", "0", "0", "all")}
        assert result["stages"][0]["n_test"] == 15
        assert tested == 4, "users of the six liked (18, 19, 23, 24, 28, 29) among the test targets 15 to 29"


def bad_values() -> list[tuple[str, str, Any]]:
    """Each property in the files of some of RecBole's models with values of other kinds than its default."""
    found = []
    for model in ("SASRec", "GRU4Rec", "Caser", "NARM", "BERT4Rec", "LightGCN", "NeuMF", "NCL", "DIEN", "SRGNN", "MKR"):
        for key, default in read_properties(RECBOLE / "properties" / "model" / f"{model}.yaml").items():
            text = default is None or (isinstance(default, str) and key not in ("hidden_act", "loss_type"))
            for value in ("x", {"a": 1}, ["a"], float("nan"), 10**18, -1, 2.5):
                number = isinstance(default, float) and isinstance(value, int | float) and value == value
                if key not in ("transform", "train_neg_sample_args") and not (text and value == "x") and not number:
                    found.append((model, key, value))
    return found


FITS = ("number", "integer", "True or False", "a text", "a list", "one of", "none of BPR, CE")


def test_values_of_another_kind_are_refused_for_models() -> None:
    """One line each, with property and value: 48 of them ended in bare exceptions of PyTorch's."""
    tried = 0
    for model, key, value in bad_values():
        with pytest.raises(ConfigError, match=f"{key}") as caught:
            make(model, **{key: value})
        assert repr(value) in str(caught.value) and any(words in str(caught.value) for words in FITS)
        tried += 1
    assert tried > 250


def test_what_a_model_dies_of_is_told_with_its_properties(log: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"model 'DGCF' cannot be made with .*n_factors: 4"):
        walk("DGCF", log, embedding_size=7, n_factors=4)
    with pytest.raises(ConfigError, match="mf_pretrain_path or mlp_pretrain_path: no file is named"):
        walk("NeuMF", log, use_pretrain=True)


def test_unused_columns_are_not_read(log: dict[str, Any]) -> None:
    """Of a column that is dropped after loading a model sees as little as of one that was not loaded."""
    given = {"threshold": {"rating": 4}, "metrics": ["AUC"], "valid_metric": "AUC", "mlp_hidden_size": [8]}
    whole = walk("DeepFM", log, load_col=LOG, **given)
    dropped = walk("DeepFM", log, load_col=LOG, unused_col={"item": ["kind"]}, **given)
    never = walk("DeepFM", log, load_col={**LOG, "item": ["item_id", "price", "tags"]}, **given)
    assert (
        dropped["matrix"] == never["matrix"] and dropped["curves"][0]["train_loss"] == never["curves"][0]["train_loss"]
    )
    assert whole["curves"][0]["train_loss"] != dropped["curves"][0]["train_loss"]


def test_metrics_are_rounded_where_it_is_asked_for(log: dict[str, Any]) -> None:
    exact, rounded = walk("BPR", log), walk("BPR", log, metric_decimal_place=2)
    values = [v for row in exact["matrix"]["ndcg@3"] for v in row if v is not None]
    assert any(round(v, 2) != v for v in values)
    assert [round(v, 2) for v in values] == [v for row in rounded["matrix"]["ndcg@3"] for v in row if v is not None]


def test_what_recbole_cannot_load_is_told(log: dict[str, Any]) -> None:
    (Path(log["data_path"]) / "shop" / "shop.vec").write_text("iid:token\tvector:float_seq\ni0\t0.1 0.2\n")
    given = {"threshold": {"rating": 4}, "metrics": ["AUC"], "valid_metric": "AUC"}
    with pytest.raises(DataError, match=r"RecBole cannot load it with these properties"):
        walk("DeepFM", log, additional_feat_suffix=["vec"], load_col={**LOG, "vec": "*"}, **given)
