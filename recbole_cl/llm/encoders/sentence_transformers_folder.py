"""Any sentence encoder that sentence-transformers can load from a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recbole_cl.errors import ConfigError
from recbole_cl.llm.encoders.base import TextEncoder
from recbole_cl.registry import encoders

EXTRA = "install the extra: pip install 'recbole-cl[text]', or choose the encoder 'random'"


def load(folder: Path) -> Any:
    """Returns the encoder of a folder, on the CPU; nothing is downloaded.

    Raises:
        ConfigError: If sentence-transformers is not installed or cannot read the folder, or the folder names classes of
            other packages: older versions import them, so that a folder from elsewhere runs code.
    """
    check_modules(folder)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError(f"the sentence encoder needs the package 'sentence-transformers'; {EXTRA}") from error
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar for a tenth of a second
    try:
        return SentenceTransformer(str(folder), device="cpu", local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"sentence-transformers cannot read the folder {str(folder)!r}: {error}") from error
    finally:
        if shown:
            logging.enable_progress_bar()


def check_modules(folder: Path) -> None:
    """Refuses a folder whose ``modules.json`` names a class outside of sentence-transformers.

    Raises:
        ConfigError: If it does, or is no list of modules.
    """
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        types = [str(module["type"]) for module in modules]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{folder / 'modules.json'} is no list of modules: {error}") from error
    for name in types:
        if not name.startswith("sentence_transformers."):
            raise ConfigError(
                f"{folder / 'modules.json'} names the class {name[:80]!r}, which is none of sentence-transformers and "
                f"is not imported; give a folder whose modules are its own"
            )


def folder_hash(folder: Path) -> str:
    """Returns the sha256 of a folder's files, by their names and contents: another model in its place is another."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as content:
            inner = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{inner}\n".encode())
    return digest.hexdigest()


@encoders.register("sentence_transformers")
class SentenceTransformersFolder(TextEncoder):
    """Sentence vectors of a model in a folder.

    Args:
        parameters: ``folder``, one that sentence-transformers has saved, and ``batch_size``.
        seed: Not used: such a model is deterministic.
    """

    prefix = "sentence_transformers"

    def folder(self) -> Path:
        """Returns the folder of the model.

        Raises:
            ConfigError: If it is not given or holds no model.
        """
        given = self.parameters["folder"]
        if given is None:
            raise ConfigError("sentence_transformers_folder: ~ names no folder; give the one that holds modules.json")
        folder = Path(given).expanduser()
        if not (folder / "modules.json").is_file():
            raise ConfigError(f"the folder {given!r} is none of sentence-transformers: it holds no modules.json")
        return folder

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        model, size = load(self.folder()), self.parameters["batch_size"]
        found: torch.Tensor = model.encode(
            list(texts), batch_size=size, convert_to_tensor=True, show_progress_bar=False
        )
        return found.detach().clone()

    def identity(self) -> dict[str, Any]:
        parameters = {key: value for key, value in self.parameters.items() if key != "folder"}
        return {"parameters": parameters, "model": folder_hash(self.folder())}
