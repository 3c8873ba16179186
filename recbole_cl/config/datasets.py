"""Which datasets there are, and where a dataset's files lie."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from recbole_cl.config.blocks import block_files
from recbole_cl.config.files import RECBOLE
from recbole_cl.disk import check_name
from recbole_cl.errors import ConfigError, nearest

EXAMPLE = "ml-100k"
_DATA_VARIABLE = "RECBOLE_CL_DATA"


def _roots() -> list[Path]:
    variable = os.environ.get(_DATA_VARIABLE)
    return [*([Path(variable).expanduser()] if variable else []), Path("dataset")]


def _holds(folder: Path, dataset: str) -> bool:
    """Tells whether a folder holds a log: an interaction file, or blocks in a folder of its own."""
    return (folder / f"{dataset}.inter").is_file() or (folder.name == dataset and bool(block_files(folder)))


def dataset_name(asked: Any) -> str:
    """Returns the name of a dataset as text.

    Raises:
        ConfigError: If it is a path, or no name of a file; files of properties and logs are called after it.
    """
    return check_name(str(asked), "dataset", "give the folder as data_path and the name as dataset")


def list_datasets(data_path: str | None = None) -> list[str]:
    """Returns the names of the datasets that can be found: ml-100k and those in the search folders.

    Args:
        data_path: A folder to search as well.
    """
    found = {EXAMPLE}
    for root in [*([Path(data_path).expanduser()] if data_path else []), *_roots()]:
        if root.is_dir():
            found.update(folder.name for folder in root.iterdir() if _holds(folder, folder.name))
    return sorted(found, key=str.lower)


def find_dataset(dataset: str, data_path: str | None = None) -> Path:
    """Returns the folder that holds ``<dataset>.inter``, or blocks. Nothing is ever downloaded.

    Args:
        dataset: Name of the dataset.
        data_path: The folder, or the one above it. Default: RecBole's own example for ml-100k,
            ``$RECBOLE_CL_DATA/<dataset>``, ``./dataset/<dataset>``, in this order, also after a ``data_path``.

    Raises:
        ConfigError: If no folder has it; the message lists those that were looked at.
    """
    dataset_name(dataset)
    folders: list[Path] = []
    if data_path:
        root = Path(data_path).expanduser()
        folders += [root / dataset, root]
    if dataset == EXAMPLE:
        folders.append(RECBOLE / "dataset_example" / EXAMPLE)
    folders += [root / dataset for root in _roots()]
    for folder in folders:
        if _holds(folder, dataset):
            return folder.resolve()
    looked = ", ".join(str(folder) for folder in folders)
    raise ConfigError(
        f"dataset {dataset!r} was not found{nearest(dataset, list_datasets(data_path))}; looked for {dataset}.inter "
        f"in {looked}. Set data_path or ${_DATA_VARIABLE} to the folder that holds the folder {dataset!r}"
    )
