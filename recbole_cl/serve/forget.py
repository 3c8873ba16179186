"""Users forgotten, and items retired.

A forgotten user is gone from all that a run keeps: each version and the run's own checkpoint are written anew over a
store without the user's interactions, features and token, with the user's rows in tables, optimiser moments and
memories taken out; what a language model wrote about the user is removed from its cache. The new versions are written
beside the old ones and one rename puts them in their place, so a killed process leaves a run that can be served, and
the same command finishes the work. What the *shared* weights learnt from the user, and the figures of the run, stay:
only training anew without the user undoes that.

A retired item keeps its row, so histories that hold it go on counting; no version recommends it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recbole_cl import checkpoint
from recbole_cl.errors import CheckpointError
from recbole_cl.serve.ids import token
from recbole_cl.stream.without import PLACE
from recbole_cl.training.forget import forget_outside, forgotten
from recbole_cl.training.load import SavedRun
from recbole_cl.training.store import keep_stream
from recbole_cl.training.versions import FOLDER, Versions, locked

LOGGER = logging.getLogger("recbole_cl")


@dataclass
class Forgotten:
    """What forgetting came to.

    Args:
        users: Users who were there and are gone.
        unknown: Users whom no version knows.
        versions: Numbers of the versions that were written anew.
        rows: Interactions that are gone, of the version that had most of them.
        texts: What a language model had written about them.
        found: Their tokens, for whoever has to remove them elsewhere; written nowhere.
    """

    users: int = 0
    unknown: int = 0
    versions: list[int] = field(default_factory=list)
    rows: int = 0
    texts: int = 0
    found: set[str] = field(default_factory=set, repr=False)

    def __str__(self) -> str:
        text = f"{self.users} users and {self.rows} of their rows forgotten"
        if self.texts:
            text += f", {self.texts} texts about them removed"
        return text + (f"; {self.unknown} are in no version" if self.unknown else "")


def forget(run: str | Path, users: Sequence[Any], model_class: type | None = None) -> Forgotten:
    """Removes users from every version and checkpoint that a run keeps, and from earlier runs in its folder.

    Checkpoints of the run itself but the newest are removed, and so is the first stage that ``keep_base`` kept.

    Args:
        run: The run's folder.
        users: Their tokens; those whom no version knows are counted.
        model_class: The model's class, where nobody here answers to its name.

    Raises:
        CheckpointError: If a version cannot be read, so that nobody can say what it holds.
    """
    folder = Path(run).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r} is no folder; give the output folder of a run")
    with locked(folder, "forget"):
        return _forget(folder, [token(user) for user in users], model_class)


def _forget(folder: Path, users: list[str], model_class: type | None) -> Forgotten:
    versions = Versions.of(folder)
    forgotten = Forgotten()
    found, entries = forgotten.found, []
    number = versions.next_number()
    for entry in versions.entries:
        if entry.get("where") == "run":
            entries.append(entry)
            continue
        saved = SavedRun.of_state(versions, entry["number"], versions.read(entry["number"]), model_class)
        state = _without(saved, users, forgotten, found)
        if state is None:
            entries.append(entry)
            continue
        checkpoint.save(folder / FOLDER, number, state, keep=1 << 30)
        entries.append({**entry, "folder": number, "store": state["store"]})
        forgotten.versions.append(entry["number"])
        number += 1
    if checkpoint.numbered(folder / "checkpoints"):
        own = Versions(folder, 0, [{"number": 0, "where": "run", "store": None}])
        state = own.read(0)
        newest = int(checkpoint.numbered(folder / "checkpoints")[-1].name)
        changed = _without(SavedRun.of_state(own, 0, state, model_class), users, forgotten, found)
        if changed is not None:
            forgotten.versions += [entry["number"] for entry in entries if entry.get("where") == "run"]
        # Older ones are a way back only where the newest is broken, and it is not.
        if changed is not None or len(checkpoint.numbered(folder / "checkpoints")) > 1:
            checkpoint.save(folder / "checkpoints", newest + 1, changed or state, keep=1)
    for earlier in sorted(folder.glob("earlier-*")):  # before the stores that they share are cleared away
        _forget_earlier(earlier, users, model_class, forgotten, found)
    versions.entries = entries
    if (folder / FOLDER / "index.json").is_file():
        versions.write()
    for path in (folder / "base", folder / "checkpoints" / ".writing", folder / FOLDER / ".writing"):
        shutil.rmtree(path, ignore_errors=True)
    versions.clean()
    forgotten.users, forgotten.unknown = len(found), len(set(users) - found)
    forgotten.versions.sort()
    LOGGER.info("forget: %s", forgotten)
    return forgotten


def _forget_earlier(
    folder: Path, users: list[str], model_class: type | None, forgotten: Forgotten, found: set[str]
) -> None:
    """Forgets in a run that was moved aside; where it cannot be loaded any more, its checkpoints are removed."""
    try:
        before = _forget(folder, users, model_class)
    except CheckpointError as error:
        LOGGER.warning("forget: %s cannot be loaded (%s); its checkpoints are removed", folder.name, error)
        for name in ("checkpoints", FOLDER, "base", "store"):
            shutil.rmtree(folder / name, ignore_errors=True)
        return
    forgotten.rows, forgotten.texts = max(forgotten.rows, before.rows), forgotten.texts + before.texts
    found.update(before.found)


def _without(saved: SavedRun, users: list[str], counted: Forgotten, found: set[str]) -> dict[str, Any] | None:
    """Returns the checkpoint of a saved run without users, its store written; ``None`` where it knows none of them."""
    dataset = saved.stream.dataset
    lookup = dataset.field2token_id[dataset.uid_field]
    ids = {user: lookup[user] for user in users if lookup.get(user, 0) and not user.startswith(PLACE)}
    if not ids:
        return None
    found.update(ids)
    counted.texts += forget_outside(saved, list(ids))
    state, stream = forgotten(saved, np.array(sorted(ids.values())))
    counted.rows = max(counted.rows, len(saved.stream.table) - len(stream.table))
    state["store"] = keep_stream(saved.folder, stream, saved.log)
    return state


# -- items --------------------------------------------------------------------------------------------------------


def retire(run: str | Path, items: Sequence[Any] = (), restore: Sequence[Any] = ()) -> list[str]:
    """Takes items out of all lists that a run gives from now on, in every version, or puts them back.

    Args:
        run: The run's folder.
        items: Tokens of items that are never recommended; also of items that the log does not have yet.
        restore: Tokens of items that are recommended again.

    Returns:
        All retired items.
    """
    folder = Path(run).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r} is no folder; give the output folder of a run")
    with locked(folder, "retire"):
        versions = Versions.of(folder)
        back = {token(item) for item in restore}
        kept = [item for item in versions.retired if item not in back]
        versions.retired = list(dict.fromkeys([*kept, *map(token, items)]))
        versions.write()
    return versions.retired
