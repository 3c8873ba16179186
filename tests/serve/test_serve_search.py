"""Lists by an index of vectors are those of the model's own scores; vectors in files of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from run_helpers import run
from serve_helpers import SETTINGS, same_ranking

import recbole_cl
from recbole_cl import cli
from recbole_cl.errors import ConfigError
from recbole_cl.serve.forget import retire
from recbole_cl.serve.search import VectorSearch, make_index
from recbole_cl.testing.toy import write_planted_drift

MODELS = ("BPR", "LightGCN", "SASRec", "GRU4Rec", "DeepFM", "NeuMF", "PCL")
BY_INDEX = {"BPR", "LightGCN", "SASRec", "GRU4Rec", "PCL"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    log = write_planted_drift(folder / "data")
    for model in MODELS:
        run(log, folder / model, model, epochs=1, **SETTINGS.get(model, {}))
    return folder


@pytest.mark.parametrize("model", MODELS)
def test_an_index_gives_the_models_own_lists(root: Path, model: str) -> None:
    retire(root / model, ["i3"])
    dense, exact = (recbole_cl.load(root / model, search=search) for search in ("dense", "exact"))
    users = [f"u{number}" for number in range(40)]
    excluded = [[f"i{(number + step) % 40}" for step in range(number % 5)] for number in range(40)]
    for filter_seen in (True, False):
        one = dense.recommend(users, 6, excluded=excluded, filter_seen=filter_seen)
        two = exact.recommend(users, 6, excluded=excluded, filter_seen=filter_seen)
        ids = exact.ids.items.ids
        for a, b in zip(one, two, strict=True):
            assert b.scores == pytest.approx(a.scores, abs=1e-4) and "i3" not in b.items
            same = same_ranking(np.array([ids(a.items)]), np.array([a.scores]), np.array([ids(b.items)]), 1e-4)
            assert same, (a, b)
    assert (exact._indices[exact._stage.index] is not None) == (model in BY_INDEX)
    assert not dense._indices
    few = exact.recommend("u1", 100, filter_seen=False)[0]
    assert len(few.items) == len(set(few.items)) == 39
    assert exact.recommend("u1", 2, allowed=["i5", "i6"], filter_seen=False)[0].items


def test_every_size_of_a_batch_is_searched_right() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 8)).astype(np.float32)
    allowed = np.arange(300) % 3 > 0
    search = VectorSearch(vectors, allowed)
    for n in (1, 7, 9, 500):  # one product, and faiss
        queries = rng.normal(size=(n, 8)).astype(np.float32)
        excluded = [rng.choice(300, size=number % 40, replace=False) for number in range(n)]
        found = search.best(queries, 5, excluded)
        assert found is not None
        scores = queries @ vectors.T
        scores[:, ~allowed] = -np.inf
        for row, gone in enumerate(excluded):
            scores[row, gone] = -np.inf
        assert np.array_equal(found[0], np.argsort(-scores, axis=1)[:, :5])
        assert found[1] == pytest.approx(-np.sort(-scores, axis=1)[:, :5], abs=1e-5)
    last = search.best(queries[:1], 5, [np.flatnonzero(allowed)[:-2]])
    assert last is not None and (last[0] > 0).sum() == 2 and np.isneginf(last[1][0, 2:]).all(), "fewer are left"
    assert search.best(queries[:1], 3000, [np.zeros(0, dtype=np.int64)]) is not None


def test_an_approximate_index_finds_most() -> None:
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(60, 16))
    vectors = (centres[rng.integers(60, size=40_000)] + 0.3 * rng.normal(size=(40_000, 16))).astype(np.float32)
    queries = (centres[rng.integers(60, size=50)] + 0.3 * rng.normal(size=(50, 16))).astype(np.float32)
    right = make_index(vectors).search(queries, 10)[1]
    near = make_index(vectors, approximate=True)
    assert isinstance(near, faiss.IndexIVFFlat) and near.nprobe < near.nlist / 8
    found = near.search(queries, 10)[1]
    share = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(right, found, strict=True)])
    assert share > 0.8, share


def test_a_word_that_is_no_search_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="search: 'fast' is none of exact, approximate, dense"):
        recbole_cl.load(root / "BPR", search="fast")


# -- files --------------------------------------------------------------------------------------------------------


def test_vectors_are_exported(root: Path, tmp_path: Path, capsys: Any) -> None:
    retire(root / "BPR", ["i3"])
    served = recbole_cl.load(root / "BPR")
    found = served.vectors("items")
    to = ["--to", str(tmp_path)]
    assert cli.main(["export", str(root / "BPR"), *to, "--of", "both"]) == 0
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == [
        "items.npy", "items.tokens.txt", "users.npy", "users.tokens.txt",
    ]  # fmt: skip
    tokens = (tmp_path / "items.tokens.txt").read_text().splitlines()
    values = np.load(tmp_path / "items.npy", allow_pickle=False)
    assert "i3" not in tokens and len(tokens) == len(values) == 39 and values.dtype == np.float32
    assert all(np.array_equal(values[row], found.values[found.tokens.index(name)]) for row, name in enumerate(tokens))
    assert cli.main(["export", str(root / "BPR"), *to, "--format", "faiss"]) == 0
    users = np.load(tmp_path / "users.npy")
    names = (tmp_path / "users.tokens.txt").read_text().splitlines()
    _, rows = faiss.read_index(str(tmp_path / "items.faiss")).search(users[names.index("u4")][None], 5)
    assert [tokens[row] for row in rows[0]] == served.recommend("u4", 5, filter_seen=False)[0].items
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"
    assert cli.main(["export", str(root / "NeuMF"), *to, "--of", "users"]) == 2


def test_parquet(root: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow, of the extra 'parquet', is not installed")
    assert cli.main(["export", str(root / "SASRec"), "--to", str(tmp_path), "--format", "parquet"]) == 0
    table = parquet.read_table(tmp_path / "items.parquet").to_pydict()
    found = recbole_cl.load(root / "SASRec").vectors("items")
    kept = [row for row, name in enumerate(found.tokens) if name != "i3"]
    assert table["token"] == [found.tokens[row] for row in kept]
    assert np.array_equal(np.array(table["vector"], dtype=np.float32), found.values[kept])
