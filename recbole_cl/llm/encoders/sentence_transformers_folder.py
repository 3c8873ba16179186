"""Any sentence encoder that sentence-transformers can load from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recbole_cl.errors import ConfigError
from recbole_cl.llm.encoders.base import TextEncoder

EXTRA = "install the extra: pip install 'recbole-cl[text]', or choose the encoder 'random'"


def load(folder: Path) -> Any:
    """Returns the encoder of a folder, on the CPU; nothing is downloaded.

    Raises:
        ConfigError: If sentence-transformers is not installed or cannot read the folder.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError(f"the sentence encoder needs the package 'sentence-transformers'; {EXTRA}") from error
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar for a tenth of a second
    try:
        return SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"sentence-transformers cannot read the folder {str(folder)!r}: {error}") from error
    finally:
        if shown:
            logging.enable_progress_bar()


class SentenceTransformersFolder(TextEncoder):
    """Sentence vectors of a model in a folder.

    Args:
        seed: Not used: such a model is deterministic.
        folder: A folder that sentence-transformers has saved.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        super().__init__(seed)
        self.model = load(folder)

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        found: torch.Tensor = self.model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        return found.detach().clone()
