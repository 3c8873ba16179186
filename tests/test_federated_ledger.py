"""The ledger: charged before anything is drawn, kept through kills, shared by processes, refused over budget."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from recbole_cl.errors import CheckpointError
from recbole_cl.federated.ledger import BudgetSpent, Ledger, hash_of
from recbole_cl.federated.privacy import Release

COST = Release(2.0)
NEEDS = "dp-accounting, of the extra 'federated', is not installed"


def values(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(3, 2))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_round_run_again_gets_what_was_released(tmp_path: Path) -> None:
    """The same id and input: the same bits, uncharged, and nothing is drawn. Other input under the id is charged."""
    path = tmp_path / "some" / "ledger.jsonl"
    ledger = Ledger(path, np.inf, 1e-5)
    first = ledger.release("r1", "a", COST, values)
    again = Ledger(path, np.inf, 1e-5).release("r1", "a", COST, lambda: pytest.fail("drawn again"))
    assert np.array_equal(first, again) and first.dtype == again.dtype == np.float64
    assert ledger.charges() == [COST] and ledger.rounds() == {"r1"}
    other = ledger.release("r1", "b", COST, lambda: values(1))
    assert not np.array_equal(first, other) and ledger.charges() == [COST, COST]
    assert np.array_equal(ledger.release("r1", "a", COST, values), first)


def _release(path: Path, die_at: str, seed: int) -> None:
    def at(step: str) -> None:
        if step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    Ledger(path, np.inf, 1e-5, at).release("r1", "a", COST, lambda: values(seed))


@pytest.mark.parametrize("step", ["charged", "drawn", "written"])
def test_killed_at_each_step(step: str, tmp_path: Path) -> None:
    """What was charged stays charged, once; a release that was written is the one that the round gets again."""
    path = tmp_path / "ledger.jsonl"
    process = multiprocessing.get_context("forkserver").Process(target=_release, args=(path, step, 0))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert Ledger(path, np.inf, 1e-5).charges() == [COST], "killed after the charge, and it is not counted"
    found = Ledger(path, np.inf, 1e-5).release("r1", "a", COST, lambda: values(1))
    assert np.array_equal(found, values(0 if step == "written" else 1))
    assert Ledger(path, np.inf, 1e-5).charges() == [COST]
    assert [line["kind"] for line in lines(path)] == ["charge", "release"]


@pytest.mark.parametrize("cut", [1, 7, 40])
@pytest.mark.parametrize("kind", ["charge", "release"])
def test_a_line_that_was_cut_is_dropped(kind: str, cut: int, tmp_path: Path) -> None:
    """A write that power cut short: nothing was released on it. The round is run again and charged once."""
    path = tmp_path / "ledger.jsonl"
    Ledger(path, np.inf, 1e-5).release("r0", "z", COST, values)
    Ledger(path, np.inf, 1e-5).release("r1", "a", COST, values)
    whole = path.read_bytes().splitlines(keepends=True)
    keep = 2 if kind == "charge" else 3
    path.write_bytes(b"".join(whole[:keep]) + whole[keep][:-cut])
    ledger = Ledger(path, np.inf, 1e-5)
    assert len(ledger.charges()) == (1 if kind == "charge" else 2)
    ledger.release("r1", "a", COST, values)
    assert path.read_bytes() == b"".join(whole), "the ledger is whole again"


@pytest.mark.parametrize(
    "tamper",
    [
        lambda rows: [rows[0].replace(b"2.0", b"9.0"), *rows[1:]],
        lambda rows: rows[2:],
        lambda rows: [rows[0], *rows[2:]],
        lambda rows: [rows[2], rows[3], rows[0], rows[1]],
        lambda rows: [b"nothing\n", *rows],
    ],
)
def test_a_ledger_that_was_changed_is_refused(tamper, tmp_path: Path) -> None:
    """Edited noise, lines taken away or moved: no budget can be told from it."""
    path = tmp_path / "ledger.jsonl"
    for round_id in ("r0", "r1"):
        Ledger(path, np.inf, 1e-5).release(round_id, "a", COST, values)
    path.write_bytes(b"".join(tamper(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(CheckpointError, match=r"protofed_ledger.*Restore"):
        Ledger(path, np.inf, 1e-5).charges()


def test_the_budget_stops_the_release(tmp_path: Path) -> None:
    """Nothing is charged and nothing drawn; what was released before is still to be had."""
    pytest.importorskip("dp_accounting", reason=NEEDS)
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, 3.5, 1e-5)
    first = ledger.release("r0", "a", COST, values)
    ledger.release("r1", "a", COST, values)
    size = path.stat().st_size
    with pytest.raises(BudgetSpent, match=r"'r2'.*more than the budget of 3.5") as told:
        ledger.release("r2", "a", COST, lambda: pytest.fail("drawn over budget"))
    assert "holds 2 releases" in str(told.value) and path.stat().st_size == size
    assert np.array_equal(ledger.release("r0", "a", COST, values), first)
    assert ledger.spent() <= 3.5 < Ledger(path, 9.0, 1e-5).spent() + 1.0


def _many(path: Path, who: int) -> None:
    ledger = Ledger(path, np.inf, 1e-5)
    for number in range(5):
        ledger.release(f"p{who}/{number}", "a", COST, lambda: values(who))
        ledger.release(f"shared/{number}", "a", COST, lambda: values(who))


def test_processes_share_a_ledger(tmp_path: Path) -> None:
    """Each one's releases are in it once, and a round that all of them run was released by one of them."""
    path = tmp_path / "ledger.jsonl"
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=_many, args=(path, who)) for who in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    ledger = Ledger(path, np.inf, 1e-5)
    assert len(ledger.charges()) == 3 * 5 + 5 and len(ledger.rounds()) == 20


def test_hashes_tell_arrays_apart() -> None:
    """By value, shape and type."""
    a = np.arange(6.0)
    assert hash_of(a) == hash_of(a.copy())
    assert len({hash_of(a), hash_of(a.reshape(2, 3)), hash_of(a.astype(np.float32)), hash_of(a + 1e-12)}) == 4
