"""Named formats on small files in each documented layout; features of items and users; drift; the health page."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from run_helpers import SMALL

from recbole_cl import cli
from recbole_cl.config import CLConfig, properties_dir
from recbole_cl.errors import ConfigError, DataError
from recbole_cl.importer import Columns, list_formats, read_format, read_log
from recbole_cl.importer.drift import by_chance, distance, drift, slices, suggested_stages, worth_trying
from recbole_cl.importer.page import gaps, health_page
from recbole_cl.stream.build import build_stream

FORMATS = properties_dir() / "import"
TITLE = 'Amélie, "the" fabulous\tdestiny'


def lines(*rows: Any) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def amazon_2018() -> tuple[dict[str, str], list[str]]:
    rows = [
        {"overall": 5.0, "verified": True, "reviewTime": "10 17, 2015", "reviewerID": "A1HP7NVNPFMA4N",
         "asin": "0700026657", "reviewerName": "Ambrosia075", "unixReviewTime": 1445040000},
        {"overall": 4.0, "reviewerID": "A1JGAP0185YJI6", "asin": "0700026657", "unixReviewTime": 1437955200},
    ]  # fmt: skip
    meta = [{"asin": "0700026657", "title": TITLE, "brand": "Reality Pump", "category": ["Video Games", "PC"],
             "price": "$37.98", "description": ["One.", "Two."]}, {"asin": "other", "title": "x"}]  # fmt: skip
    log = ["A1JGAP0185YJI6\t0700026657\t1437955200\t4.0", "A1HP7NVNPFMA4N\t0700026657\t1445040000\t5.0"]
    title = "Amélie, 'the' fabulous destiny"
    item = f"0700026657\t{title}\tReality Pump\tVideo Games PC\t37.98\tOne. Two."
    return {"file.json.gz": lines(*rows), "items.json.gz": lines(*meta)}, [*log, item]


def amazon_2023() -> tuple[dict[str, str], list[str]]:
    row = {"rating": 5.0, "title": "ok", "text": "", "images": [], "asin": "B00YQ6X8EO", "parent_asin": "B00YQ6X8E1",
           "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ", "timestamp": 1588687728923, "helpful_vote": 0}  # fmt: skip
    meta = {"main_category": "Games", "title": TITLE, "average_rating": 4.8, "features": [], "description": [],
            "price": None, "store": "Howard", "categories": ["A", "B"], "parent_asin": "B00YQ6X8E1"}  # fmt: skip
    item = "B00YQ6X8E1\tAmélie, 'the' fabulous destiny\tGames\tA B\tHoward\t\t"
    log = "AGKHLEW2SOWHNMFQIJGBECAF7INQ\tB00YQ6X8E1\t1588687728.923\t5.0"
    return {"file.jsonl": lines(row), "items.jsonl": lines(meta)}, [log, item]


def movielens_100k() -> tuple[dict[str, str], list[str]]:
    flags = "|".join("0" * 19)
    files = {
        "u.data": "196\t242\t3\t881250949\n186\t302\t3\t891717742\n",
        "items.item": f"242|Kolya é (1996)|24-Jan-1997||http://x|{flags}\n1|Toy Story|01-Jan-1995||u|{flags}\n",
        "users.user": "196|49|M|writer|55105\n7|57|M|administrator|91344\n",
    }
    return files, ["196\t242\t881250949\t3.0", "186\t302\t891717742\t3.0", "242\tKolya é (1996)\t24-Jan-1997",
                   "196\t49.0\tM\twriter\t55105"]  # fmt: skip


def movielens_1m() -> tuple[dict[str, str], list[str]]:
    files = {
        "ratings.dat": "1::1193::5::978300760\n", "items.dat": "1193::One Flew: Over (1975)::Drama|War\n",
        "users.dat": "1::F::1::10::48067\n",
    }  # fmt: skip
    return files, ["1\t1193\t978300760\t5.0", "1193\tOne Flew: Over (1975)\tDrama|War", "1\tF\t1\t10\t48067"]


def movielens() -> tuple[dict[str, str], list[str]]:
    files = {
        "ratings.csv": "userId,movieId,rating,timestamp\n1,307,3.5,1256677221\n",
        "items.csv": 'movieId,title,genres\n307,"Three Colors, Blue (1993)",Drama\n',
    }
    return files, ["1\t307\t1256677221\t3.5", "307\tThree Colors, Blue (1993)\tDrama"]


def tenrec() -> tuple[dict[str, str], list[str]]:
    text = "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age\n"
    return {"QB-video.csv": f"{text}9,20,1,0,0,0,1,2,1,3\n9,10,0,0,0,0,1,0,1,3\n"}, ["9\t20\t0\t1.0", "9\t10\t1\t0.0"]


def hm() -> tuple[dict[str, str], list[str]]:
    customer = "000058a12d5b43e67d225668fa1f8d618c13dc232df0cad8ffe7ad4a1091e318"
    files = {
        "transactions_train.csv": f"t_dat,customer_id,article_id,price,sales_channel_id\n"
        f"2018-09-20,{customer},0663713001,0.050830508474576264,2\n",
        "items.csv": "article_id,product_code,prod_name,product_type_name,colour_group_name,department_name,"
        "detail_desc\n"
        '0663713001,663713,Atlanta Push Body,Underwear body,Black,Expressive Lingerie,"Lace, with ""wings"""\n',
        "users.csv": f"customer_id,FN,Active,club_member_status,fashion_news_frequency,age,postal_code\n"
        f"{customer},,,ACTIVE,NONE,49.0,52043\n",
    }
    item = "0663713001\tAtlanta Push Body\tUnderwear body\tBlack\tExpressive Lingerie\tLace, with 'wings'"
    return files, [f"{customer}\t0663713001\t1537401600", item, f"{customer}\t49.0\tACTIVE\tNONE"]


