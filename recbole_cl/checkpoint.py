"""Checkpoints: safetensors and JSON, written atomically, checked before they are believed.

A state is a nest of dicts and lists with tensors, arrays, numbers and strings at its leaves. Tensors go to
``tensors.safetensors`` (tied ones once), everything else to ``state.json``, and ``manifest.json`` holds the hashes of
both. A checkpoint becomes visible by one rename; a truncated or foreign one is refused by name and the one before it
is used. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, load_file
from safetensors.torch import save as tensors_to_bytes

from recbole_cl import disk
from recbole_cl.disk import explained as explained
from recbole_cl.disk import write_atomically as write_atomically
from recbole_cl.errors import CheckpointError

FORMAT = "recbole-cl checkpoint"
VERSION = 1


def _flatten(value: Any, path: str, tensors: dict[str, torch.Tensor], places: dict[tuple[Any, ...], str]) -> Any:
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
    if isinstance(value, Mapping):
        bad = [k for k in value if not isinstance(k, str)]
        if bad:
            raise TypeError(f"checkpoint: the key {bad[0]!r} under {path or 'the root'} is no string")
        return {k: _flatten(v, f"{path}/{k}" if path else k, tensors, places) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_flatten(v, f"{path}/{i}", tensors, places) for i, v in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"checkpoint: {path} is a {type(value).__name__}, which a checkpoint cannot hold")


def _unflatten(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if "__tensor__" in value:
            return tensors[value["__tensor__"]]
        if "__array__" in value:
            return tensors[value["__array__"]].numpy().astype(value["dtype"])
        if "__strings__" in value:
            return np.array(value["__strings__"]).reshape(value["shape"])
        if "__float__" in value:
            return float(value["__float__"])
        return {k: _unflatten(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_unflatten(v, tensors) for v in value]
    return value


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
        disk.own_folder(folder)
        temporary = disk.fresh_folder(folder / ".writing")
        tensors: dict[str, torch.Tensor] = {}
        body = _flatten(state, "", tensors, {})
        disk.write_tensors(temporary / "tensors.safetensors", tensors)
        (temporary / "state.json").write_text(json.dumps(body, allow_nan=False), encoding="utf-8")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "number": number,
            "sha256": {name: _sha256(temporary / name) for name in ("tensors.safetensors", "state.json")},
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        for name in ("tensors.safetensors", "state.json", "manifest.json"):
            disk.sync(temporary / name)
        final = folder / f"{number:08d}"
        disk.clear(final)
        os.replace(temporary, final)
        disk.sync(folder)
        for old in numbered(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


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
    state = _unflatten(body, tensors)
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
