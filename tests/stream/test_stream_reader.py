"""The rows that are read are the lines of the file, or the file is refused with the line."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_helpers import INTER, LOAD, stream_of, write

from recbole_cl.errors import ConfigError, DataError
from recbole_cl.stream.reader import look, split_quoted

ROWS = [(f"u{k % 6}", f"i{k % 9}", 1_600_000_000 + 60 * k) for k in range(120)]
ITEMS = [(f"i{k}", f"title {k}", k) for k in range(9)]
WITH_ITEMS: dict[str, Any] = {"load_col": {**LOAD, "item": ["item_id", "title", "price"]}}


def items(folder: Path, rows: list[Any]) -> None:
    write(folder, ROWS)
    write(folder, rows, "item_id:token\ttitle:token\tprice:float", "item")


def written(folder: Path, text: str | bytes) -> Path:
    """The log with the very content of its file."""
    file = write(folder, []) / "log" / "log.inter"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def text_of(rows: list[Any], header: str = INTER, end: str = "\n") -> str:
    return end.join([header, *("\t".join(map(str, row)) for row in rows)]) + end


@pytest.mark.parametrize("where", [[20], [20, 80], [20, 50, 80]])
def test_a_stray_quote_of_an_id_is_refused_with_its_line(tmp_path: Path, where: list[int]) -> None:
    """One quote swallowed the rest of the file, two what lies between them."""
    rows = [(u, f'"{i}' if k in where else i, t) for k, (u, i, t) in enumerate(ROWS)]
    lines = ", ".join(str(k + 2) for k in where)
    with pytest.raises(DataError, match=rf"log.inter, line {lines}: {len(where)} values of 'item_id' begin .* remove"):
        stream_of(write(tmp_path, rows), model="BPR")


@pytest.mark.parametrize("where", [[3], [3, 6], [0, 4, 8]])
def test_a_stray_quote_of_a_text_is_read_as_it_stands(tmp_path: Path, where: list[int]) -> None:
    """All items are there, the quote is part of its title, whole quotes are taken off, and the run says so."""
    rows = [(i, f'"{t}' if k in where else f'"{t}"' if k == 5 else t, p) for k, (i, t, p) in enumerate(ITEMS)]
    items(tmp_path, rows)
    _, stream = stream_of(tmp_path, model="BPR", **WITH_ITEMS)
    assert len(stream.table) == 120 and stream.table.n_items == 10
    names = stream.dataset.field2id_token
    found = {
        str(names["item_id"][n]): str(names["title"][int(t)]) for n, t in enumerate(stream.dataset.item_feat["title"])
    }
    assert {found[i] for i, _, _ in ITEMS} == {f'"{t}' if k in where else t for k, (_, t, _) in enumerate(ITEMS)}
    told = [warning for warning in stream.warnings if "log.item" in warning]
    assert len(told) == 1 and f"{len(where)} values of 'title'" in told[0] and str(where[0] + 2) in told[0]


def test_whole_quotes_are_taken_off_as_ever(tmp_path: Path) -> None:
    """A text in quotes may hold the separator and doubled quotes."""
    items(tmp_path, [(f'"{i}"', '"a\tb ""c"""' if k == 4 else t, p) for k, (i, t, p) in enumerate(ITEMS)])
    _, stream = stream_of(tmp_path, model="BPR", **WITH_ITEMS)
    assert 'a\tb "c"' in stream.dataset.field2id_token["title"] and not stream.warnings
    assert set(stream.dataset.field2id_token["item_id"][1:]) == {i for i, _, _ in ITEMS}


@pytest.mark.parametrize("last", [False, True])
def test_a_text_over_two_lines_is_refused(tmp_path: Path, last: bool) -> None:
    """Its second half would become an item."""
    rows = [(i, '"two\nlines"' if k == 4 else t, p) for k, (i, t, p) in enumerate(ITEMS)]
    if last:
        write(tmp_path, [(i, p, t) for i, t, p in rows], "item_id:token\tprice:float\ttitle:token", "item")
        write(tmp_path, ROWS)
    else:
        items(tmp_path, rows)
    with pytest.raises(DataError, match=r"log.item, line 6: a text in quotes goes on in the next line"):
        stream_of(tmp_path, model="BPR", **WITH_ITEMS)


@pytest.mark.parametrize("where", [{0}, {7}, set(range(120)), {119}])
@pytest.mark.parametrize("ids", ["u", ""])
def test_empty_fields_at_the_end_of_a_line_move_no_column(tmp_path: Path, where: set[int], ids: str) -> None:
    """The stream is that of the file without them, also where ids are numbers and a column is not loaded."""
    header = f"{INTER}\tratio:float"
    rows = [(ids + u[1:], ids + i[1:], t, 0.5) for u, i, t in ROWS]
    write(tmp_path, rows, header, name="good")
    write(tmp_path, [(*row, "") if k in where else row for k, row in enumerate(rows)], header, name="tabs")
    good, tabs = (stream_of(tmp_path, model="BPR", dataset=name)[1] for name in ("good", "tabs"))
    assert tabs.fingerprint() == good.fingerprint() and not tabs.warnings


