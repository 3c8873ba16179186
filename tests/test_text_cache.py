"""Vectors of texts on disk: computed once, by any number of processes, and never believed where bytes are damaged."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from recbole_cl.config import CLConfig
from recbole_cl.errors import ConfigError
from recbole_cl.llm import encode
from recbole_cl.llm.encode import encode_texts
from recbole_cl.llm.encoders.base import TextEncoder
from recbole_cl.model.pcl import PCL
from recbole_cl.registry import encoders
from recbole_cl.stream.build import build_stream

ROOT = Path(encode.__file__).resolve().parent.parent.parent


class Counting(TextEncoder):
    """Lengths of texts; it notes what it was asked for."""

    prefix = "counting"
    defaults: ClassVar[dict[str, Any]] = {"counting_factor": 1.0}
    asked: ClassVar[list[list[str]]] = []

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        self.asked.append(list(texts))
        lengths = torch.tensor([[len(text), len(set(text))] for text in texts], dtype=torch.float32)
        return lengths * self.parameters["factor"]


@pytest.fixture(autouse=True)
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    encoders.names()
    for name in ("_members", "_names"):
        monkeypatch.setattr(encoders, name, dict(getattr(encoders, name)))
    encoders._add("counting", Counting)
    Counting.asked.clear()
    yield


def ask(folder: Path, texts: Sequence[str], factor: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Asks as a process that knows nothing yet."""
    encode._CACHE.clear()
    return encode_texts("counting", texts, seed, parameters={"factor": factor}, store=str(folder))


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    """Only what is missing is, once each; order and repetition are the caller's."""
    first = ask(tmp_path, ["a", "bcd", "a"])
    assert first.tolist() == [[1, 1], [3, 3], [1, 1]] and Counting.asked == [["a", "bcd"]]
    assert ask(tmp_path, ["xx", "bcd"]).tolist() == [[2, 1], [3, 3]] and Counting.asked[1:] == [["xx"]]
    assert ask(tmp_path, ["bcd", "a", "xx"]).tolist() == [[3, 3], [1, 1], [2, 1]] and len(Counting.asked) == 2
    assert ask(tmp_path, ["\ud800"]).tolist() == [[1, 1]]  # half a character, as broken files hold
    assert sorted(path.name for path in tmp_path.rglob("*") if path.suffix == ".part") == []


def test_vectors_are_those_of_an_encoder_with_its_parameters(tmp_path: Path) -> None:
    assert ask(tmp_path, ["ab"]).tolist() == [[2, 2]]
    assert ask(tmp_path, ["ab"], factor=3.0).tolist() == [[6, 6]]
    assert ask(tmp_path, ["ab"], seed=9).tolist() == [[2, 2]] and len(Counting.asked) == 2  # it does not draw
    encode._CACHE.clear()
    one = encode_texts("random", ["ab"], 1, store=str(tmp_path))
    two = encode_texts("random", ["ab"], 2, store=str(tmp_path))
    assert not torch.equal(one, two)  # it does
    encode._CACHE.clear()
    assert torch.equal(encode_texts("random", ["ab"], 1, store=str(tmp_path)), one)
    assert torch.equal(encode_texts("random", ["ab"], 1), one)


def test_another_model_in_the_folder_of_the_first_is_another(tmp_path: Path) -> None:
    from recbole_cl.llm.encoders.sentence_transformers_folder import SentenceTransformersFolder

    (tmp_path / "modules.json").write_text("[]")
    made = [SentenceTransformersFolder({"folder": str(tmp_path), "batch_size": 2}, 0).identity()]
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    made.append(SentenceTransformersFolder({"folder": str(tmp_path), "batch_size": 2}, 0).identity())
    assert made[0]["model"] != made[1]["model"]


