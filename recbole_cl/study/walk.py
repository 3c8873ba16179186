"""Runs the cells of a study that are not done yet, each in the folder that it alone owns.

A cell that was interrupted goes on from its newest checkpoint; one that is done is not run again. A combination that a
strategy refuses is an answer, not a failure: its reason stands in ``refused.json`` and in the table.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recbole_cl.checkpoint import explained, write_atomically
from recbole_cl.errors import ConfigError, RecBoleCLError
from recbole_cl.study.found import FoundRun
from recbole_cl.study.plan import Cell, Plan
from recbole_cl.study.probes import run_probe

LOGGER = logging.getLogger("recbole_cl")
RESULT, REFUSED, CELL, PROBE, BASE = "result.json", "refused.json", "cell.json", "probe.json", "base"


def state(cell: Cell, folder: Path) -> str:
    """Returns ``done``, ``refused`` or ``open``.

    Raises:
        ConfigError: If the folder holds a run of other settings.
    """
    own = folder / cell.folder
    if isinstance(cell, FoundRun):
        return "done"  # only finished ones are found
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
        if (own / RESULT).is_file() and json.loads((own / CELL).read_text(encoding="utf-8")).get("done"):
            return "done"
        if (own / REFUSED).is_file():
            return "refused"
    return "open"


def run_cell(
    settings: dict[str, Any],
    own: str,
    digest: str,
    threads: int,
    probe: dict[str, Any] | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """Runs one cell in this process.

    Args:
        settings: Properties of the run.
        own: Folder of the run.
        digest: Hash of the settings.
        threads: Threads of torch.
        probe: What is measured of the finished model.
        base: Folder of the run whose first stage is taken over, where it still keeps it.

    Returns:
        ``state`` (done, refused or failed), ``told``, ``error`` (its class) and ``seconds``.
    """
    import torch

    from recbole_cl.config import CLConfig
    from recbole_cl.training.runner import Runner

    torch.set_num_threads(threads)
    logging.getLogger().setLevel(logging.ERROR)
    folder, begun = Path(own), time.perf_counter()
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        note = {"digest": digest, "settings": settings, **({"probe": probe} if probe else {}), "done": False}
        write_atomically(folder / CELL, json.dumps(note, indent=1, default=str))
    given = {**settings, "output_dir": own, "show_progress": False, "checkpoint_keep": 1}
    given["resume"] = (folder / "checkpoints").is_dir()
    if base == own:
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
        told = str(error) if isinstance(error, RecBoleCLError) else f"{type(error).__name__}: {error}"
        if not isinstance(error, RecBoleCLError):
            traceback.print_exc()
        found = {"state": "refused" if refused else "failed", "told": told, "error": type(error).__name__}
        return {**found, "seconds": time.perf_counter() - begun}
    write_atomically(folder / CELL, json.dumps({**note, "done": True}, indent=1, default=str))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # a study keeps numbers, not weights
    return {"state": "done", "told": "", "error": "", "seconds": time.perf_counter() - begun}


def walk(plan: Plan, folder: Path, jobs: int = 1, threads: int = 1) -> list[str]:
    """Runs what is open of a study.

    Args:
        plan: The study.
        folder: Its folder.
        jobs: Cells at a time, each in a process.
        threads: Threads of torch in each.

    Returns:
        A sentence for each cell that failed.

    Raises:
        ConfigError: If a folder holds a run of other settings.
    """
    bases = [cell for cell in plan.cells if cell.base == cell.folder]
    failures = {}
    if bases:  # others wait for what they take over
        failures = walk_cells(f"{plan.name} {plan.preset}, first stages", bases, folder, jobs, threads)
    failures |= walk_cells(f"{plan.name} {plan.preset}", plan.cells, folder, jobs, threads)
    for cell in bases:
        shutil.rmtree(folder / cell.folder / BASE, ignore_errors=True)
    return [f"{name}: {told}" for name, told in failures.items()]


def walk_cells(name: str, cells: Sequence[Cell], folder: Path, jobs: int = 1, threads: int = 1) -> dict[str, str]:
    """Runs the cells that are open and returns why some failed, by folder; see :func:`walk`."""
    asked = list(cells)
    todo = [cell for cell in asked if state(cell, folder) == "open"]
    LOGGER.info("%s: %d runs, %d of them done before", name, len(asked), len(asked) - len(todo))
    failures: dict[str, str] = {}
    if not todo:
        return failures
    pool = ProcessPoolExecutor(
        max(1, min(jobs, len(todo))), multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )
    bar = tqdm(total=len(todo), desc=name, unit="run", dynamic_ncols=True)
    waiting: dict[Future[dict[str, Any]], Cell] = {}
    try:
        queue = iter(todo)
        for cell in queue:
            waiting[_submit(pool, cell, folder, threads)] = cell
            if len(waiting) < jobs:
                continue
            _collect(waiting, bar, failures)
        while waiting:
            _collect(waiting, bar, failures)
    except BrokenProcessPool as error:
        names = ", ".join(cell.folder for cell in waiting.values())
        raise RecBoleCLError(
            f"a process of the study was killed while it ran {names} (too little memory?); run the same command again "
            f"to go on, with fewer --jobs"
        ) from error
    finally:
        bar.close()
        for process in list((pool._processes or {}).values()):
            if waiting:  # interrupted: what runs goes on from its checkpoint next time
                process.terminate()
        pool.shutdown(wait=not waiting, cancel_futures=True)
    return failures


def _end_with_parent() -> None:
    """Ends this process when the study's own is gone, also where that was killed and could not say so."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _submit(pool: ProcessPoolExecutor, cell: Cell, folder: Path, threads: int) -> Future[dict[str, Any]]:
    probe = None if cell.probe is None else dict(cell.probe)
    base = None if cell.base is None else str(folder / cell.base)
    return pool.submit(run_cell, dict(cell.settings), str(folder / cell.folder), cell.digest, threads, probe, base)


def _collect(waiting: dict[Future[dict[str, Any]], Cell], bar: Any, failures: dict[str, str]) -> None:
    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
        found = future.result()
        cell = waiting.pop(future)
        bar.update()
        bar.write(f"{cell.folder}: {found['state']} in {found['seconds']:.0f} s", file=bar.fp)
        if found["state"] == "failed":
            failures[cell.folder] = str(found["told"])
