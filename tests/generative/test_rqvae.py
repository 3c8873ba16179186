"""The tokeniser rqvae: codes of clusters, its own generator, and what it says where its package is missing."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from recbole_cl.errors import ConfigError, DataError
from recbole_cl.registry import tokenisers

SMALL: dict[str, Any] = {
    "levels": 2, "size": 8, "width": 4, "hidden": [16], "epochs": 60, "batch": 64, "rate": 0.01, "commitment": 0.25,
}  # fmt: skip


def blobs(seed: int = 0, each: int = 40, width: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Returns vectors around six far centres, and whose they are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(6, width)) * 3
    label = np.repeat(np.arange(6), each)
    return (centres[label] + 0.3 * rng.normal(size=(len(label), width))).astype(np.float32), label


def made(**changed: Any) -> Any:
    return tokenisers.get("rqvae")({**SMALL, **changed}, 3)


def test_vectors_of_a_cluster_begin_alike() -> None:
    pytest.importorskip("vector_quantize_pytorch", reason="the extra 'rqvae' is not installed")
    vectors, label = blobs()
    state = torch.get_rng_state()
    tokeniser = made()
    tokeniser.fit(vectors)
    assert torch.equal(torch.get_rng_state(), state)
    codes = tokeniser.encode(vectors)
    assert codes.shape == (240, 2) and codes.min() >= 0 and codes.max() < 8
    whose = np.array([np.bincount(label[codes[:, 0] == code], minlength=6).argmax() for code in range(8)])
    assert (whose[codes[:, 0]] == label).mean() > 0.95  # the first code tells the cluster
    later, theirs = blobs(1)
    assert (whose[tokeniser.encode(later)[:, 0]] == theirs).mean() > 0.95
    assert (tokeniser.encode(vectors[:7]) == codes[:7]).all()
    again = made()
    again.fit(vectors)
    assert (again.encode(vectors) == codes).all()


def test_its_codes_are_the_quantisers() -> None:
    """Beside vector-quantize-pytorch itself; a last code is the nearest of all behind its prefix."""
    pytest.importorskip("vector_quantize_pytorch", reason="the extra 'rqvae' is not installed")
    vectors, _ = blobs()
    tokeniser = made(epochs=3)
    tokeniser.fit(vectors)
    codes = tokeniser.encode(vectors)
    with torch.no_grad():
        _, theirs, _ = tokeniser.quantiser(tokeniser._latent(vectors).unsqueeze(0))
    assert (theirs[0].numpy() == codes).mean() > 0.999
    for row in (0, 100, 239):
        far = tokeniser.last_codes(vectors[row], codes[row])
        assert far.shape == (8,) and far.argmin() == codes[row, -1]


def test_what_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vector_quantize_pytorch", reason="the extra 'rqvae' is not installed")
    vectors, _ = blobs()
    with pytest.raises(ConfigError, match=r"'rqvae_epochs' is 0; it must be at least 1"):
        made(epochs=0).fit(vectors)
    with pytest.raises(DataError, match="too few for 8 codes"):
        made().fit(vectors[:5])
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(ConfigError, match=r"pip install 'recbole-cl\[rqvae\]'"):
        made().fit(vectors)
