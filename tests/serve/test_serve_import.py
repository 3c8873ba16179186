"""Tables become logs: kinds of files, encodings, clocks, names of columns; what is wrong is told with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from run_helpers import SMALL

from recbole_cl.config import CLConfig
from recbole_cl.errors import ConfigError, DataError
from recbole_cl.importer import Columns, health, import_log, read_log
from recbole_cl.importer.health import health_lines
from recbole_cl.stream.build import build_stream

SHOP = Columns(user="user", item="item", time="time")
ROWS = [("ann", "milk", 1714564800.0), ("bob", "Käse", 1714564801.5), ("ann", "bread", 1714564800.0)]


def csv(folder: Path, text: str, name: str = "shop.csv", encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def rows(frame: pd.DataFrame) -> list[tuple[Any, ...]]:
    return list(frame[["user_id", "item_id", "timestamp"]].itertuples(index=False, name=None))


# -- kinds of files -----------------------------------------------------------------------------------------------

TABLE = "user,item,time\nann,milk,1714564800\nbob,Käse,1714564801.5\nann,bread,1714564800\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_text_in_any_encoding_with_any_separator(tmp_path: Path, encoding: str, separator: str) -> None:
    path = csv(tmp_path, TABLE.replace(",", separator), encoding=encoding)
    frame, found = read_log(path, SHOP)
    assert rows(frame) == ROWS and found.unit == "s"
    assert frame.index.tolist() == [2, 3, 4], "lines of the file"


def test_json_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"user": u, "item": i, "time": t, "more": [1]}) for u, i, t in ROWS]
    frame, _ = read_log(csv(tmp_path, "\n".join([lines[0], "", *lines[1:]]), "shop.jsonl"), SHOP)
    assert rows(frame) == ROWS and frame.index.tolist() == [1, 3, 4]


def test_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
    table = pd.DataFrame(ROWS, columns=["user", "item", "time"])
    table.to_parquet(tmp_path / "shop.parquet")
    assert rows(read_log(tmp_path / "shop.parquet", SHOP)[0]) == ROWS
    table["time"] = pd.to_datetime(table["time"], unit="s")
    table["user"] = [7.0, 8.0, 7.0]
    table.to_parquet(tmp_path / "dates.parquet")
    frame, found = read_log(tmp_path / "dates.parquet", SHOP)
    assert frame["timestamp"].tolist() == [t for _, _, t in ROWS] and found.unit == "iso"
    assert frame["user_id"].tolist() == ["7", "8", "7"]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="is no parquet file"):
        read_log(tmp_path / "broken.parquet", SHOP)


def test_recboles_own_files(tmp_path: Path) -> None:
    text = "user_id:token\titem_id:token\ttimestamp:float\n1\t2\t3\n"
    frame, _ = read_log(csv(tmp_path, text, "shop.inter"), Columns())
    assert rows(frame) == [("1", "2", 3.0)]


# -- clocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "unit"),
    [
        ("1714564800", "s"),
        ("1714564800000", "ms"),
        ("1714564800000000", "us"),
        ("1714564800000000000", "ns"),
        ("2024-05-01T12:00:00", "iso"),
        ("2024-05-01 12:00:00", "iso"),
        ("2024-05-01T14:00:00+02:00", "iso"),
        ("2024-05-01T12:00:00Z", "iso"),
    ],
)
def test_clocks(tmp_path: Path, written: str, unit: str) -> None:
    frame, found = read_log(csv(tmp_path, f"user,item,time\na,b,{written}\n"), SHOP)
    assert frame["timestamp"].tolist() == [1714564800.0] and found.unit == unit


def test_a_clock_that_is_told_is_not_guessed(tmp_path: Path) -> None:
    path = csv(tmp_path, "user,item,time\na,b,5000\n")
    assert read_log(path, Columns("user", "item", "time", unit="ms"))[0]["timestamp"].tolist() == [5.0]


def test_dates_keep_their_fractions(tmp_path: Path) -> None:
    path = csv(tmp_path, "user,item,time\na,b,2024-05-01T12:00:00.250\na,c,2024-05-01\n")
    assert read_log(path, SHOP)[0]["timestamp"].tolist() == [1714564800.25, 1714521600.0]


# -- what is wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (
            "user,item,when\na,b,1\n",
            "shop.csv",
            r"shop.csv: there is no column 'time'.*It has user, item, when.*--time",
        ),
        ("user,itme,time\na,b,1\n", "shop.csv", r"no column 'item'; did you mean 'itme'.*--item"),
        ("", "shop.csv", "shop.csv: it is empty"),
        ("user,item,time\n", "shop.csv", "holds no interaction"),
        ("user,item,time\na,b,1\n,b,2\n", "shop.csv", r"shop.csv, line 3: '' in column 'user' is empty"),
        ("user,item,time\na,b,1\na,b,soon\n", "shop.csv", r"line 3: 'soon' in column 'time' is no time"),
        ("user,item,time\na,b,2024-05-01\na,b,later\n", "shop.csv", r"line 3: 'later' in column 'time'"),
        ("user,item,time\na,b,1\na,NA,1\n", "shop.csv", r"line 3: 'NA' in column 'item' is what RecBole takes for"),
        ("user,item,time\na,b,1,9\na,b,1\n", "shop.csv", r"shop.csv: "),
        ("user,item,time\na,b,1\n", "shop.xlsx", r"\.xlsx is no kind of file"),
        ('{"user": 1}\nno\n', "shop.jsonl", r"shop.jsonl, line 2: it is no JSON"),
        ("[1, 2]\n", "shop.jsonl", r"line 1: it is no JSON object"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, text: str, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_log(csv(tmp_path, text, name), SHOP)


def test_labels_are_numbers(tmp_path: Path) -> None:
    labelled = Columns("user", "item", "time", label="stars")
    path = csv(tmp_path, "user,item,time,stars\na,b,1,5\na,c,2,good\n")
    with pytest.raises(DataError, match=r"line 3: 'good' in column 'stars' is no number"):
        read_log(path, labelled)
    path = csv(tmp_path, "user,item,time,stars\na,b,1,5\na,c,2,0\n")
    frame, _ = read_log(path, labelled)
    assert frame["label"].tolist() == [5.0, 0.0] and health(frame)["positive_labels"] == 0.5


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        read_log(tmp_path / "none.csv", SHOP)


# -- the dataset --------------------------------------------------------------------------------------------------


def test_health_is_counted(tmp_path: Path) -> None:
    text = "user,item,time\na,x,100\na,x,100\na,y,100\nb,x,50\n"
    told = health(read_log(csv(tmp_path, text), SHOP)[0])
    assert told == {
        "rows": 4, "users": 2, "items": 2, "first": 50.0, "last": 100.0,
        "duplicates": 1, "ties": 2, "single_users": 1, "mean_length": 2.0,
    }  # fmt: skip
    assert health_lines(told)[3] == "time          1970-01-01 00:00 to 1970-01-01 00:01 UTC"


def test_an_imported_table_is_a_dataset(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    times = pd.to_datetime(1714564800 + np.sort(rng.integers(0, 10**6, 400)), unit="s")
    table = pd.DataFrame({"who": rng.integers(0, 20, 400), "what": rng.integers(0, 30, 400), "when": times})
    table.sample(frac=1, random_state=0).to_csv(tmp_path / "my-shop.csv", index=False)
    target, told, found = import_log(tmp_path / "my-shop.csv", Columns("who", "what", "when"), root=tmp_path / "data")
    assert target == tmp_path / "data" / "my-shop" / "my-shop.inter" and told["rows"] == 400 and found.unit == "iso"
    config = CLConfig(model="BPR", dataset="my-shop", config_dict={**SMALL, "data_path": str(tmp_path / "data")})
    stream = build_stream(config)
    assert len(stream.table) == 400
    dataset = stream.dataset
    tokens = dataset.field2id_token
    read = sorted(zip(tokens["user_id"][stream.table.user], tokens["item_id"][stream.table.item], strict=True))
    assert read == sorted((str(u), str(i)) for u, i in zip(table["who"], table["what"], strict=True))
    assert stream.table.timestamp[0] == times[0].timestamp()


def test_a_name_that_is_taken_is_not_overwritten(tmp_path: Path) -> None:
    path = csv(tmp_path, TABLE)
    import_log(path, SHOP, root=tmp_path / "data")
    with pytest.raises(ConfigError, match=r"'shop' is there already.*--name.*--overwrite"):
        import_log(path, SHOP, root=tmp_path / "data")
    import_log(path, SHOP, root=tmp_path / "data", overwrite=True)
    import_log(path, SHOP, name="other", root=tmp_path / "data")
    with pytest.raises(ConfigError, match=r"'\.\./x' is no name"):
        import_log(path, SHOP, name="../x", root=tmp_path / "data")
