"""Tokenisers, index files, collisions and the report of their quality."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from recbole_cl.config.components import choose
from recbole_cl.errors import ConfigError, DataError, OutputError
from recbole_cl.generative.collisions import repair
from recbole_cl.generative.index import SemanticIds, read_index, write_index
from recbole_cl.generative.quality import quality
from recbole_cl.generative.tokenisers.base import Tokeniser
from recbole_cl.registry import tokenisers

NAMES = ["residual_quantiser", "residual_kmeans"]


def vectors(n: int = 400, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(20, 12))
    return (centres[rng.integers(0, 20, n)] + 0.3 * rng.normal(size=(n, 12))).astype(np.float32)


def made(name: str, **more: int) -> Tokeniser:
    part = choose("tokeniser", tokenisers, name)
    return part.component({**part.parameters(part.defaults.values), "levels": 3, "size": 16, **more}, 7)


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_coarse_to_fine(name: str) -> None:
    """Each level tells more of a vector; unseen vectors are encoded by the same books; a second fit is the same."""
    seen, unseen = vectors(), vectors(50, 1)
    tokeniser = made(name)
    tokeniser.fit(seen)
    codes = tokeniser.encode(seen)
    assert codes.shape == (400, 3) and codes.dtype == np.int64 and codes.min() >= 0 and codes.max() < 16
    left = seen.copy()
    before = (left**2).sum()
    for level in range(3):
        left -= tokeniser.books[level][codes[:, level]]
        assert (left**2).sum() < 0.9 * before
        before = (left**2).sum()
    assert tokeniser.encode(unseen).shape == (50, 3)
    again = made(name)
    again.fit(seen)
    assert (again.encode(unseen) == tokeniser.encode(unseen)).all()
    for row in range(20):
        far = tokeniser.last_codes(seen[row], codes[row])
        kept = seen[row] - sum(tokeniser.books[level][codes[row, level]] for level in range(2))
        assert np.allclose(far, [((kept - book) ** 2).sum() for book in tokeniser.books[2]], rtol=1e-4, atol=1e-5)
        assert far.argmin() == codes[row, 2]


@pytest.mark.parametrize("name", NAMES)
def test_too_few_items_are_told(name: str) -> None:
    with pytest.raises(DataError, match=r"10 items are too few for 16 codes a level; .* at most 8"):
        made(name).fit(vectors(10))
    broken = vectors()
    broken[3, 2] = np.nan
    with pytest.raises(DataError, match="not finite"):
        made(name).fit(broken)


def test_faiss_wants_a_power_of_two() -> None:
    with pytest.raises(ConfigError, match="residual_quantiser_size"):
        made("residual_quantiser", size=20).fit(vectors())


# -- collisions ---------------------------------------------------------------------------------------------------

CODES = np.array([[1, 2], [1, 2], [1, 2], [3, 0], [1, 2], [1, 3]])
TEXTS = ["a", "b", "a", "c", "b", "d"]
FAR = {1: [0.2, 0.1, 0.0, 0.05], 4: [0.2, 0.1, 0.0, 0.05], 5: [0.5, 0.6, 0.7, 0.0]}


def test_the_nearest_free_last_code() -> None:
    """Texts that are the same stay together; others move to what is nearest of what is free as they come."""
    codes, sizes, unresolved = repair(CODES, (4, 4), TEXTS, "nearest", lambda row: np.array(FAR[row]))
    # item 1 takes 3, the nearest but for 2; item 5, whose own code is 3, comes later and takes 0
    assert codes.tolist() == [[1, 2], [1, 3], [1, 2], [3, 0], [1, 3], [1, 0]]
    assert sizes == (4, 4) and unresolved == 0


def test_items_that_come_later_do_not_move_earlier_ones() -> None:
    def far(row: int) -> np.ndarray:
        return np.array(FAR[row])

    whole, _, _ = repair(CODES, (4, 4), TEXTS, "nearest", far)
    for n in range(1, len(CODES)):
        part, _, _ = repair(CODES[:n], (4, 4), TEXTS[:n], "nearest", far)
        assert (part == whole[:n]).all()


def test_a_full_prefix_is_counted() -> None:
    codes = np.zeros((5, 2), dtype=np.int64)
    out, _, unresolved = repair(codes, (1, 3), list("abcde"), "nearest", lambda row: np.arange(3.0))
    assert unresolved == 2 and len(np.unique(out[:3], axis=0)) == 3


def test_items_without_text_are_the_same_as_no_other() -> None:
    codes = np.zeros((2, 2), dtype=np.int64)
    out, _, _ = repair(codes, (1, 3), [None, None], "nearest", lambda row: np.arange(3.0))
    assert out.tolist() == [[0, 0], [0, 1]]


def test_an_extra_digit() -> None:
    codes, sizes, _ = repair(CODES, (4, 4), TEXTS, "digit", lambda row: np.empty(0))
    assert codes.tolist() == [[1, 2, 0], [1, 2, 1], [1, 2, 0], [3, 0, 0], [1, 2, 1], [1, 3, 0]]
    assert sizes == (4, 4, 2)


def test_shared_leaves() -> None:
    codes, sizes, _ = repair(CODES, (4, 4), TEXTS, "shared", lambda row: np.empty(0))
    assert (codes == CODES).all() and sizes == (4, 4)
    with pytest.raises(ConfigError, match="semantic_ids_collisions"):
        repair(CODES, (4, 4), TEXTS, "sometimes", lambda row: np.empty(0))


def test_quality_by_hand() -> None:
    after, sizes, _ = repair(CODES, (4, 4), TEXTS, "nearest", lambda row: np.array(FAR[row]))
    told = quality(CODES, after, sizes, np.array([0, 0, 1, 1, 2, 2]))
    assert told["before"] == {"unique": 3, "colliding": 4, "share": pytest.approx(4 / 6), "largest": 4}
    assert told["after"]["colliding"] == 4 and told["after"]["largest"] == 2
    assert told["new_items"] == [2, 2, 2]
    assert told["levels"][0] == {"level": 1, "size": 4, "used": 2, "entropy_bits": pytest.approx(0.650022, abs=1e-6)}
    assert told["entropy_bits"] == pytest.approx(1.918296, abs=1e-6) and told["most_bits"] == pytest.approx(np.log2(6))


# -- index files --------------------------------------------------------------------------------------------------


def test_an_index_comes_back(tmp_path: Path) -> None:
    ids = SemanticIds(("x", "y"), np.array([[3, 250], [0, 1]]), (4, 256))
    write_index(tmp_path / "deep" / "ids.json", ids)
    assert json.loads((tmp_path / "deep" / "ids.json").read_text())["x"] == ["<a_3>", "<b_250>"]
    again = read_index(tmp_path / "deep" / "ids.json")
    assert again.items == ids.items and (again.codes == ids.codes).all() and again.sizes == (4, 256)
    assert again.of(["y", "x"]).tolist() == [[0, 1], [3, 250]]
    with pytest.raises(DataError, match=r"2 of 3 items have no codes in the index \('z', 'w'\)"):
        again.of(["z", "x", "w"])
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_index(tmp_path / "file" / "ids.json", ids)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"x": ["<a_1>", "<b_2>"', "is no index of items"),
        ("[1, 2]", "holds no items"),
        ("{}", "holds no items"),
        ('{"x": ["<a_1>", "<c_2>"]}', "codes of item 'x'"),
        ('{"x": ["<a_1>", "<b_-2>"]}', "codes of item 'x'"),
        ('{"x": ["<a_1>", 7]}', "codes of item 'x'"),
        ('{"x": "<a_1>"}', "codes of item 'x'"),
        ('{"x": []}', "codes of item 'x'"),
        ('{"x": ["<a_1>"], "y": ["<a_1>", "<b_2>"]}', "the item 'y' has 2 codes, the first item 1"),
        ('{"x": ["<a_1>"], "x": ["<a_2>"]}', "'x' stands in it twice"),
    ],
)
def test_a_malformed_index_is_told(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ids.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_index(path)


def test_an_index_that_is_not_there_or_too_large_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_index(tmp_path / "none.json")
    (tmp_path / "ids.json").write_text('{"x": ["<a_1>", "<b_300>"]}')
    with pytest.raises(DataError, match="level 2 go up to 300, but a level has 256 codes"):
        read_index(tmp_path / "ids.json", 256)
