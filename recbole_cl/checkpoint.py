"""Checkpoints: safetensors and JSON, written atomically, checked before they are believed.

A state is a nest of dicts and lists with tensors, arrays, numbers and strings at its leaves. Tensors go to
``tensors.safetensors`` (tied ones once), everything else to ``state.json``, and ``manifest.json`` holds the hashes of
both. A checkpoint becomes visible by one rename; a truncated or foreign one is refused by name and the one before it
is used. Nothing is ever unpickled.

Tensors that never change (:class:`~recbole_cl.tree.FrozenTensors`) are written once, under the hash of their content,
into ``frozen/`` beside the folder of the checkpoints, which refer to them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from safetensors.torch import save as tensors_to_bytes

from recbole_cl.errors import CheckpointError, OutputError
from recbole_cl.tree import FrozenTensors

FORMAT = "recbole-cl checkpoint"
VERSION = 1
FROZEN = "frozen"


def _flatten(
    value: Any,
    path: str,
    tensors: dict[str, torch.Tensor],
    places: dict[tuple[Any, ...], str],
    frozen: dict[str, FrozenTensors] | None = None,
) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        key = (value.data_ptr(), tuple(value.shape), tuple(value.stride()), value.dtype, value.device)
        if value.numel() and key in places:
            return {"__tensor__": places[key]}
        places[key] = path
        tensors[path] = value.to("cpu").contiguous()
        return {"__tensor__": path}
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            return {"__strings__": [str(v) for v in value.ravel()], "shape": list(value.shape)}
        wide = value.astype(np.int64) if value.dtype.kind == "u" else value
        tensors[path] = torch.from_numpy(np.ascontiguousarray(wide).copy())
        return {"__array__": path, "dtype": str(value.dtype)}
    if isinstance(value, FrozenTensors) and value and frozen is not None:
        frozen[value.name] = value
        return {"__frozen__": value.name}
    if isinstance(value, Mapping):
        bad = [k for k in value if not isinstance(k, str)]
        if bad:
            raise TypeError(f"checkpoint: the key {bad[0]!r} under {path or 'the root'} is no string")
        return {k: _flatten(v, f"{path}/{k}" if path else k, tensors, places, frozen) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_flatten(v, f"{path}/{i}", tensors, places, frozen) for i, v in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"checkpoint: {path} is a {type(value).__name__}, which a checkpoint cannot hold")


def _unflatten(
    value: Any, tensors: Mapping[str, torch.Tensor], frozen: Callable[[str], FrozenTensors] | None = None
) -> Any:
    if isinstance(value, dict):
        if "__frozen__" in value and frozen is not None:
            return frozen(value["__frozen__"])
        if "__tensor__" in value:
            return tensors[value["__tensor__"]]
        if "__array__" in value:
            return tensors[value["__array__"]].numpy().astype(value["dtype"])
        if "__strings__" in value:
            return np.array(value["__strings__"]).reshape(value["shape"])
        if "__float__" in value:
            return float(value["__float__"])
        return {k: _unflatten(v, tensors, frozen) for k, v in value.items()}
    if isinstance(value, list):
        return [_unflatten(v, tensors, frozen) for v in value]
    return value


def _write_frozen(root: Path, tensors: FrozenTensors) -> None:
    """Writes frozen tensors, unless they are there already."""
    target = root / f"{tensors.name}.safetensors"
    if target.exists():
        return
    root.mkdir(parents=True, exist_ok=True)
    flat: dict[str, torch.Tensor] = {}
    body = _flatten(dict(tensors), "", flat, {})
    temporary = root / f".writing-{os.getpid()}"
    _save_tensors(flat, temporary, {"names": json.dumps(body)})
    _sync(temporary)
    os.replace(temporary, target)
    _sync(root)


def _read_frozen(folder: Path, name: Any) -> FrozenTensors:
    """Returns frozen tensors that a checkpoint in a folder of a run refers to.

    Raises:
        CheckpointError: If they are missing, truncated or changed.
    """
    if not isinstance(name, str) or not name.isalnum():
        raise CheckpointError(f"it refers to frozen tensors {name!r}, which is no name of a file; it was changed")
    # An earlier run's checkpoints, moved aside, find the tensors of the folder above.
    files = [root / FROZEN / f"{name}.safetensors" for root in (folder, folder.parent)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise CheckpointError(f"{FROZEN}/{name}.safetensors is missing; copy the whole folder of the run")
    try:
        with safe_open(str(file), framework="pt") as opened:
            body = json.loads(opened.metadata()["names"])
            flat = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        tensors = FrozenTensors(_unflatten(body, flat))
        whole = tensors.name == name
    except Exception:  # whatever safetensors, JSON or a foreign content raise
        whole = False
    if not whole:
        raise CheckpointError(f"{FROZEN}/{name}.safetensors is truncated or was changed")
    return tensors


def _prune_frozen(run: Path) -> None:
    """Removes the frozen tensors of a run's folder that no checkpoint in it refers to."""
    if not (run / FROZEN).is_dir():
        return
    needed: set[str] = set()
    for pattern in ("*/*/manifest.json", "earlier-*/*/*/manifest.json"):
        for path in run.glob(pattern):
            try:
                needed |= set(json.loads(path.read_text(encoding="utf-8")).get(FROZEN, ()))
            except (OSError, ValueError, AttributeError, TypeError):
                return  # what a broken one needs is not known
    for file in (run / FROZEN).iterdir():
        if file.stem not in needed:
            file.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns a failing write into an :class:`OutputError` that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        remedy = {
            errno.ENOSPC: "the disk is full; free space and go on with --resume=True",
            errno.EDQUOT: "the quota is used up; free space and go on with --resume=True",
            errno.EROFS: "the file system is read-only; choose another output_dir",
        }.get(error.errno or 0, "choose an output_dir that can be written")
        raise OutputError(f"output_dir: cannot write to {folder}: {error.strerror or error}; {remedy}") from error


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file such that a reader sees the old or the new content, never a part."""
    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)


def save(folder: Path, number: int, state: Mapping[str, Any], keep: int) -> Path:
    """Writes checkpoint ``number`` and removes all but the newest ``keep``.

    Args:
        folder: The run's checkpoint folder.
        number: Increasing number of the checkpoint.
        state: The nest to be stored.
        keep: How many to keep.

    Returns:
        The checkpoint's folder.

    Raises:
        OutputError: If the folder cannot be written; earlier checkpoints are untouched.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".writing"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        tensors: dict[str, torch.Tensor] = {}
        frozen: dict[str, FrozenTensors] = {}
        body = _flatten(state, "", tensors, {}, frozen)
        for theirs in frozen.values():
            _write_frozen(folder.parent / FROZEN, theirs)
        _save_tensors(tensors, temporary / "tensors.safetensors")
        (temporary / "state.json").write_text(json.dumps(body, allow_nan=False), encoding="utf-8")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "number": number,
            FROZEN: sorted(frozen),
            "sha256": {name: _sha256(temporary / name) for name in ("tensors.safetensors", "state.json")},
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        for name in ("tensors.safetensors", "state.json", "manifest.json"):
            _sync(temporary / name)
        final = folder / f"{number:08d}"
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _sync(folder)
        for old in numbered(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        _prune_frozen(folder.parent)
    return final


def _save_tensors(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a file of tensors; an error of the operating system is raised as one."""
    try:
        save_file(tensors, str(file), metadata)
    except OSError:
        raise
    except Exception as error:  # safetensors wraps the operating system's error in its own class
        text = str(error)
        code = errno.ENOSPC if "No space left" in text else errno.EIO
        raise OSError(code, text) from error


def to_bytes(state: Mapping[str, Any]) -> bytes:
    """Returns a state as bytes, for another process: the length of its JSON, the JSON, the tensors."""
    tensors: dict[str, torch.Tensor] = {}
    body = json.dumps(_flatten(state, "", tensors, {}), allow_nan=False).encode()
    return len(body).to_bytes(8, "little") + body + tensors_to_bytes(tensors)


def from_bytes(data: bytes) -> dict[str, Any]:
    """Returns the state that :func:`to_bytes` was given."""
    end = 8 + int.from_bytes(data[:8], "little")
    state = _unflatten(json.loads(data[8:end]), load(data[end:]))
    assert isinstance(state, dict)
    return state


def numbered(folder: Path) -> list[Path]:
    """Returns the checkpoint folders, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdigit())


def read(path: Path) -> dict[str, Any]:
    """Returns the state of one checkpoint.

    Raises:
        CheckpointError: If it is truncated, changed or of another program; the message names file and reason.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path.name}: manifest.json is missing or broken ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path.name}: not written by RecBole-CL")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"checkpoint {path.name}: written in format version {manifest.get('version')}, this is {VERSION}"
        )
    for name, expected in manifest["sha256"].items():
        file = path / name
        if not file.is_file() or _sha256(file) != expected:
            raise CheckpointError(f"checkpoint {path.name}: {name} is truncated or was changed")
    tensors = load_file(str(path / "tensors.safetensors"))
    body = json.loads((path / "state.json").read_text(encoding="utf-8"))
    read_once: dict[str, FrozenTensors] = {}

    def frozen(name: Any) -> FrozenTensors:
        if name not in read_once:
            try:
                read_once[name] = _read_frozen(path.parent.parent, name)
            except CheckpointError as error:
                raise CheckpointError(f"checkpoint {path.name}: {error}") from error
        return read_once[name]

    state = _unflatten(body, tensors, frozen)
    assert isinstance(state, dict)
    return state


def newest(folder: Path) -> tuple[dict[str, Any] | None, int, list[str]]:
    """Returns the newest checkpoint that can be believed.

    Returns:
        Its state (``None`` where there is none at all), its number, and a warning for each refused one.

    Raises:
        CheckpointError: If there are checkpoints and not one is whole.
    """
    warnings: list[str] = []
    for path in reversed(numbered(folder)):
        try:
            return read(path), int(path.name), warnings
        except CheckpointError as error:
            warnings.append(f"{error}; the one before it is used")
    if warnings:
        raise CheckpointError(
            f"resume: no checkpoint in {folder} can be read: {'; '.join(warnings)}. Start anew without resume"
        )
    return None, 0, warnings
