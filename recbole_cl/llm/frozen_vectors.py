"""Vectors of items from their texts or images, by a frozen transformers model in a local folder.

What they are for: rows of items that a frozen table never trained (``protofed_item_vectors``). Nothing is downloaded,
and no code of the folder is run.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_cl.disk import write_atomically
from recbole_cl.errors import ConfigError


def text_vectors(folder: str | Path, texts: Sequence[str], at_once: int = 64) -> np.ndarray:
    """Returns the mean of the last hidden states over each text's tokens, float32 ``[n, width]``.

    Args:
        folder: A model with its tokeniser (DistilBERT, BERT, ...), as ``save_pretrained`` wrote them.
        texts: One an item.
        at_once: Texts in a batch.

    Raises:
        ConfigError: If the folder holds no such model.
    """
    from transformers import AutoModel, AutoTokenizer  # they take seconds to import

    tokenizer, model = (_from(folder, kind) for kind in (AutoTokenizer, AutoModel))
    found = []
    for start in range(0, len(texts), at_once):
        batch = tokenizer(list(texts[start : start + at_once]), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model.eval()(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        found.append(((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).numpy())
    return np.concatenate(found).astype(np.float32)


def image_vectors(folder: str | Path, images: Sequence[str | Path], at_once: int = 16) -> np.ndarray:
    """Returns the first token's last hidden state of each image, float32 ``[n, width]``.

    Args:
        folder: A vision model with its image processor (ViT, ...), as ``save_pretrained`` wrote them.
        images: Files, one an item.
        at_once: Images in a batch.

    Raises:
        ConfigError: If the folder holds no such model, or a file is no image.
    """
    from PIL import Image, UnidentifiedImageError
    from transformers import AutoImageProcessor, AutoModel

    processor, model = (_from(folder, kind) for kind in (AutoImageProcessor, AutoModel))
    found = []
    for start in range(0, len(images), at_once):
        batch = []
        for file in images[start : start + at_once]:
            try:
                with Image.open(file) as image:
                    batch.append(image.convert("RGB"))
            except (OSError, UnidentifiedImageError) as error:
                raise ConfigError(f"images: {file} cannot be read as an image ({error})") from error
        with torch.no_grad():
            hidden = model.eval()(**processor(images=batch, return_tensors="pt")).last_hidden_state
        found.append(hidden[:, 0].numpy())
    return np.concatenate(found).astype(np.float32)


def write_vectors(path: str | Path, items: Sequence[str], vectors: np.ndarray) -> None:
    """Writes vectors as ``protofed_item_vectors`` reads them: a matrix (.npy), and the items of its rows beside it.

    Args:
        path: The matrix's file.
        items: Tokens, one a row.
        vectors: Shape ``[n, width]``; vectors of several kinds may stand side by side.
    """
    file = Path(path)
    if file.suffix != ".npy" or len(items) != len(vectors) or len(set(items)) != len(items):
        raise ConfigError(
            f"{file}: {len(items)} items ({len(set(items))} different ones) and {len(vectors)} vectors; give a .npy "
            f"file and one item a row"
        )
    if any("\n" in item or "\r" in item for item in items):
        raise ConfigError(f"{file}: a token with a line break cannot stand in a list of one item a line")
    content = io.BytesIO()
    np.lib.format.write_array(content, np.ascontiguousarray(vectors, dtype=np.float32), allow_pickle=False)
    write_atomically(file, content.getvalue(), "file")
    write_atomically(file.with_suffix(".txt"), "\n".join(items) + "\n", "file")


def _from(folder: str | Path, kind: Any) -> Any:
    """Returns a part of a model from a local folder."""
    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"{folder} is no folder of a transformers model: it has no config.json")
    try:
        weights = {"use_safetensors": True} if kind.__name__ == "AutoModel" else {}
        return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **weights)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder}: {kind.__name__} cannot be read from it ({error})") from error