@pytest.mark.parametrize("harm", ["empty", "header", "half", "last byte", "one bit", "pickle"])
def test_a_damaged_file_is_computed_again(tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    texts = [f"text {'x' * n}" for n in range(50)]
    right = ask(tmp_path, texts)
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-20] ^= 1
    cut = {"empty": b"", "header": whole[:6], "half": whole[: len(whole) // 2], "last byte": whole[:-1]}
    harmed = {**cut, "one bit": bytes(flipped), "pickle": pickle.dumps(os.getcwd)}[harm]
    file.write_bytes(harmed)
    assert torch.equal(ask(tmp_path, texts), right)
    assert len(Counting.asked) == 2 and "damaged" in caplog.text
    assert [path.read_bytes() for path in files(tmp_path)] == [whole]
    assert torch.equal(ask(tmp_path, texts), right) and len(Counting.asked) == 2


PROCESS = """
import sys, time
from pathlib import Path
from recbole_cl.llm.encode import encode_texts
folder, mine, start = sys.argv[1], sys.argv[2], Path(sys.argv[3])
Path(f"{start}-{mine}").touch()
while not start.exists():
    time.sleep(0.001)
for part in range(20):
    texts = [f"common {part} {n}" for n in range(20)] + [f"{mine} {part} {n}" for n in range(20)]
    encode_texts("random", texts, 5, parameters={"width": 8}, store=folder)
"""


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    """Both end well, every vector is there and is right; a third process computes nothing."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folder, start = tmp_path / "cache", tmp_path / "start"
    running = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(folder), name, str(start)], env=env) for name in ("a", "b")
    ]
    while not all(Path(f"{start}-{name}").exists() for name in ("a", "b")):
        time.sleep(0.01)
        assert all(process.poll() is None for process in running)
    start.touch()
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    texts = [f"{who} {part} {n}" for who in ("common", "a", "b") for part in range(20) for n in range(20)]
    encode._CACHE.clear()
    held = encode_texts("random", texts, 5, parameters={"width": 8}, store=str(folder))
    kept = {path: path.read_bytes() for path in files(folder)}
    encode._CACHE.clear()
    assert torch.equal(held, encode_texts("random", texts, 5, parameters={"width": 8}))
    assert kept == {path: path.read_bytes() for path in files(folder)}, "nothing was left to compute"
    assert not list(folder.rglob("*.part"))
    assert sum(len(load_file(path)["keys"]) for path in kept) >= len(texts)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for bad in (str(tmp_path / "file"), "a\0b", "~nosuchperson/x"):
        with pytest.raises(ConfigError, match="property 'text_cache' is "):
            ask(Path(bad), ["a"])


def test_a_full_disk_costs_the_vectors_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    caplog.set_level(logging.WARNING)  # a run in this process may have set another
    assert ask(tmp_path, ["a"]).tolist() == [[1, 1]]
    assert "1 vectors are not kept" in caplog.text and [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_link_that_lies_there_is_not_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recbole_cl.llm import store

    monkeypatch.setattr(store.secrets, "token_hex", lambda n: "known")
    ask(tmp_path / "cache", ["a"])
    (folder,) = (tmp_path / "cache").iterdir()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (folder / f".{os.getpid()}-known.part").symlink_to(victim)
    ask(tmp_path / "cache", ["b"])
    assert victim.read_text() == "mine"


def test_pcl_keeps_its_vectors(tmp_path: Path) -> None:
    """The property reaches the encoder of a model, whose vectors are the same with and without a store."""
    made = []
    for store in (["--text_cache=" + str(tmp_path)], ["--text_cache=" + str(tmp_path)], []):
        encode._CACHE.clear()
        args = ["--scheduler=TaskStream", "--pcl_encoder=random", "--random_width=12", "--load_col={inter: [user_id, "]
        args[-1] += "item_id, timestamp, rating], item: [item_id, class], user: [user_id, age, gender]}"
        config = CLConfig("PCL", "ml-100k", args=[*args, *store])
        stream = build_stream(config)
        made.append(PCL(config, stream.view(0)).contextual.texts)
        assert len(files(tmp_path)) == 1
    assert made[0].shape == (len(stream.stages), 12)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