def taobao() -> tuple[dict[str, str], list[str]]:
    text = "1,2268318,2520377,pv,1511544070\n1,2333346,2520771,buy,1511561733\n"
    return {"UserBehavior.csv": text}, ["1\t2268318\t1511544070", "1\t2333346\t1511561733"]


SAMPLES = {
    "amazon-2018": amazon_2018, "amazon-2023": amazon_2023, "movielens-100k": movielens_100k, "hm": hm,
    "movielens-1m": movielens_1m, "movielens": movielens, "tenrec": tenrec, "taobao": taobao,
}  # fmt: skip


def test_every_format_has_a_sample() -> None:
    assert sorted(SAMPLES) == list_formats(FORMATS)
    for name in SAMPLES:
        form = read_format(name, FORMATS)
        assert form.about and form.source


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_a_named_format(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of the atomic files are those of the sample, and RecBole-CL's own reader finds the same."""
    files, wanted = SAMPLES[name]()
    paths = {}
    for file, text in files.items():
        paths[file] = tmp_path / file
        encoding = "latin-1" if name.startswith("movielens-") and file.startswith("items") else "utf-8"
        raw = text.encode(encoding)
        paths[file].write_bytes(gzip.compress(raw) if file.endswith(".gz") else raw)
    log, *more = paths
    words = ["import", str(paths[log]), f"--format={name}", "--name=trial", f"--data_path={tmp_path / 'data'}"]
    words += [f"--{file.partition('.')[0]}={paths[file]}" for file in more]
    assert cli.main(words) == 0, capsys.readouterr().err
    folder = tmp_path / "data" / "trial"
    found: list[str] = []
    for ending in ("inter", "item", "user"):
        if (folder / f"trial.{ending}").exists():
            head, *rows = (folder / f"trial.{ending}").read_text(encoding="utf-8").splitlines()
            assert all(name.partition(":")[2] in ("token", "token_seq", "float") for name in head.split("\t"))
            assert all(len(row.split("\t")) == len(head.split("\t")) for row in rows)
            found += rows
    assert found == wanted
    frame, columns = read_log(folder / "trial.inter", Columns())
    assert len(frame) and columns.unit is not None


def test_features_reach_recbole(tmp_path: Path) -> None:
    """A dataset with items of other kinds of columns is loaded, with the features at the right items."""
    rng = np.random.default_rng(0)
    ratings = [f"{u},{i},4.0,{1_256_677_221 + t}\n" for t, (u, i) in enumerate(rng.integers(1, 30, (400, 2)))]
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "".join(ratings), encoding="utf-8")
    movies = "".join(f"{i},Film number {i},{'Drama' if i % 2 else 'War'}\n" for i in range(1, 40))
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n" + movies, encoding="utf-8")
    words = ["import", str(tmp_path / "ratings.csv"), "--format=movielens", f"--items={tmp_path / 'movies.csv'}"]
    assert cli.main([*words, "--name=films", f"--data_path={tmp_path}"]) == 0
    load = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "title", "genres"]}
    given = {**SMALL, "data_path": str(tmp_path), "load_col": load, "n_stages": 2}
    stream = build_stream(CLConfig("BPR", "films", config_dict=given))
    view = stream.view(1)
    tokens = view.field2id_token["item_id"]
    features = view.get_item_feature()
    for number in range(1, len(tokens)):
        genre = view.field2id_token["genres"][int(features["genres"][number])]
        assert genre == ("Drama" if int(tokens[number]) % 2 else "War")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--format=amazn-2023"], "did you mean 'amazon-2023'?"),
        (["--format=taobao", "--items=x.csv"], "tells of no file of items"),
        (["--items=x.csv"], "are read by a --format"),
        (["--format=taobao", "--keep=behavior"], "give COLUMN=VALUE,VALUE"),
        (["--format=taobao", "--keep=behaviour=buy"], "did you mean 'behavior'?"),
        (["--format=taobao", "--keep=behavior=gift"], "it holds no interaction"),
    ],
)
def test_wrong_words_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    (tmp_path / "UserBehavior.csv").write_text(taobao()[0]["UserBehavior.csv"], encoding="utf-8")
    assert cli.main(["import", str(tmp_path / "UserBehavior.csv"), *words, f"--data_path={tmp_path / 'data'}"]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "data").exists(), "nothing is written"


