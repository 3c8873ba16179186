"""Files that a run reads beside its log: what a checkpoint remembers of them.

The log and the tables that RecBole loads with it are in the stream's own fingerprint
(:meth:`recbole_cl.stream.build.Stream.fingerprint`). A property may name more (an index of codes, vectors of items, a
matrix), and some models read texts of items by themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from recbole_cl.errors import CheckpointError
from recbole_cl.seal import sha256

_READS_TEXTS = {"item": ("item_text", "_item_fields"), "user": ("user_text", "_user_fields")}
"""Ends of the properties that name columns of the ``.item`` and ``.user`` file which a model reads by itself."""
MOST = 1000
"""Files of a folder that a property names; larger ones are libraries, and not looked at."""


def files_read(config: Any) -> dict[str, str | None]:
    """Returns the files that a run reads beside its tables, by the name that messages give them, to their sha256.

    Args:
        config: The run's configuration.
    """
    return {name: sha256(path) for name, path in _named(config)}


def stores_named(config: Any, stores: Mapping[str, Any]) -> set[str]:
    """Returns the names of files, as :func:`files_read` gives them, that a run writes itself: caches, ledgers.

    Args:
        config: The run's configuration.
        stores: Name to path of the side stores that a checkpoint tells.
    """
    # SQLite keeps two files beside its own: answers.sqlite-wal, answers.sqlite-shm.
    places = [Path(path).expanduser().resolve() for path in stores.values()]
    return {
        name
        for name, path in _named(config)
        if any(
            place in (full := path.resolve(), *full.parents) or f"{full}".startswith(f"{place}-") for place in places
        )
    }


def _named(config: Any) -> Iterator[tuple[str, Path]]:
    final: Mapping[str, Any] = config.final_config_dict
    free = {*config.RESUME_MAY_CHANGE, "base_run"}
    for key in sorted(map(str, final)):
        values = final[key] if isinstance(final[key], list | tuple) else [final[key]]
        for value in values if key not in free else ():
            if isinstance(value, str) and ("/" in value or "." in value):
                yield from _files(key, value)
    folder, name = Path(config["data_path"] or ""), str(config["dataset"])
    for side, ends in _READS_TEXTS.items():
        file = folder / f"{name}.{side}"
        if any(str(key).endswith(ends) for key in final) and file.is_file():
            yield f"{file.name} in the dataset's folder", file
    for file in sorted(folder.glob("*.np[yz]")) if folder.is_dir() else ():
        yield f"{file.name} in the dataset's folder", file


def _files(key: str, value: str) -> Iterator[tuple[str, Path]]:
    """Yields the file that a property names, the one of the same name beside it, and those of a folder."""
    try:
        path = Path(value).expanduser()
        if path.is_file():
            beside = path.with_suffix(".txt")
            yield f"{path.name} of property {key!r}", path
            if beside != path and beside.is_file():
                yield f"{beside.name} of property {key!r}", beside
        elif path.is_dir():
            files = sorted(file for file in path.iterdir() if file.is_file())
            for file in files if len(files) <= MOST else ():
                yield f"{path.name}/{file.name} of property {key!r}", file
    except (OSError, ValueError, RuntimeError):  # no path, or the home of nobody
        return


def refuse_changed_files(now: Mapping[str, Any], then: Any, stores: Collection[str] = ()) -> None:
    """Raises a :class:`CheckpointError` that names a file which is not what it was when a checkpoint was written.

    Args:
        now: What :func:`files_read` gives.
        then: What it gave; ``None`` where that was not noted.
        stores: Names of files that the run writes itself.
    """
    if not isinstance(then, Mapping):
        return
    for name in sorted({*now, *then} - {*stores}):
        # What appears where a property names it is the run's own: had it been asked for, the run had not begun.
        own = name not in then and " of property " in name
        if now.get(name) != then.get(name) and not own:
            what = "is not there any more" if name not in now else "is new" if name not in then else "has changed"
            raise CheckpointError(
                f"resume: {name} {what} since the checkpoint; restore it as it was, or start anew without resume"
            )
