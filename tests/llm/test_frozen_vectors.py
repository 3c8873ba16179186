"""Vectors of items by tiny DistilBERT and ViT models in local folders, up to the file that a run reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recbole_cl.errors import ConfigError
from recbole_cl.llm.frozen_vectors import image_vectors, text_vectors, write_vectors
from recbole_cl.model.content_rows import read_vectors

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "shoe", "hat"]


@pytest.fixture(scope="module")
def distilbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertTokenizer, DistilBertConfig, DistilBertModel

    folder = tmp_path_factory.mktemp("distilbert")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    BertTokenizer(vocab=str(vocabulary)).save_pretrained(folder)
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=len(WORDS), dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    DistilBertModel(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    ViTModel(config).eval().save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def test_texts(distilbert: Path) -> None:
    """A text has the vector that it has alone: padding does not count; it is the mean over its own tokens."""
    from transformers import AutoModel, AutoTokenizer

    texts = ["red shoe", "blue", "red hat blue shoe red"]
    found = text_vectors(distilbert, texts, at_once=2)
    assert found.shape == (3, 16) and found.dtype == np.float32
    tokenizer, model = AutoTokenizer.from_pretrained(distilbert), AutoModel.from_pretrained(distilbert).eval()
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            alone = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, alone.numpy(), atol=1e-5)


def test_images(vit: Path, tmp_path: Path) -> None:
    """Two pictures alike have one vector, others not; what is no picture is named."""
    for name, colour in (("a", (255, 0, 0)), ("b", (255, 0, 0)), ("c", (0, 0, 255))):
        Image.new("RGB", (10, 12), colour).save(tmp_path / f"{name}.png")
    found = image_vectors(vit, [tmp_path / f"{name}.png" for name in "abc"], at_once=2)
    assert found.shape == (3, 16)
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert np.abs(found[0] - found[2]).max() > 1e-3
    (tmp_path / "d.png").write_text("no picture")
    with pytest.raises(ConfigError, match=r"d\.png"):
        image_vectors(vit, [tmp_path / "d.png"])


def test_they_are_read_back(tmp_path: Path) -> None:
    """Texts and images side by side, by item token; an item without a row has none."""
    both = np.concatenate([np.ones((2, 3)), np.zeros((2, 2))], axis=1)
    write_vectors(tmp_path / "items.npy", ["i2", "i1"], both)
    found = read_vectors(tmp_path / "items.npy", ["[PAD]", "i1", "i2"], "protofed_item_vectors")
    np.testing.assert_array_equal(found[1:], both)
    assert np.isnan(found[0]).all()
    for items, vectors in ((["a"], both), (["a", "a"], both), (["a\n", "b"], both)):
        with pytest.raises(ConfigError):
            write_vectors(tmp_path / "items.npy", items, vectors)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    """Nothing is looked for elsewhere."""
    with pytest.raises(ConfigError, match=r"config\.json"):
        text_vectors(tmp_path, ["a"])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="AutoTokenizer"):
        text_vectors(tmp_path, ["a"])