@pytest.mark.parametrize("line", [0, 5, 119])
def test_a_field_too_many_is_refused_with_its_line(tmp_path: Path, line: int) -> None:
    rows = [(*row, "x") if k == line else row for k, row in enumerate(ROWS)]
    with pytest.raises(DataError, match=rf"line {line + 2}: it has 4 fields, but the first line names 3 .*first 'x'"):
        stream_of(write(tmp_path, rows), model="BPR")


def test_blank_lines_and_other_ends_of_lines(tmp_path: Path) -> None:
    """As pandas reads them: blank lines are none, CR LF ends a line."""
    good = stream_of(write(tmp_path, ROWS, name="good"), model="BPR", dataset="good")[1]
    text = text_of(ROWS).replace("u3\t", "\n  \nu3\t", 1)
    assert stream_of(written(tmp_path, text), model="BPR")[1].fingerprint() == good.fingerprint()
    assert stream_of(written(tmp_path, text_of(ROWS, end="\r\n")), model="BPR")[1].fingerprint() == good.fingerprint()


def test_encodings_are_told(tmp_path: Path) -> None:
    """A byte order mark, UTF-16 and Latin-1, in the header and below it; what the message says then works."""
    text = text_of([("é" + u, i, t) for u, i, t in ROWS])
    late = text_of([*ROWS * 10, ("é", "i1", 1_600_009_999)])  # beyond what is looked at for the header
    for bytes_, encoding, told in (
        (text.encode("utf-8-sig"), "utf-8-sig", "byte order mark.*set encoding: utf-8-sig"),
        (text.encode("utf-16"), "utf-16", "cannot read log.inter .*such as utf-16"),
        (text.encode("latin-1"), "latin-1", "cannot read log.inter .*such as latin-1"),
        (late.encode("latin-1"), "latin-1", "log.inter, line 1202: it is not written in utf-8 .*such as latin-1"),
    ):
        written(tmp_path, bytes_)
        with pytest.raises((ConfigError, DataError), match=told):
            stream_of(tmp_path, model="BPR")
        _, stream = stream_of(tmp_path, model="BPR", encoding=encoding)
        assert any(str(token).startswith("é") for token in stream.dataset.field2id_token["user_id"])


@pytest.mark.parametrize(("field", "kind"), [("user_id", "float"), ("item_id", "float"), ("user_id", "token_seq")])
def test_ids_are_names(tmp_path: Path, field: str, kind: str) -> None:
    """In the file of interactions, and in those of users and items."""
    rows = [(u[1:], i[1:], t) for u, i, t in ROWS]
    told = rf"'{field}', which log.\w+ declares as '{kind}'; ids are names, so write {field}:token"
    with pytest.raises(ConfigError, match=told):
        stream_of(write(tmp_path, rows, INTER.replace(f"{field}:token", f"{field}:{kind}")), model="BPR")
    if field == "item_id":
        write(tmp_path, rows)
        write(tmp_path, [(k, k) for k in range(9)], f"item_id:{kind}\tprice:float", "item")
        with pytest.raises(ConfigError, match=told):
            stream_of(tmp_path, model="BPR", load_col={**LOAD, "item": "*"})


fields = st.text(alphabet='ab "\t', max_size=6)


@settings(max_examples=300, deadline=None)
@given(st.lists(fields, min_size=1, max_size=5))
def test_quoted_fields_are_parted_as_pythons_csv_does(words: list[str]) -> None:
    """Of what a writer of CSV makes, the same number of fields and no stray quote."""
    line = "\t".join('"' + word.replace('"', '""') + '"' if '"' in word or "\t" in word else word for word in words)
    assert split_quoted(line, "\t") == (len(next(csv.reader([line], delimiter="\t"))) if line else 1, [])


@pytest.mark.parametrize(
    ("line", "expected"),
    [('a|"b|c"|d', (3, [])), ('a|"b "" c"', (2, [])), ('a|"b|c', (3, [1])), ('a|"b" c', (2, [1])), ('"', (1, [0]))],
)
def test_stray_quotes_by_hand(line: str, expected: tuple[int, list[int]]) -> None:
    assert split_quoted(line, "|") == expected


def test_the_lines_of_a_file_are_counted(tmp_path: Path) -> None:
    """As many as pandas reads of a well-formed file, for separators of one character and of two."""
    for separator in ("\t", ",", "::"):
        file = tmp_path / "x.inter"
        file.write_text(text_of(ROWS, INTER + "\tx:float").replace("\t", separator))
        assert look(file, "utf-8", separator).rows == len(pd.read_csv(file, sep=separator, engine="python")) == 120
