"""What makes the files of a checkpoint one: plain files, hashes that agree, one id in state and tensors.

::

    manifest.json          id, number, sha256 of the two files below, seal: a hash of all that stands in it
    state.json             __checkpoint__: id, sha256 of the tensors, hash of the rest of it
    tensors.safetensors    __checkpoint__: id, as 16 bytes

A flipped bit, a file cut short and a file of another checkpoint are found by the hashes. Another content, with the
hashes of the manifest made anew, is found by what stands inside the files themselves. This is no signature: it finds
accidents and half-done repairs, not somebody who takes pains; what is read is data and never code, in any case.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_cl.errors import CheckpointError

KEY = "__checkpoint__"
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
FILES = (TENSORS, STATE)
LARGEST_MANIFEST = 1 << 24
_ID, _HASH, _NUMBERED = re.compile("[0-9a-f]{32}"), re.compile("[0-9a-f]{64}"), re.compile("[0-9]{8,15}")


def new_id() -> str:
    """Returns an id that no other checkpoint has."""
    return uuid.uuid4().hex


def id_tensor(own_id: str) -> torch.Tensor:
    """Returns an id as it stands among the tensors, shape ``[16]``, uint8."""
    return torch.from_numpy(np.frombuffer(bytes.fromhex(own_id), dtype=np.uint8).copy())


def state_text(body: Mapping[str, Any], own_id: str, tensors_sha256: str) -> str:
    """Returns what is written into ``state.json``.

    Args:
        body: The state, JSON-able.
        own_id: Id of the checkpoint.
        tensors_sha256: Hash of the file of its tensors.
    """
    own_seal = {"id": own_id, "tensors": tensors_sha256, "content": _hash(json.dumps(body, allow_nan=False))}
    return json.dumps({KEY: own_seal, **body}, allow_nan=False)


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """Returns what is written into ``manifest.json``: the manifest, sealed."""
    return json.dumps({**manifest, "seal": _seal(manifest)})


def _seal(manifest: Mapping[str, Any]) -> str:
    return _hash(json.dumps({k: v for k, v in manifest.items() if k != "seal"}, sort_keys=True))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# -- reading ------------------------------------------------------------------------------------------------------


def read_plain(path: Path, largest: int | None = None) -> bytes:
    """Returns the bytes of a plain file; a link is not followed, and a pipe not waited for.

    Raises:
        OSError: If it is missing, cannot be read, or is no plain file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no plain file")
        if largest is not None and status.st_size > largest:
            raise OSError(f"it has {status.st_size} bytes")
        return file.read()


def read_manifest(folder: Path, form: str, version: int) -> dict[str, Any]:
    """Returns the manifest of a checkpoint, checked, but for what it says about other files.

    Args:
        folder: The checkpoint.
        form: What ``format`` must be.
        version: What ``version`` must be.

    Raises:
        CheckpointError: If it is missing, damaged, foreign or of another version.
    """
    try:
        manifest = json.loads(read_plain(folder / MANIFEST, LARGEST_MANIFEST))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {folder.name}: {MANIFEST} is missing or broken ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != form:
        raise CheckpointError(f"checkpoint {folder.name}: not written by RecBole-CL")
    if "version" not in manifest:
        raise CheckpointError(f"checkpoint {folder.name}: {MANIFEST} is damaged: it lacks the format's version")
    if type(manifest["version"]) is not int or manifest["version"] != version:
        raise CheckpointError(
            f"checkpoint {folder.name}: written in format version {manifest['version']!r}, this is {version}; go "
            f"on with the version of RecBole-CL that wrote it, or start anew in another output_dir"
        )
    hashes = manifest.get("sha256")
    found = [hashes.get(name) for name in FILES] if isinstance(hashes, dict) and len(hashes) == len(FILES) else [None]
    if not all(isinstance(value, str) and _HASH.fullmatch(value) for value in found):
        raise CheckpointError(f"checkpoint {folder.name}: {MANIFEST} is damaged: it lacks the hashes of {FILES}")
    if not isinstance(manifest.get("id"), str) or not _ID.fullmatch(manifest["id"]):
        raise CheckpointError(f"checkpoint {folder.name}: {MANIFEST} is damaged: it lacks the checkpoint's id")
    if type(manifest.get("number")) is not int or (
        _NUMBERED.fullmatch(folder.name) and manifest["number"] != int(folder.name)
    ):
        raise CheckpointError(
            f"checkpoint {folder.name}: {MANIFEST} is that of checkpoint {manifest.get('number')!r}; the folder was "
            f"renamed or the file was changed"
        )
    return manifest


def check_hashes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises a :class:`CheckpointError` where a file is not the one whose hash stands in the manifest."""
    for name in FILES:
        if sha256(folder / name) != manifest["sha256"][name]:
            raise CheckpointError(f"checkpoint {folder.name}: {name} is truncated or was changed")


def sha256(path: Path) -> str | None:
    """Returns the hash of a plain file; ``None`` where it is none, or cannot be read."""
    digest = hashlib.sha256()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def opened(folder: Path, manifest: Mapping[str, Any], body: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Returns the body of a state without its seal, and takes the id out of the tensors.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        body: What stands in ``state.json``.
        tensors: Its tensors.

    Raises:
        CheckpointError: If they are not of one checkpoint, or were changed although their hashes are right.
    """
    where = f"checkpoint {folder.name}"
    inner_seal = body.pop(KEY, None) if isinstance(body, dict) else None
    if not isinstance(inner_seal, dict):
        raise CheckpointError(f"{where}: {STATE} is not what a run writes: it lacks the checkpoint's id")
    inside = tensors.pop(KEY, None)
    theirs = inside.numpy().tobytes().hex() if inside is not None and inside.dtype == torch.uint8 else None
    for name, found in ((STATE, inner_seal.get("id")), (TENSORS, theirs)):
        if found != manifest["id"]:
            raise CheckpointError(
                f"{where}: {name} is that of another checkpoint (id {found}, {MANIFEST} has {manifest['id']})"
            )
    if inner_seal.get("tensors") != manifest["sha256"][TENSORS]:
        raise CheckpointError(f"{where}: {TENSORS} is not what a run writes: it was changed, and its hash made anew")
    if inner_seal.get("content") != _hash(json.dumps(body, allow_nan=False)):
        raise CheckpointError(f"{where}: {STATE} is not what a run writes: it was changed, and its hash made anew")
    if manifest.get("seal") != _seal(manifest):
        raise CheckpointError(f"{where}: {MANIFEST} is damaged, or was made anew; it is not what a run writes")
    return body
