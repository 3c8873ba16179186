"""Checkpoints: safetensors and JSON, written atomically, checked before they are believed.

A state is a nest of dicts and lists with tensors, arrays, numbers and strings at its leaves. Tensors go to
``tensors.safetensors`` (tied ones once), everything else to ``state.json``, and ``manifest.json`` holds the hashes of
both (:mod:`recbole_cl.seal`). A checkpoint becomes visible by one rename; a truncated, changed or foreign one is
refused by name and the one before it is used. Nothing is ever unpickled.

Tensors that never change (:class:`~recbole_cl.tree.FrozenTensors`) are written once, under the hash of their content,
into ``frozen/`` beside the folder of the checkpoints, which refer to them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file
from safetensors.torch import save as tensors_to_bytes

from recbole_cl import disk, seal
from recbole_cl.disk import explained as explained
from recbole_cl.disk import write_atomically as write_atomically
from recbole_cl.errors import CheckpointError
from recbole_cl.tree import FrozenTensors

FORMAT = "recbole-cl checkpoint"
VERSION = 2
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
            return tensors[value["__array__"]].numpy().astype(_numbers(value["dtype"]))
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
    if target.is_file() and not target.is_symlink():
        return
    disk.own_folder(root)
    flat: dict[str, torch.Tensor] = {}
    body = _flatten(dict(tensors), "", flat, {})
    temporary = root / f".writing-{os.getpid()}"
    disk.write_tensors(temporary, flat, {"names": json.dumps(body)})
    disk.sync(temporary)
    os.replace(temporary, target)
    disk.sync(root)


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
                needed |= set(json.loads(seal.read_plain(path, seal.LARGEST_MANIFEST)).get(FROZEN, ()))
            except (OSError, ValueError, AttributeError, TypeError, RecursionError):
                return  # what a broken one needs is not known
    for file in (run / FROZEN).iterdir():
        if file.stem not in needed:
            file.unlink(missing_ok=True)


def _numbers(name: str) -> np.dtype[Any]:
    dtype = np.dtype(name)
    if dtype.kind not in "biuf":
        raise ValueError(f"an array of {name} in a checkpoint")
    return dtype


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
        frozen: dict[str, FrozenTensors] = {}
        body = _flatten(state, "", tensors, {}, frozen)
        for theirs in frozen.values():
            _write_frozen(folder.parent / FROZEN, theirs)
        own_id = seal.new_id()
        tensors[seal.KEY] = seal.id_tensor(own_id)
        disk.write_tensors(temporary / seal.TENSORS, tensors)
        hashes = {seal.TENSORS: seal.sha256(temporary / seal.TENSORS)}
        (temporary / "state.json").write_text(
            seal.state_text(body, own_id, str(hashes[seal.TENSORS])), encoding="utf-8"
        )
        hashes[seal.STATE] = seal.sha256(temporary / seal.STATE)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "number": number,
            FROZEN: sorted(frozen),
            "id": own_id,
            "sha256": hashes,
        }
        (temporary / "manifest.json").write_text(seal.manifest_text(manifest), encoding="utf-8")
        for name in ("tensors.safetensors", "state.json", "manifest.json"):
            disk.sync(temporary / name)
        final = folder / f"{number:08d}"
        disk.clear(final)
        os.replace(temporary, final)
        disk.sync(folder)
        for old in numbered(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
        _prune_frozen(folder.parent)
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
    found = [path for path in folder.iterdir() if path.name.isascii() and path.name.isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def last_number(folder: Path) -> int:
    """Returns the greatest number that a checkpoint has, a broken one's too; 0 where there is none."""
    return max((int(path.name) for path in numbered(folder)), default=0)


def read(path: Path) -> dict[str, Any]:
    """Returns the state of one checkpoint.

    Raises:
        CheckpointError: If it is truncated, changed, mixed with another or of another program; the message names file
            and reason.
    """
    manifest = seal.read_manifest(path, FORMAT, VERSION)
    seal.check_hashes(path, manifest)
    read_once: dict[str, FrozenTensors] = {}

    def frozen(name: Any) -> FrozenTensors:
        if name not in read_once:
            try:
                read_once[name] = _read_frozen(path.parent.parent, name)
            except CheckpointError as error:
                raise CheckpointError(f"checkpoint {path.name}: {error}") from error
        return read_once[name]

    try:
        tensors = load_file(str(path / seal.TENSORS))
        body = seal.opened(path, manifest, json.loads((path / seal.STATE).read_bytes()), tensors)
        state = _unflatten(body, tensors, frozen)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # whatever safetensors, JSON or a foreign content raise
        raise CheckpointError(
            f"checkpoint {path.name}: a file is not what a run writes ({type(error).__name__}: {error})"
        ) from error
    assert isinstance(state, dict)
    return state


def newest(
    folder: Path, accept: Callable[[dict[str, Any]], None] | None = None, before: int | None = None
) -> tuple[dict[str, Any] | None, int, list[str]]:
    """Returns the newest checkpoint that can be believed.

    Args:
        folder: The run's checkpoint folder.
        accept: Raises a :class:`CheckpointError` for a state that cannot be used.
        before: Only those with smaller numbers.

    Returns:
        Its state (``None`` where there is none at all), its number, and a warning for each refused one.

    Raises:
        CheckpointError: If there are checkpoints and not one can be used.
    """
    refused: dict[str, str] = {}  # checkpoint to the reason
    for path in reversed(numbered(folder)):
        if before is not None and int(path.name) >= before:
            continue
        try:
            state = read(path)
            if accept is not None:
                accept(state)
            return state, int(path.name), [f"{_named(*one)}; the one before it is used" for one in refused.items()]
        except CheckpointError as error:
            refused[path.name] = str(error)
    reasons = list(dict.fromkeys(refused.values()))
    if len(reasons) == 1 and not reasons[0].startswith("checkpoint "):
        raise CheckpointError(reasons[0])  # the same of all: not they are wrong, but what is asked of them
    if refused:
        listed = "; ".join(_named(*one) for one in refused.items())
        raise CheckpointError(f"resume: no checkpoint in {folder} can be used: {listed}. Start anew without resume")
    return None, 0, []


def _named(name: str, reason: str) -> str:
    return reason if reason.startswith("checkpoint ") else f"checkpoint {name}: {reason.removeprefix('resume: ')}"