def test_kept_rows_and_lines_of_errors(tmp_path: Path) -> None:
    path = tmp_path / "UserBehavior.csv"
    path.write_text(taobao()[0]["UserBehavior.csv"], encoding="utf-8")
    form = read_format("taobao", FORMATS).inter
    kept, columns = read_log(path, Columns.of({**form.to_dict(), "keep": {"behavior": ["buy"]}}))
    assert kept["item_id"].tolist() == ["2333346"] and kept.index.tolist() == [2]
    assert Columns.of(json.loads(json.dumps(columns.to_dict()))) == columns, "an update reads new files the same way"
    path.write_text("1,2,3,pv,1511544070\n1,2,3,pv,never\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2: 'never'"):
        read_log(path, form)
    (tmp_path / "r.dat").write_text("1::2::3::4\n1::2::3\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2: it has 3 columns, not 4"):
        read_log(tmp_path / "r.dat", read_format("movielens-1m", FORMATS).inter)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("about: x", "no key 'inter'"),
        ("inter: {usr: a}", "unknown key 'usr'; did you mean 'user'?"),
        ("inter: {user: a}\nitem: {columns: {a: b}}", "no key 'id'"),
        ("inter: {user: a}\nitem: {id: i, columns: {a: b}, types: {a: text}}", "give one of token"),
        ("[", "it is no YAML"),
    ],
)
def test_a_format_of_ones_own_is_checked(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=told.replace("?", r"\?")):
        read_format(str(tmp_path / "own.yaml"), FORMATS)


# -- drift --------------------------------------------------------------------------------------------------------


