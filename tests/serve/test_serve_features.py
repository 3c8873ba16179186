"""Features of new users and items that come with an update."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from run_helpers import run
from test_serve_update import FIRST, NAMES, new_rows

import recbole_cl
from recbole_cl.errors import ConfigError, DataError
from recbole_cl.serve.update import update
from recbole_cl.testing.toy import PlantedDrift, write_planted_drift

COLUMNS = {
    "load_col": {
        "inter": ["user_id", "item_id", "timestamp"],
        "user": ["user_id", "town", "age"],
        "item": ["item_id", "tags", "price"],
    },
    "eval_args": {"mode": "full"},
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    """The planted log with features: users have a town and an age, items tags and a price."""
    log = write_planted_drift(tmp_path_factory.mktemp("data"), n_stages=4)
    file = log.folder / log.name / f"{log.name}.inter"
    rows = [line.split("\t") for line in file.read_text().splitlines()[1:]]
    users, items = (list(dict.fromkeys(row[side] for row in rows)) for side in (0, 1))
    towns = [f"{user}\ttown{n % 5}\t{20 + n}" for n, user in enumerate(users)]
    file.with_suffix(".user").write_text("\n".join(["user_id:token\ttown:token\tage:float", *towns]) + "\n")
    tags = [f"{item}\ttag{n % 4} tag{n % 7}\t{n}" for n, item in enumerate(items)]
    file.with_suffix(".item").write_text("\n".join(["item_id:token\ttags:token_seq\tprice:float", *tags]) + "\n")
    return log


@pytest.fixture(scope="module")
def early(log: PlantedDrift, tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    """The same, as it stood before the last stage: whoever comes then is in no file."""
    folder = tmp_path_factory.mktemp("early")
    source, target = log.folder / log.name, folder / log.name
    target.mkdir()
    rows = (source / f"{log.name}.inter").read_text().splitlines()
    kept = [rows[0], *(row for row in rows[1:] if int(row.split("\t")[2]) < 3_000_000)]
    (target / f"{log.name}.inter").write_text("\n".join(kept) + "\n")
    for side, ending in ((0, "user"), (1, "item")):
        there = {row.split("\t")[side] for row in kept[1:]}
        lines = (source / f"{log.name}.{ending}").read_text().splitlines()
        told = [lines[0], *(line for line in lines[1:] if line.split("\t")[0] in there)]
        assert len(told) < len(lines)
        (target / f"{log.name}.{ending}").write_text("\n".join(told) + "\n")
    return dataclasses.replace(log, folder=folder)


def test_what_comes_has_its_features(log: PlantedDrift, early: PlantedDrift, tmp_path: Path) -> None:
    """As a run that had the rows and the features from the start: the same tables, the same figures."""
    run(early, tmp_path / "run", "DeepFM", **FIRST, **COLUMNS)
    whole, result = run(log, tmp_path / "whole", "DeepFM", **COLUMNS)
    folder = log.folder / log.name
    users, items = folder / f"{log.name}.user", folder / f"{log.name}.item"
    path = new_rows(log, tmp_path / "new.csv")
    done = update(tmp_path / "run", path, columns=NAMES, margin=1.0, new_users=users, new_items=items)
    assert any("are known to the run; their features stay" in note for note in done.notes)
    mine, theirs = recbole_cl.load(tmp_path / "run").stream.dataset, whole.stream.dataset
    for feature in ("user_feat", "item_feat"):
        for name, column in getattr(theirs, feature).interaction.items():
            found = getattr(mine, feature)[name]
            if name in ("town", "tags"):  # ids of words go by where they stand in the files
                words, others = (data.field2id_token[name].astype(str) for data in (mine, theirs))
                assert (words[found.numpy()] == others[column.numpy()][: len(found)]).all(), name
            else:
                assert np.array_equal(found.numpy(), column.numpy()), name
    assert done.new == pytest.approx(result["matrix"]["ndcg@10"][3][3], abs=0.02)
    plain = recbole_cl.load(tmp_path / "run").stream.dataset.item_feat["price"]
    assert len(set(plain.tolist())) == len(plain), "no mean stands in for a price"


def test_a_table_of_the_shop_is_read(log: PlantedDrift, tmp_path: Path) -> None:
    run(log, tmp_path / "run", "DeepFM", **FIRST, **COLUMNS)
    (tmp_path / "new.csv").write_text(
        "user,item,time\n"
        + "".join(f"u{n % 30},{'novel' if n % 4 == 0 else 'i5'},{3_000_000 + n}\n" for n in range(80))
    )
    (tmp_path / "novel.csv").write_text("item,tags,colour\nnovel,tag1 never-seen tag2,red\n")
    done = update(tmp_path / "run", tmp_path / "new.csv", columns=NAMES, guard="none", new_items=tmp_path / "novel.csv")
    told = " ".join(done.notes)
    assert "has no column price" in told and "does not read: colour" in told
    dataset = recbole_cl.load(tmp_path / "run").stream.dataset
    row = dataset.field2token_id["item_id"]["novel"]
    words = dataset.field2id_token["tags"][dataset.item_feat["tags"][row].numpy()]
    assert [word for word in words if word != "[PAD]"] == ["tag1", "tag2"]
    assert float(dataset.item_feat["price"][row]) == pytest.approx(float(dataset.item_feat["price"][1:row].mean()))


def test_files_of_features_that_make_no_sense(log: PlantedDrift, early: PlantedDrift, tmp_path: Path) -> None:
    run(early, tmp_path / "run", "DeepFM", **FIRST, **COLUMNS)
    run(early, tmp_path / "bare", "BPR", **FIRST)
    path, file = new_rows(log, tmp_path / "new.csv"), tmp_path / "items.csv"
    for text, message in (
        ("name,price\nx,1\n", "there is no column 'item_id' of items; it has name, price"),
        ("item,price\nx,1\nx,2\n", "item 'x' stands there twice"),
        ("item,price\n", "holds no row"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            update(tmp_path / "run", path, columns=NAMES, new_items=file)
    known = recbole_cl.load(tmp_path / "run").ids.items
    new = next(line.split(",")[1] for line in path.read_text().splitlines()[1:] if line.split(",")[1] not in known)
    file.write_text(f"item,price\n{new},cheap\n")
    with pytest.raises(DataError, match=f"'cheap' in column 'price' of '{new}' is no number"):
        update(tmp_path / "run", path, columns=NAMES, new_items=file)
    with pytest.raises(ConfigError, match="--new-users: the run reads no features of users"):
        update(tmp_path / "bare", path, columns=NAMES, new_users=file)
    assert recbole_cl.load(tmp_path / "run").position.version == 0
