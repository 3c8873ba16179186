"""Logs that cannot be cut, or not without saying something: each message names the field, the count and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from recbole.data.dataset import Dataset
from stream_helpers import LOAD, configure, random_rows, stream_of, write

from recbole_cl.config import CLConfig
from recbole_cl.errors import ConfigError, DataError
from recbole_cl.stream.batch import Batcher
from recbole_cl.stream.build import build_stream
from recbole_cl.stream.quality import check_timestamps, date
from recbole_cl.stream.reader import fast_reader

ROWS = [(f"u{k % 5}", f"i{k % 9}", 100 + k) for k in range(60)]


def refused(folder: Path, rows: list[Any], told: str, kind: type = DataError, **properties: Any) -> None:
    write(folder, rows)
    with pytest.raises(kind, match=told):
        stream_of(folder, model="BPR", **properties)


def warned(stream: Any, *words: str) -> None:
    assert any(all(word in told for word in words) for told in stream.warnings), stream.warnings


def at(values: dict[int, Any]) -> list[tuple[str, str, Any]]:
    """The log with some timestamps replaced."""
    return [(u, i, values.get(k, t)) for k, (u, i, t) in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("value", "word"), [("", "NaN or not a number"), ("nan", "NaN"), ("inf", "infinite"), ("-inf", "infinite")]
)
def test_timestamps_that_are_none(tmp_path: Path, value: str, word: str) -> None:
    refused(
        tmp_path, at({3: value, 7: value}), rf"TIME_FIELD: 2 values of 'timestamp' are {word}.* line 5, 9 of .*remove"
    )


def test_the_line_is_that_of_the_file_also_after_filtering(tmp_path: Path) -> None:
    rows = at({7: "nan"})
    rows[2] = ("", "i1", 5)  # dropped: no user
    refused(tmp_path, rows, "TIME_FIELD: 1 values .* line 9 of")


def test_words_are_no_timestamps(tmp_path: Path) -> None:
    write(tmp_path, at({4: "noon"}), "user_id:token\titem_id:token\ttimestamp:token")
    with pytest.raises(
        DataError, match=r"TIME_FIELD: 1 values of 'timestamp' are NaN or not a number .* line 6 .* in seconds"
    ):
        stream_of(tmp_path, model="BPR")
    write(tmp_path, at({4: "noon"}))  # a column of floats is refused by the reader, with RecBole's own words
    with pytest.raises(DataError, match="timestamp:float"):
        stream_of(tmp_path, model="BPR")


def test_all_times_equal(tmp_path: Path) -> None:
    refused(
        tmp_path, at(dict.fromkeys(range(60), 4)), "TIME_FIELD: all 60 values of 'timestamp' equal 4.*choose another"
    )


@pytest.mark.parametrize("field", ["when", "timestamp"])
def test_a_time_field_that_is_missing(tmp_path: Path, field: str) -> None:
    write(tmp_path, ROWS, "user_id:token\titem_id:token\tclock:float")
    config_error = "property 'TIME_FIELD'|property 'load_col'|TIME_FIELD: '" + field + "' is no column"
    with pytest.raises((ConfigError, DataError), match=config_error):
        stream_of(tmp_path, model="BPR", TIME_FIELD=field, load_col={"inter": ["user_id", "item_id", "clock"]})
    frame = pd.DataFrame({"user_id": [1], "clock": [2]})
    with pytest.raises(
        DataError, match=r"TIME_FIELD: None is no column of the interactions \(user_id, clock\); set TIME_FIELD"
    ):
        check_timestamps(frame, None)
    _, stream = stream_of(
        tmp_path, model="BPR", TIME_FIELD="clock", load_col={"inter": ["user_id", "item_id", "clock"]}
    )
    assert len(stream.table) == 60


def test_negative_times_are_counted_and_keep_their_order(tmp_path: Path) -> None:
    write(tmp_path, [(u, i, t - 130) for u, i, t in ROWS])
    _, stream = stream_of(tmp_path, model="BPR")
    warned(stream, "TIME_FIELD: 30 of 60 values of 'timestamp' are negative", "time_range")
    assert stream.table.timestamp.tolist() == [t - 130 for _, _, t in ROWS]


def test_far_off_times(tmp_path: Path) -> None:
    rows = [(f"u{k % 9}", f"i{k % 11}", 1_000_000_000 + 1000 * k) for k in range(1000)]
    far = [("u1", "i1", -400_000_000), ("u2", "i2", 315_532_800)]
    write(tmp_path, far + rows)
    _, stream = stream_of(tmp_path, model="BPR")
    warned(
        stream,
        "TIME_FIELD: 2 of 1002 timestamps lie far outside the bulk",
        "1957-04-29",
        "time_range: [1000000000, 1000999000]",
    )
    with pytest.raises(DataError, match=r"stage 2 \(slice 2\) holds no interaction; .*stage_by: count.*time_range"):
        stream_of(tmp_path, model="BPR", stage_by="time", n_stages=5)
    _, stream = stream_of(tmp_path, model="BPR", stage_by="time", time_range=[1000000000, 1000999000])  # as advised
    assert len(stream.table) == 1000 and len(stream) == 3
    warned(stream, "time_range: 2 of 1002 interactions are left out")
    assert not any("far outside" in told for told in stream.warnings[1:])


def test_far_off_begins_two_spans_beyond_the_bulk() -> None:
    bulk = np.arange(1000.0)  # 1st to 99th percentile: about 980
    for outside, told in ((2500.0, False), (3100.0, True), (-1500.0, False), (-2100.0, True)):
        _, warnings = check_timestamps(pd.DataFrame({"t": np.r_[bulk, outside]}), "t")
        assert any("1 of 1001 timestamps lie far outside" in text for text in warnings) == told, outside


def test_time_range_by_dates_is_closed(tmp_path: Path) -> None:
    day = 86400
    write(tmp_path, [("u1", f"i{k % 4}", k * day) for k in range(30)] + [("u2", "i1", 3)])
    _, stream = stream_of(tmp_path, model="BPR", time_range=["1970-01-03", "1970-01-20"])
    assert (stream.table.timestamp.min(), stream.table.timestamp.max(), len(stream.table)) == (2 * day, 19 * day, 18)
    with pytest.raises(DataError, match=r"time_range: no interaction lies in .*the log spans 0 to 2505600"):
        stream_of(tmp_path, model="BPR", time_range=["2001-01-01", "2002-01-01"])


def test_fractions_of_seconds_are_kept(tmp_path: Path) -> None:
    write(tmp_path, [(u, i, 1_600_000_000 + k / 100) for k, (u, i, _) in enumerate(ROWS)])
    config, stream = stream_of(tmp_path, model="BPR")
    assert stream.table.time_scale == 1_000_000
    assert len(np.unique(stream.table.timestamp)) == 60 and (np.diff(stream.table.timestamp) >= 9999).all()
    batch = Batcher(config, stream, stream.dataset, 9, 9).rows(stream.stages[0].train)
    assert len(batch["timestamp"].unique()) == 1  # what RecBole would have to tell them apart
    assert len(batch["_timestamp"].unique()) == len(batch)


def test_times_that_do_not_fit(tmp_path: Path) -> None:
    refused(tmp_path, at({59: "1e20"}), "TIME_FIELD: 1e\\+20 does not fit into 64 bits; use seconds", n_stages=1)


def test_coarse_clocks_are_counted(tmp_path: Path) -> None:
    write(tmp_path, [(u, i, t // 20) for u, i, t in ROWS])
    _, stream = stream_of(tmp_path, model="BPR", n_stages=2)
    warned(stream, "57 of 60 interactions share their timestamp", "coarse clock")


def test_more_stages_than_the_log_allows(tmp_path: Path) -> None:
    refused(
        tmp_path, ROWS, "n_stages: 61 slices were asked of 60 interactions; lower n_stages to at most 6", n_stages=61
    )
    refused(tmp_path, at(dict.fromkeys(range(50), 4)), r"stage 2 \(slice 2\) holds no interaction; lower n_stages")
    refused(
        tmp_path, ROWS, r"stage 1 \(before 10\) holds no interaction; move the boundaries",
        scheduler="Boundaries", boundaries=[10, 120], n_stages=None,
    )  # fmt: skip
    whale = [("whale", f"i{k % 9}", k) for k in range(55)] + [(f"u{k}", "i1", 60 + k) for k in range(5)]
    refused(
        tmp_path,
        whale,
        r"stage 1 \(users 1\) holds no interaction; .*one of them may fill it",
        scheduler="UserDisjoint",
        base_ratio=0.2,
    )
    refused(tmp_path, ROWS[:10], "has no training target", stage_ratios=[0.01, 0.5, 0.49], n_stages=1)


def test_errors_of_a_scheduler_keep_their_kind(tmp_path: Path) -> None:
    refused(
        tmp_path,
        ROWS,
        "n_stages: 5 contradicts 1 boundaries",
        ConfigError,
        scheduler="Boundaries",
        boundaries=[120],
        n_stages=5,
    )
    refused(tmp_path, ROWS, "period_field: the scheduler Domains needs", ConfigError, scheduler="Domains")
    try:
        stream_of(tmp_path, model="BPR", scheduler="Domains")
    except DataError:
        pytest.fail("a wrong property is not the log's fault")
    except ConfigError:
        pass


def test_stages_without_targets_are_told(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    _, stream = stream_of(tmp_path, model="BPR", stage_ratios=[0.9, 0.1, 0])
    for k in (1, 2, 3):
        warned(stream, f"stage {k} (slice {k}) has no test target", "null")
    _, stream = stream_of(tmp_path, model="BPR", stage_ratios=[0.9, 0, 0.1])
    warned(stream, "stage 1 (slice 1) has no validation target", "all epochs run")
    _, stream = stream_of(tmp_path, model="BPR")
    assert stream.warnings == []


def test_nothing_is_left(tmp_path: Path) -> None:
    refused(
        tmp_path,
        ROWS,
        "none of its 60 interactions is left after filtering; loosen",
        user_inter_num_interval="[100,inf)",
    )
    refused(tmp_path, [], "holds no interaction, only its header")
    write(tmp_path, [("u77", 3)], "user_id:token\tage:float", "user")
    refused(
        tmp_path, ROWS, "none of its 60 .* filter_inter_by_user_or_item", load_col={**LOAD, "user": ["user_id", "age"]}
    )
    (tmp_path / "log" / "log.user").unlink()


def test_rows_without_features_are_dropped_and_counted_or_kept(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    write(tmp_path, [(f"i{k}", k) for k in range(8)], "item_id:token\tprice:float", "item")  # i8 is missing: 6 rows
    load = {**LOAD, "item": ["item_id", "price"]}
    _, stream = stream_of(tmp_path, model="BPR", load_col=load)
    assert len(stream.table) == 54
    warned(stream, "filter_inter_by_user_or_item: 6 of 60 interactions were dropped", ".item", "False to keep them")
    _, stream = stream_of(tmp_path, model="BPR", load_col=load, filter_inter_by_user_or_item=False)
    assert len(stream.table) == 60 and stream.warnings == []
    price = stream.dataset.item_feat["price"][int(stream.dataset.field2token_id["item_id"]["i8"])]
    assert price == 3.5  # the mean
    both = {"load_col": load, "val_interval": {"timestamp": "[100,149]"}}
    _, stream = stream_of(tmp_path, model="BPR", n_stages=2, **both)
    warned(stream, "filtering: 10 of 60 interactions", "val_interval")
    warned(stream, "filter_inter_by_user_or_item: 5 of 50")


def test_normalisation_of_what_is_no_number(tmp_path: Path) -> None:
    for field, told in (("user_id", "declares as 'token'"), ("price", "which is no column")):
        write(tmp_path, ROWS)
        with pytest.raises(ConfigError, match=f"'normalize_field' names '{field}', .*{told}"):
            configure(tmp_path, normalize_field=[field])
    refused(tmp_path, ROWS, "both set", normalize_field=["timestamp"], normalize_all=True)


def test_bounds_over_the_whole_log_are_told(tmp_path: Path) -> None:
    rows = [(u, i, t, t % 7) for u, i, t in ROWS]
    write(tmp_path, rows, "user_id:token\titem_id:token\ttimestamp:float\tdepth:float")
    load = {"inter": ["user_id", "item_id", "timestamp", "depth"]}
    _, stream = stream_of(
        tmp_path,
        model="BPR",
        load_col=load,
        numerical_features=["depth"],
        discretization={"depth": {"method": "ED", "bucket": 3}},
    )
    warned(stream, "discretization", "ED", "LD")


def test_nothing_is_downloaded(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    config = configure(tmp_path, model="BPR")
    config["data_path"] = str(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="does not exist; nothing is downloaded"):
        build_stream(config)


def test_dates_for_people() -> None:
    assert date(0) == "1970-01-01 00:00" and date(1.6e12) == "1.6e+12"


@pytest.mark.parametrize("quoted", [False, True])
def test_the_fast_reader_reads_what_recbole_reads(tmp_path: Path, quoted: bool) -> None:
    rng = np.random.default_rng(0)
    numbers = [
        *rng.random(300),
        *(rng.random(300) * 1e10),
        *(10 ** rng.uniform(-200, 200, 300)),
        0.1 + 0.2,
        "",
        "nan",
        "inf",
        "-5",
    ]
    names = ["plain", '"quo ted"', 'in "side"', " space ", "NA", "", "null", "#x", "é", "1.0", "007"]
    rows = [
        (names[k % len(names)] if quoted or '"' not in names[k % len(names)] else "x", f"i{k}", v, "a b  c")
        for k, v in enumerate(numbers)
    ]
    write(tmp_path, rows, "user_id:token\titem_id:token\ttimestamp:float\twords:token_seq")
    config = CLConfig(model="BPR", dataset="log", config_dict={"data_path": str(tmp_path), "load_col": {"inter": "*"}})
    reader = object.__new__(Dataset)
    from logging import getLogger

    reader.config, reader.logger = config, getLogger()
    frames = []
    for fast in (False, True):
        reader.field2type, reader.field2source, reader.field2seqlen, reader.field2bucketnum = {}, {}, {}, {}
        if fast:
            with fast_reader():
                frames.append(reader._load_feat(str(tmp_path / "log" / "log.inter"), "inter"))
        else:
            frames.append(reader._load_feat(str(tmp_path / "log" / "log.inter"), "inter"))
    words = [[list(value) for value in frame.pop("words")] for frame in frames]
    pd.testing.assert_frame_equal(*frames, check_exact=True)
    assert words[0] == words[1] and words[0][0] == ["a", "b", "c"]
    assert frames[0]["timestamp"].isna().sum() == 2 and frames[0]["user_id"].isna().any()


def test_the_fast_reader_loads_ml_100k_as_recbole_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import recbole.data.dataset.dataset as module

    engines = []
    read_csv = pd.read_csv
    monkeypatch.setattr(pd, "read_csv", lambda *a, **k: engines.append(k["engine"]) or read_csv(*a, **k))
    load = {"inter": "*", "user": "*", "item": "*"}
    plain = Dataset(configure(None, model="BPR", dataset="ml-100k", load_col=load))
    assert engines == ["python"] * 3
    with fast_reader():
        fast = Dataset(configure(None, model="BPR", dataset="ml-100k", load_col=load))
    assert engines[3:] == ["c"] * 3 and module.pd is pd
    for name in ("inter_feat", "user_feat", "item_feat"):
        a, b = getattr(plain, name), getattr(fast, name)
        assert list(a.columns) == list(b.columns)
        for column in a:
            assert all(np.array_equal(x, y) for x, y in zip(a[column], b[column], strict=True)), column
    for field in plain.field2id_token:
        assert plain.field2id_token[field].tolist() == fast.field2id_token[field].tolist()
    assert plain.field2seqlen == fast.field2seqlen


def test_the_fast_reader_leaves_odd_files_to_the_slow_one(tmp_path: Path) -> None:
    write(tmp_path, [(u, i, "soon") for u, i, _ in ROWS[:3]])
    with pytest.raises(DataError, match="Unable to convert column timestamp:float"):
        stream_of(tmp_path, model="BPR")
    target = tmp_path / "log" / "log.inter"
    target.write_text(
        "user_id:token::item_id:token::timestamp:float\n" + "".join(f"{u}::{i}::{t}\n" for u, i, t in ROWS)
    )
    _, stream = stream_of(tmp_path, model="BPR", n_stages=2, field_separator="::")
    assert stream.table.timestamp.tolist() == [t for _, _, t in ROWS]


def test_unsorted_logs_give_the_same_stream(tmp_path: Path) -> None:
    rows = sorted({(u, i, t) for u, i, t in random_rows(300, span=10**6)}, key=lambda row: row[2])
    write(tmp_path, rows, name="sorted")
    write(tmp_path, [rows[k] for k in np.random.default_rng(0).permutation(len(rows))], name="mixed")
    one, two = (stream_of(tmp_path, dataset=name)[1] for name in ("sorted", "mixed"))
    assert len(np.unique(one.table.timestamp)) == len(rows)  # no ties, whose order the file decides
    assert one.fingerprint() == two.fingerprint()
    write(tmp_path, rows[:-1], name="shorter")
    assert stream_of(tmp_path, dataset="shorter")[1].fingerprint() != one.fingerprint()


@pytest.mark.parametrize(("ticks", "name"), [(1_000, "milliseconds"), (1_000_000, "microseconds")])
def test_faster_clocks_are_recognised_and_said(tmp_path: Path, ticks: int, name: str) -> None:
    """Dates, the stream and numbers of time_range and boundaries are those of the log in seconds."""
    start = 1_600_000_000
    rows = [(f"u{k % 5}", f"i{k % 9}", start + 3600 * k) for k in range(60)]
    write(tmp_path, rows, name="slow")
    write(tmp_path, [(u, i, t * ticks) for u, i, t in rows], name="fast")
    _, slow = stream_of(tmp_path, model="BPR", dataset="slow")
    _, fast = stream_of(tmp_path, model="BPR", dataset="fast")
    for column in ("user", "item", "timestamp"):
        assert np.array_equal(getattr(fast.table, column), getattr(slow.table, column)), column
    assert [len(s.train) for s in fast.stages] == [len(s.train) for s in slow.stages]
    assert slow.stages[0].start == fast.stages[0].start == start
    warned(fast, f"taken for {name} since 1970, from 2020-09-13 12:26")
    assert not slow.warnings
    cut = start + 3600 * 30
    for edge, bounds in (
        (cut, [cut - 3600 * 20, cut + 3600 * 60]),
        (cut * ticks, [(cut - 3600 * 20) * ticks, (cut + 3600 * 60) * ticks]),
        ("2020-09-14 18:26:40", ["2020-09-13 22:26:40", "2021-01-01"]),
    ):
        given = {"scheduler": "Boundaries", "boundaries": [edge], "n_stages": None, "time_range": bounds}
        _, found = stream_of(tmp_path, model="BPR", dataset="fast", **given)
        assert np.bincount(found.table.stage).tolist() == [20, 30]


def test_milliseconds_keep_their_fractions(tmp_path: Path) -> None:
    write(tmp_path, [(u, i, 1_600_000_000_123 + 7 * k) for k, (u, i, _) in enumerate(ROWS)])
    _, stream = stream_of(tmp_path, model="BPR")
    assert stream.table.time_scale == 1_000_000
    assert stream.table.timestamp.tolist() == [1_600_000_000_123_000 + 7000 * k for k in range(60)]


def test_times_before_the_year_1_have_no_date() -> None:
    from recbole_cl.report.text import moment

    assert date(-7e10) == "-7e+10" and moment(-7e10) == "-70000000000" and moment(1.6e9) == "2020-09-13"


RATED = "user_id:token\titem_id:token\ttimestamp:float\trating:float"
RATINGS = {"load_col": {"inter": ["user_id", "item_id", "timestamp", "rating"]}, "normalize_all": False}


def test_labels_outside_0_and_1_are_refused(tmp_path: Path) -> None:
    """Where RecBole's cross-entropy reads them, or AUC judges them; a threshold makes them labels."""
    write(tmp_path, [(u, i, t, 1 + t % 5) for u, i, t in ROWS], RATED)
    told = r"LABEL_FIELD: 'rating' holds 1 to 5, but FM learns by cross-entropy.*threshold: \{rating: 4\}"
    with pytest.raises(DataError, match=told):
        stream_of(tmp_path, model="FM", LABEL_FIELD="rating", metrics=["RMSE"], valid_metric="RMSE", **RATINGS)
    _, stream = stream_of(tmp_path, model="FM", threshold={"rating": 4}, **RATINGS)
    assert set(stream.dataset.inter_feat["label"].tolist()) == {0.0, 1.0}
    sampled = {"distribution": "uniform", "sample_num": 1}
    labelled = {"mode": {"valid": "labeled", "test": "labeled"}}
    given = {"LABEL_FIELD": "rating", "train_neg_sample_args": sampled, "eval_args": labelled, **RATINGS}
    with pytest.raises(DataError, match="metrics: AUC judge labels that are 0 or 1, but 'rating' holds 1 to 5"):
        stream_of(tmp_path, model="FM", metrics=["AUC"], valid_metric="AUC", **given)
    stream_of(tmp_path, model="FM", metrics=["RMSE"], valid_metric="RMSE", **given)  # its labels are the samples'
    stream_of(tmp_path, model="BPR", LABEL_FIELD="rating", **RATINGS)  # which reads none