def log(rows: list[tuple[str, str]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["user_id", "item_id"])
    return frame.assign(timestamp=np.arange(len(rows)) * 86_400.0)


def test_drift_by_hand() -> None:
    frame = log([("a", "x"), ("a", "x"), ("b", "y"), ("b", "y"), ("a", "x"), ("c", "z"), ("c", "z"), ("c", "z")])
    first, second = drift(frame.sample(frac=1, random_state=0), 2)
    assert (first["rows"], first["users"], first["items"], first["repeat"]) == (4, 2, 2, 0.5)
    assert first["new_users"] is None and first["popularity_shift"] is None
    assert second["new_users"] == 1 / 2 and second["new_items"] == 1 / 2 and second["rows_of_new_items"] == 3 / 4
    assert second["returning_users"] == 1 / 2 and second["repeat"] == 3 / 4
    assert second["popularity_shift"] == (abs(0.5 - 0.25) + 0.5 + 0.75) / 2
    vectors = {"x": np.array([1.0, 0.0]), "y": np.array([1.0, 0.0]), "z": np.array([0.0, 1.0])}
    moved = drift(frame, 2, vectors)[1]["embedding_shift"]
    assert moved == pytest.approx(1 - 0.25 / np.hypot(0.25, 0.75))
    assert drift(frame, 2, {"x": vectors["x"]})[1]["embedding_shift"] == pytest.approx(0.0)
    assert [len(part) for part in slices(frame, 3)] == [3, 3, 2]


def test_chance_and_drift_are_told_apart() -> None:
    rng = np.random.default_rng(1)
    same = [pd.Series(rng.integers(0, 50, 2000)).astype(str) for _ in range(2)]
    assert distance(*same) == pytest.approx(by_chance(*same), abs=0.02)
    other = pd.Series(rng.integers(40, 90, 2000)).astype(str)
    assert distance(same[0], other) > by_chance(same[0], other) + 0.3


def test_advice_follows_the_figures() -> None:
    def entry(**more: float) -> dict[str, Any]:
        base = {"rows_of_new_items": 0.0, "popularity_shift": 0.2, "shift_by_chance": 0.15, "returning_users": 0.1,
                "repeat": 0.0}  # fmt: skip
        return {**base, **more}

    def named(**more: float) -> str:
        return "; ".join(what for what, _ in worth_trying([entry(), entry(**more)]))

    assert "EWC" in named() and "content" not in named() and "ERRandom" not in named()
    assert "content" in named(rows_of_new_items=0.4) and "ERRandom" in named(returning_users=0.6)
    assert "EWC" not in named(popularity_shift=0.9) and "stage_optimizer: carry" in named(popularity_shift=0.9)
    assert worth_trying([entry()]) == []
    assert suggested_stages(log([("a", "x")] * 9))[0] == 2 and suggested_stages(log([("a", "x")] * 9000))[0] == 4


def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    frame = log([("a", "x"), ("<b>", "y")] * 20)
    frame.loc[20:, "timestamp"] += 30 * 86_400.0
    (begin, end), *_ = gaps(frame)
    assert (begin, end) == (19 * 86_400.0, 50 * 86_400.0)
    page = health_page("<shop>", frame, 4)
    assert "&lt;shop&gt;" in page and "<shop>" not in page and "31.00 days without a row" in page
    for figure in ("time", "tail", "new", "moved"):
        assert f'data-figure="{figure}"' in page
    frame.to_csv(tmp_path / "shop.csv", index=False)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["health", "shop.csv", "--n_stages=4"]) == 0
    printed = capsys.readouterr().out
    assert "stages        2" in printed and "try           FineTune" in printed
    assert (tmp_path / "shop.health.html").is_file()
    assert cli.main(["health", "shop.csv", "--n_stages=1"]) == 2
    assert cli.main(["health", "nothing"]) == 2
    assert "import it" in capsys.readouterr().err
