"""Which targets of a stage are trained, validated and tested.

A position has one role for the whole stream, so that a held-out target never becomes a training target of a later
stage; it is history there. Only ``next_stage`` tests on what the next stage trains on, and says so
(:attr:`recbole_cl.stream.stage.Stage.tested_until`).
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from recbole.utils import ModelType

from recbole_cl.rng import numpy_generator
from recbole_cl.stream.table import NONE, TEST, TRAIN, VALID


def roles(config: Any, user: np.ndarray, time: np.ndarray, stage: np.ndarray) -> np.ndarray:
    """Returns the role of each position of a table sorted by (stage, time).

    ::

        tail           |  train (80 %)            | valid (10 %) | test (10 %) |     of the stage, by time
        user_tail      the same cut inside each user's part of the stage
        leave_one_out  u: train ... train | valid | test                           inside each user's part
        next_stage     |  train (90 %)                     | valid (10 %) |   test: the whole next slice

    Ties at a cut of ``tail`` go to the earlier part. ``valid_split: random`` draws the validation targets from what
    is not tested instead of taking its end.

    Args:
        config: ``stage_split``, ``valid_split``, ``stage_ratios``, ``min_user_inter`` and ``seed`` are read.
        user: User codes, shape ``[N]``.
        time: Timestamps, shape ``[N]``.
        stage: Stages, shape ``[N]``, not decreasing.

    Returns:
        int8 array of TRAIN, VALID, TEST or NONE (no target: its user has too few interactions in the stage).
    """
    if config["parity"]:
        return recbole_roles(config, user)
    shares = np.asarray(config["stage_ratios"], dtype=np.float64)
    shares = shares / shares.sum()
    how = config["stage_split"]
    if how == "next_stage":
        shares = np.array([shares[0], shares[1], 0.0]) / (shares[0] + shares[1])
    rng = numpy_generator(config["seed"], 0, "valid_split")
    role = np.full(len(user), NONE, dtype=np.int8)
    edges = np.flatnonzero(np.r_[True, np.diff(stage) != 0, True]) if len(stage) else np.array([0])
    for start, end in itertools.pairwise(edges):
        rows = np.arange(start, end)
        counts = np.bincount(user[rows])
        rows = rows[counts[user[rows]] >= config["min_user_inter"]]
        if not len(rows):
            continue
        if how in ("tail", "next_stage"):
            role[rows] = _tail(time[rows], shares)
        else:
            role[rows] = _per_user(user[rows], shares, one_out=how == "leave_one_out")
        if config["valid_split"] == "random":
            kept = rows[role[rows] != TEST]
            n_valid = round(len(kept) * shares[1] / (shares[0] + shares[1]))
            role[kept] = TRAIN
            role[rng.choice(kept, size=n_valid, replace=False)] = VALID
    return role


def _tail(time: np.ndarray, shares: np.ndarray) -> np.ndarray:
    n = len(time)
    cuts = np.rint(np.cumsum(shares)[:-1] * n).astype(np.int64)
    # Each cut moves behind the last row that shares its time: ties go to the earlier part.
    cuts = np.array([cut if cut in (0, n) else np.searchsorted(time, time[cut - 1], side="right") for cut in cuts])
    return np.searchsorted(cuts, np.arange(n), side="right").astype(np.int8)


def _per_user(user: np.ndarray, shares: np.ndarray, one_out: bool) -> np.ndarray:
    order = np.argsort(user, kind="stable")
    grouped = user[order]
    starts = np.flatnonzero(np.r_[True, grouped[1:] != grouped[:-1]])
    counts = np.diff(np.r_[starts, len(grouped)])
    if one_out:
        test = ((counts >= 2) & (shares[2] > 0)).astype(np.int64)
        valid = ((counts >= 3) & (shares[1] > 0)).astype(np.int64)
    else:
        # As RecBole: rounded down, but at least one where the user has enough. 100 * 0.29 must not give 28.
        test = np.where(counts >= 2, np.maximum((counts * shares[2] + 1e-9).astype(np.int64), shares[2] > 0), 0)
        valid = np.where(counts >= 3, np.maximum((counts * shares[1] + 1e-9).astype(np.int64), shares[1] > 0), 0)
    from_end = np.repeat(starts + counts, counts) - 1 - np.arange(len(grouped))
    test, valid = np.repeat(test, counts), np.repeat(valid, counts)
    role = np.empty(len(user), dtype=np.int8)
    role[order] = np.where(from_end < test, TEST, np.where(from_end < test + valid, VALID, TRAIN))
    return role


def vocabulary_phase(config: Any, role: np.ndarray) -> np.ndarray:
    """Returns 0 for positions whose users and items a stage's training may know, 1 for those known after it.

    Ids are given by (stage, phase, time), so that "known when stage t is trained" is ``id < n_t`` whatever the split:
    an item that occurs first among a stage's held-out targets gets its row with the next stage. Randomly drawn
    validation targets lie between training targets and are history of later ones, hence phase 0.
    """
    if config["parity"]:  # RecBole gives ids before it splits
        return np.zeros(len(role), dtype=np.int8)
    early = role == TRAIN
    if config["valid_split"] == "random":
        early |= role == VALID
    return np.where(early, 0, 1).astype(np.int8)


def recbole_roles(config: Any, user: np.ndarray) -> np.ndarray:
    """Returns the roles of RecBole's leave-one-out split of a log in time order, shape ``[N]``.

    ::

        general      u: train ... train | valid | test        (two interactions: train, test; one: train)
        sequential   u: (first) | train ... train | valid | test

    RecBole's sequential datasets split the augmented rows, of which a user's first interaction is none: it stays
    history here, and a user with two interactions has a training row, not a test row.

    Args:
        config: ``MODEL_TYPE`` is read.
        user: User codes, shape ``[N]``.
    """
    order = np.argsort(user, kind="stable")
    grouped = user[order]
    first = np.r_[True, grouped[1:] != grouped[:-1]] if len(user) else np.empty(0, dtype=bool)
    starts = np.flatnonzero(first)
    counts = np.diff(np.r_[starts, len(grouped)])
    rows = np.repeat(counts - (config["MODEL_TYPE"] == ModelType.SEQUENTIAL), counts)
    from_end = np.repeat(starts + counts, counts) - 1 - np.arange(len(grouped))
    role = np.empty(len(user), dtype=np.int8)
    test, valid = (rows >= 2) & (from_end == 0), (rows >= 3) & (from_end == 1)
    role[order] = np.where(test, TEST, np.where(valid, VALID, TRAIN))
    return role