def test_a_loss_of_another_package_may_learn_from_ratings(tmp_path: Path) -> None:
    from recbole.model.context_aware_recommender import FM

    class Squares(FM):
        def calculate_loss(self, interaction: Any) -> Any:
            return ((self.forward(interaction) - interaction[self.LABEL]) ** 2).mean()

    write(tmp_path, [(u, i, t, 1 + t % 5) for u, i, t in ROWS], RATED)
    given = {"LABEL_FIELD": "rating", "metrics": ["RMSE"], "valid_metric": "RMSE", **RATINGS}
    assert len(stream_of(tmp_path, model=Squares, **given)[1].table) == 60


@pytest.mark.parametrize(("model", "given"), [("BPR", {}), ("SASRec", {"loss_type": "BPR"}), ("LightGCN", {})])
def test_a_pairwise_loss_needs_negatives(tmp_path: Path, model: str, given: dict[str, Any]) -> None:
    write(tmp_path, ROWS)
    with pytest.raises(ConfigError, match=rf"'train_neg_sample_args' is None, but model '{model}' compares.*uniform"):
        configure(tmp_path, model=model, train_neg_sample_args=None, **given)
    configure(tmp_path, model="MultiVAE", train_neg_sample_args=None)  # pairwise by type; it compares with nothing


