"""Runs the cells of a study that are not done yet, each in the folder that it alone owns.

A cell that was interrupted goes on from its newest checkpoint; one that is done is not run again. A combination that a
strategy refuses is an answer, not a failure: its reason stands in ``refused.json`` and in the table.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recbole_cl.disk import clear, explained, refuse_links, refuse_links_to, write_atomically
from recbole_cl.errors import ConfigError, RecBoleCLError
from recbole_cl.lock import NAME, Holder, hold
from recbole_cl.registry import IMPORTED
from recbole_cl.report import write_report
from recbole_cl.study.claims import TABLES, alone, claim, give_back_of_the_dead, held, in_turn
from recbole_cl.study.found import FoundRun
from recbole_cl.study.plan import Cell, Plan
from recbole_cl.study.probes import run_probe

LOGGER = logging.getLogger("recbole_cl")
RESULT, REFUSED, CELL, PROBE, BASE = "result.json", "refused.json", "cell.json", "probe.json", "base"
WEIGHTS = ("frozen", "store")
"""What the checkpoints of a run refer to, the first stage that others take over included."""


def state(cell: Cell, folder: Path) -> str:
    """Returns ``done``, ``refused`` or ``open``.

    Raises:
        ConfigError: If the folder holds a run of other settings.
        OutputError: If a part of its path inside the study's folder is a link.
    """
    own = folder / cell.folder
    if isinstance(cell, FoundRun):
        return "done"  # only finished ones are found
    refuse_links_to(folder, cell.folder)
    if (own / CELL).is_file():
        then = json.loads((own / CELL).read_text(encoding="utf-8"))
        if then["digest"] != cell.digest:
            now = dict(cell.settings)
            changed = sorted(k for k in {*now, *then["settings"]} if now.get(k) != then["settings"].get(k))
            changed += ["probe"] if then.get("probe") != cell.probe else []
            raise ConfigError(
                f"{own} holds a run with other settings ({', '.join(changed) or 'digest'} differ); give the study "
                f"another --output_dir, or remove that folder"
            )
        if done(own, cell.digest):
            return "done"
        if (own / REFUSED).is_file():
            return "refused"
    return "open"


def done(own: Path, digest: str) -> bool:
    """Tells whether a folder holds the results of a cell."""
    if not ((own / RESULT).is_file() and (own / CELL).is_file()):
        return False
    then = json.loads((own / CELL).read_text(encoding="utf-8"))
    return bool(then["digest"] == digest and then.get("done"))


def run_cell(
    settings: dict[str, Any],
    own: str,
    digest: str,
    threads: int,
    probe: dict[str, Any] | None = None,
    base: str | None = None,
    shared: bool = False,
) -> dict[str, Any]:
    """Runs one cell in this process; nobody else works in its folder meanwhile.

    Args:
        settings: Properties of the run.
        own: Folder of the run.
        digest: Hash of the settings.
        threads: Threads of torch.
        probe: What is measured of the finished model.
        base: Folder of the run whose first stage is taken over, where it still keeps it.
        shared: Other processes work on the study, too: the cell is claimed first (:mod:`recbole_cl.study.claims`).

    Returns:
        ``state`` (done, refused, failed, or elsewhere where another process has it), ``told``, ``error`` (its class)
        and ``seconds``.
    """
    begun = time.perf_counter()
    with contextlib.ExitStack() as stack:
        if shared:
            with explained(Path(own)):
                mine = claim(Path(own))
            if mine is None:
                return {"state": "elsewhere", "told": "", "error": "", "seconds": 0.0}
            stack.callback(lambda: mine.release(done(Path(own), digest) or (Path(own) / REFUSED).is_file()))
            _forget_lock_of_the_dead(Path(own))
        try:
            with hold(Path(own), "a run of a study"):
                found = _run_held(settings, Path(own), digest, threads, probe, base)
        except RecBoleCLError as error:  # another process's, or no folder that can be written
            found = {"state": "failed", "told": str(error), "error": type(error).__name__}
        return {**found, "seconds": time.perf_counter() - begun}


def _forget_lock_of_the_dead(own: Path) -> None:
    """Removes the lock of another host from a cell that is claimed: its owner was silent for long (see claims)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(own / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            holder = Holder.read(descriptor)
        finally:
            os.close(descriptor)
        if holder is not None and not holder.here:
            (own / NAME).unlink(missing_ok=True)


def _run_held(
    settings: dict[str, Any], folder: Path, digest: str, threads: int, probe: dict[str, Any] | None, base: str | None
) -> dict[str, Any]:
    """Runs one cell whose folder is held; returns ``state``, ``told`` and ``error``."""
    import torch

    from recbole_cl.config import CLConfig
    from recbole_cl.training.runner import Runner

    if done(folder, digest):
        return {"state": "done", "told": "", "error": ""}  # another process has run it meanwhile
    torch.set_num_threads(threads)
    logging.getLogger().setLevel(logging.ERROR)
    with explained(folder):
        refuse_links(folder, (CELL, REFUSED, PROBE))
        note = {"digest": digest, "settings": settings, **({"probe": probe} if probe else {}), "done": False}
        write_atomically(folder / CELL, json.dumps(note, indent=1, default=str))
    given = {**settings, "output_dir": str(folder), "show_progress": False, "checkpoint_keep": 1}
    given["resume"] = (folder / "checkpoints").is_dir()
    if base == str(folder):
        given["keep_base"] = True
    elif base is not None and (Path(base) / BASE).is_dir():
        given["base_run"] = base
    names = {key: given.pop(key) for key in ("model", "dataset")}
    try:
        runner = Runner(CLConfig(**names, config_dict=given))
        runner.run()
        if probe:
            write_atomically(folder / PROBE, json.dumps(run_probe(probe, runner), indent=1))
    except Exception as error:
        refused = isinstance(error, ConfigError) and str(error).startswith("strategy:")
        if refused:
            write_atomically(folder / REFUSED, json.dumps({"reason": str(error)}, indent=1))
        reason = str(error) if isinstance(error, RecBoleCLError) else f"{type(error).__name__}: {error}"
        if not isinstance(error, RecBoleCLError):
            traceback.print_exc()
        return {"state": "refused" if refused else "failed", "told": reason, "error": type(error).__name__}
    write_atomically(folder / CELL, json.dumps({**note, "done": True}, indent=1, default=str))
    for name in ("checkpoints", *(() if base == str(folder) else WEIGHTS)):  # a study keeps numbers, not weights
        clear(folder / name)
    return {"state": "done", "told": "", "error": ""}


def walk(
    plan: Plan,
    folder: Path,
    jobs: int = 1,
    threads: int = 1,
    shard: tuple[int, int] | None = None,
    until: float | None = None,
) -> list[str]:
    """Runs what is open of a study.

    Args:
        plan: The study.
        folder: Its folder.
        jobs: Cells at a time, each in a process.
        threads: Threads of torch in each.
        shard: This process is number i of n that share the folder: it takes its own share first, then helps the others.
            Cells are claimed (:mod:`recbole_cl.study.claims`).
        until: Moment (of ``time.monotonic``) at which what runs is interrupted; it goes on from its checkpoint later.

    Returns:
        A sentence for each cell that failed.

    Raises:
        ConfigError: If a folder holds a run of other settings.
        OutputError: If something that the study writes is a link in its folder.
    """
    refuse_links(folder, ("table.md", "table.csv", "plots.html"))  # what is written when all runs are done
    plan.check_logs()
    asked = _Asked(folder, jobs, threads, shard, until)
    bases = [cell for cell in plan.cells if cell.base == cell.folder]
    failures = {}
    if bases:  # others wait for what they take over
        failures = _walk_cells(f"{plan.name} {plan.preset}, first stages", bases, asked)
    failures |= _walk_cells(f"{plan.name} {plan.preset}", plan.cells, asked)
    for cell in bases:
        users = [other for other in plan.cells if other.base == cell.folder]
        if (shard is None and until is None) or all(state(other, folder) != "open" for other in users):
            for name in (BASE, *WEIGHTS):
                clear(folder / cell.folder / name)
    return [f"{name}: {reason}" for name, reason in failures.items()]


@dataclass(frozen=True)
class _Asked:
    folder: Path
    jobs: int = 1
    threads: int = 1
    shard: tuple[int, int] | None = None
    until: float | None = None

    def late(self) -> bool:
        return self.until is not None and time.monotonic() >= self.until

    def left(self) -> float | None:
        return None if self.until is None else max(0.0, self.until - time.monotonic())


def walk_cells(name: str, cells: Sequence[Cell], folder: Path, jobs: int = 1, threads: int = 1) -> dict[str, str]:
    """Runs the cells that are open and returns why some failed, by folder; see :func:`walk`."""
    return _walk_cells(name, cells, _Asked(folder, jobs, threads))


def _walk_cells(name: str, cells: Sequence[Cell], asked: _Asked) -> dict[str, str]:
    """Goes over the cells; a shard does so again as long as it finds one to run, for owners may have died meanwhile."""
    order = list(cells)
    failures: dict[str, str] = {}
    if asked.shard is not None:
        order = [order[index] for index in in_turn(len(order), asked.shard)]
    while not asked.late():
        more, ran = _one_walk(name, [cell for cell in order if cell.folder not in failures], asked)
        failures |= more
        if asked.shard is None or not ran:
            break
    return failures


def _one_walk(name: str, cells: Sequence[Cell], asked: _Asked) -> tuple[dict[str, str], int]:
    """Runs the cells that are open; returns why some failed, by folder, and how many were run here."""
    todo = [cell for cell in cells if state(cell, asked.folder) == "open"]
    LOGGER.info("%s: %d runs, %d of them done before", name, len(cells), len(cells) - len(todo))
    failures: dict[str, str] = {}
    ran = 0
    if asked.shard is not None:
        todo = [cell for cell in todo if not held(asked.folder / cell.folder)]
    if not todo:
        return failures, ran
    pool = ProcessPoolExecutor(
        max(1, min(asked.jobs, len(todo))),
        multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(tuple(IMPORTED),),
    )
    bar = tqdm(total=len(todo), desc=name, unit="run", dynamic_ncols=True)
    waiting: dict[Future[dict[str, Any]], Cell] = {}
    processes: list[Any] = []
    try:
        queue = iter(todo)
        for cell in queue:
            if asked.late():
                break
            waiting[_submit(pool, cell, asked)] = cell
            if len(waiting) < asked.jobs:
                continue
            ran += _collect(waiting, bar, failures, asked)
        while waiting and not asked.late():
            ran += _collect(waiting, bar, failures, asked)
        if waiting:
            LOGGER.warning("%s: time is up, %d runs are interrupted and go on next time", name, len(waiting))
    except BrokenProcessPool as error:
        names = ", ".join(cell.folder for cell in waiting.values())
        raise RecBoleCLError(
            f"a process of the study was killed while it ran {names} (too little memory?); run the same command again "
            f"to go on, with fewer --jobs"
        ) from error
    finally:
        bar.close()
        processes = list((pool._processes or {}).values())
        for process in processes:
            if waiting:  # interrupted: what runs goes on from its checkpoint next time
                process.terminate()
        pool.shutdown(wait=not waiting, cancel_futures=True)
        if waiting and asked.shard is not None:
            for process in processes:
                process.join(10)
            for cell in waiting.values():  # other machines need not wait until its claim is stale
                give_back_of_the_dead(asked.folder / cell.folder)
    return failures, ran


def _begin(modules: Sequence[str]) -> None:
    """Imports what the command was asked to import, and ends this process when the study's own is gone.

    That one may have been killed, and could not say so.
    """
    for name in modules:
        importlib.import_module(name)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _submit(pool: ProcessPoolExecutor, cell: Cell, asked: _Asked) -> Future[dict[str, Any]]:
    probe = None if cell.probe is None else dict(cell.probe)
    base = None if cell.base is None else str(asked.folder / cell.base)
    own, shared = str(asked.folder / cell.folder), asked.shard is not None
    return pool.submit(run_cell, dict(cell.settings), own, cell.digest, asked.threads, probe, base, shared)


def _collect(waiting: dict[Future[dict[str, Any]], Cell], bar: Any, failures: dict[str, str], asked: _Asked) -> int:
    """Takes in what is ready, or waits until the time is up; returns how many cells were run."""
    ran = 0
    for future in wait(waiting, timeout=asked.left(), return_when=FIRST_COMPLETED).done:
        found = future.result()
        cell = waiting.pop(future)
        bar.update()
        bar.write(f"{cell.folder}: {found['state']} in {found['seconds']:.0f} s", file=getattr(bar, "fp", None))
        ran += found["state"] != "elsewhere"
        if found["state"] == "done":
            own = asked.folder / cell.folder
            with alone(asked.folder / TABLES) if asked.shard else contextlib.nullcontext():
                write_report(json.loads((own / RESULT).read_text(encoding="utf-8")), own, shared=asked.folder)
        if found["state"] == "failed":
            failures[cell.folder] = str(found["told"])
    return ran
