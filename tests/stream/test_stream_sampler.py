"""Negatives: who is excluded, how often each item comes, what happens when few are left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from stream_helpers import random_rows, stage_context, stream_of, write

from recbole_cl.errors import DataError
from recbole_cl.stream.loader import make_loader
from recbole_cl.stream.negatives import make_sampler
from recbole_cl.stream.sampler import NegativeSampler

NOTHING = np.empty(0, dtype=np.int64)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(4, 30),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), max_size=40),
    st.integers(1, 4),
    st.sampled_from(["uniform", "popularity"]),
    st.integers(0, 5),
)
def test_never_used_positive_or_out_of_range(
    n_items: int, pairs: list[tuple[int, int]], num: int, distribution: str, seed: int
) -> None:
    pairs = [(1, 1), (2, 2), (3, 3), *pairs]  # so that three items are popular
    user, item = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    sampler = NegativeSampler(user, item, n_items, rng(seed), distribution)
    chance = set(range(1, n_items)) if distribution == "uniform" else {i for _, i in pairs if i < n_items}
    rows = np.array([1, 2, 3, 4, 5, 1, 6], dtype=np.int64)
    positive = np.array([1, 2, 3, 1, 1, 2, 3], dtype=np.int64)
    allowed = [chance - {i for u, i in pairs if u == user} - {p} for user, p in zip(rows, positive, strict=True)]
    if all(allowed):
        drawn = sampler.sample(rows, num, positive).reshape(num, len(rows))
        for block in drawn:
            assert all(int(item) in fine for item, fine in zip(block, allowed, strict=True))
    else:
        with pytest.raises(DataError, match="no item can be drawn for user id"):
            sampler.sample(rows, num, positive)
    repeated = sampler.sample_repeatable(num, positive)
    assert len(repeated) == num * len(rows) and (repeated != np.tile(positive, num)).all()
    assert set(repeated.tolist()) <= chance


def test_uniform_over_what_is_allowed() -> None:
    user, item = np.array([1, 1, 1, 2]), np.array([3, 4, 5, 6])
    sampler = NegativeSampler(user, item, 21, rng())
    drawn = sampler.sample(np.full(20000, 1), 1, np.full(20000, 7))
    counts = np.bincount(drawn, minlength=21)
    allowed = [i for i in range(1, 21) if i not in (3, 4, 5, 7)]
    assert counts.sum() == counts[allowed].sum()
    assert chisquare(counts[allowed]).pvalue > 0.001


def test_popularity_to_the_power_alpha() -> None:
    item = np.repeat([1, 2, 3, 4], [1, 2, 4, 16])
    for alpha in (1.0, 0.5):
        sampler = NegativeSampler(np.full(len(item), 9), item, 6, rng(), "popularity", alpha)
        counts = np.bincount(sampler.sample(np.full(30000, 1), 1), minlength=6)
        weight = np.array([1, 2, 4, 16.0]) ** alpha
        assert counts[0] == counts[5] == 0  # nobody had item 5
        assert chisquare(counts[1:5], 30000 * weight / weight.sum()).pvalue > 0.001


def test_few_allowed_items_are_found_and_drawn_fairly() -> None:
    n = 3000
    item = np.setdiff1d(np.arange(1, n), [17, 2500])
    sampler = NegativeSampler(np.ones(len(item), dtype=np.int64), item, n, rng())
    drawn = sampler.sample(np.ones(400, dtype=np.int64), 1)
    assert set(drawn.tolist()) == {17, 2500} and 150 < (drawn == 17).sum() < 250
    assert set(sampler.sample(np.ones(50, dtype=np.int64), 1, np.full(50, 17)).tolist()) == {2500}


def test_pool() -> None:
    pool = np.array([2, 3, 8, 9])
    sampler = NegativeSampler(np.array([1, 1]), np.array([2, 3]), 10, rng(), pool=pool)
    assert set(sampler.sample(np.ones(200, dtype=np.int64), 2).tolist()) == {8, 9}
    assert set(sampler.sample(np.full(200, 4), 2).tolist()) == set(pool.tolist())
    assert set(sampler.sample(np.ones(200, dtype=np.int64), 1, np.full(200, 8)).tolist()) == {9}
    full = NegativeSampler(np.ones(4, dtype=np.int64), pool, 10, rng(), pool=pool)
    with pytest.raises(DataError, match="no item can be drawn for user id 1"):
        full.sample(np.ones(1, dtype=np.int64), 1)


def test_errors_name_who_and_what() -> None:
    with pytest.raises(DataError, match="at least two known items, there are 1"):
        NegativeSampler(NOTHING, NOTHING, 2, rng())
    everything = NegativeSampler(np.ones(4, dtype=np.int64), np.arange(1, 5), 5, rng())
    assert set(everything.sample(np.full(50, 2), 1).tolist()) == {1, 2, 3, 4}  # the others are not concerned
    with pytest.raises(DataError, match=r"user id 1: of the 4 known items .* user_inter_num_interval"):
        everything.sample(np.array([2, 1]), 1)
    assert everything.sample_repeatable(3, np.array([1, 2])).shape == (
        6,
    )  # a repeatable scene has negatives all the same
    one = NegativeSampler(np.array([1]), np.array([3]), 5, rng(), "popularity")
    with pytest.raises(DataError, match="for the target 3"):
        one.sample_repeatable(1, np.array([3]))


def test_larger_ids_do_not_spill_to_the_next_user() -> None:
    sampler = NegativeSampler(np.array([1]), np.array([12]), 10, rng())  # 1 * 10 + 12 == 2 * 10 + 2
    assert set(sampler.sample(np.full(300, 2), 1).tolist()) == set(range(1, 10))


def test_excluded_is_the_training_past_only(tmp_path: Path) -> None:
    write(tmp_path, random_rows(300, users=6, items=200))
    config, stream = stream_of(tmp_path, model="BPR")
    table = stream.table
    for stage in stream.stages:
        sampler = make_sampler(config, stream, stage.index, stage.n_items, rng())
        assert sampler is not None
        past = np.concatenate([s.train.position for s in stream.stages[: stage.index + 1]])
        want = {(int(table.user[p]), int(table.item[p])) for p in past}
        assert {(int(k // stage.n_items), int(k % stage.n_items)) for k in sampler.used} == want
        ctx = stage_context(config, stream, stage.index)
        for batch in make_loader(ctx, stage.train, "train"):
            pairs = zip(batch["user_id"].tolist(), batch["neg_item_id"].tolist(), strict=True)
            assert not want & set(pairs)
    config["train_neg_sample_args"] = {"distribution": "none", "sample_num": "none"}
    assert make_sampler(config, stream, 0, 10, rng()) is None


def test_users_without_negatives_are_told_before_training(tmp_path: Path) -> None:
    rows = [("greedy", f"i{k % 6}", k) for k in range(30)] + [("modest", "i1", 7), ("modest", "i2", 9)]
    write(tmp_path, sorted(rows, key=lambda row: row[2]))
    config, stream = stream_of(tmp_path, model="BPR", n_stages=1)
    with pytest.raises(DataError, match=r"at stage 1, 1 users \(greedy, \.\.\.\) have interacted with every item"):
        make_loader(stage_context(config, stream, 0), stream.stages[0].train, "train")
    config, stream = stream_of(tmp_path, model="GRU4Rec", n_stages=1, loss_type="BPR", train_positions="last")
    for batch in make_loader(stage_context(config, stream, 0), stream.stages[0].train, "train"):
        assert (batch["neg_item_id"] != batch["item_id"]).all()  # repeats are possible in sequences: negatives are, too