@pytest.mark.parametrize("keep", ["first", "last"])
def test_repeats_of_one_time_are_dropped_in_the_order_of_the_file(tmp_path: Path, keep: str) -> None:
    """Thousands of ties, which an unstable sort would shuffle: the first, or last, row of the file stays."""
    rng = np.random.default_rng(0)
    rows = [(f"u{rng.integers(40)}", f"i{rng.integers(30)}", int(rng.integers(40)), n) for n in range(3000)]
    write(tmp_path, rows, "user_id:token\titem_id:token\ttimestamp:float\tnumber:float")
    _, stream = stream_of(
        tmp_path,
        model="BPR",
        rm_dup_inter=keep,
        load_col=None,
        n_stages=2,
        normalize_all=False,
        user_inter_num_interval=None,
    )
    kept: dict[tuple[str, str], int] = {}
    for user, item, _, number in sorted(rows, key=lambda row: row[2]):
        if keep == "last" or (user, item) not in kept:
            kept[user, item] = number
    assert sorted(stream.dataset.inter_feat["number"].tolist()) == sorted(kept.values())


@pytest.mark.parametrize(("separator", "named"), [(",", "','"), (";", "';'"), ("|", r"'\|'")])
def test_fields_with_another_separator_are_named(tmp_path: Path, separator: str, named: str) -> None:
    write(tmp_path, ROWS)
    file = tmp_path / "log" / "log.inter"
    file.write_text(file.read_text().replace("\t", separator))
    with pytest.raises(ConfigError, match=rf"'field_separator' is '\\t', .* set field_separator: {named}"):
        stream_of(tmp_path, model="BPR")
    _, stream = stream_of(tmp_path, model="BPR", n_stages=2, field_separator=separator)
    assert len(stream.table) == len(ROWS)
