"""How a file gets to disk: whole or not at all, and never through a link that somebody put in its place.

The folder of a run, study or cache is chosen by a person and may be a link. What lies inside it may be shared, unpacked
from an archive or planted: a link ``records.csv -> ~/.profile`` there would have a run overwrite a file elsewhere. So a
new file is made beside its place, where nothing is, and put there by one rename; a link in its place is refused by
name. Whatever this package writes goes through here (``tests/test_security_files.py`` holds it to that).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from recbole_cl.errors import ConfigError, OutputError

if TYPE_CHECKING:
    import torch

LONGEST = 230
"""Bytes of a name: the usual file systems have room for 255, endings and what is made beside it included."""
_NO_NAME = re.compile(r"[/\\\x00]")


@contextlib.contextmanager
def explained(folder: Path, field: str = "output_dir") -> Iterator[None]:
    """Turns a failing write into an :class:`OutputError` that names the folder and the remedy.

    Args:
        folder: The folder that is written to.
        field: The property or option that names it.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        again = "go on with --resume=True" if field == "output_dir" else "try again"
        another = "choose an output_dir that can be written" if field == "output_dir" else f"choose another {field}"
        remedy = {
            errno.ENOSPC: f"the disk is full; free space and {again}",
            errno.EDQUOT: f"the quota is used up; free space and {again}",
            errno.EFBIG: f"the file would be larger than this process may write (ulimit -f); raise that, and {again}",
            errno.EROFS: f"the file system is read-only; choose another {field}",
        }.get(error.errno or 0, another)
        raise OutputError(f"{field}: cannot write to {folder}: {error.strerror or error}; {remedy}") from error


# -- names ----------------------------------------------------------------------------------------------------------


def check_name(name: str, field: str, remedy: str) -> str:
    """Returns a name that stands for one file or folder, right below the folder it belongs to.

    Args:
        name: The name; it comes from a file, a command line or a class.
        field: What it is the name of, for the message.
        remedy: What to do instead, for the message.

    Raises:
        ConfigError: If it is empty, leads elsewhere (``..``, ``a/b``), cannot be written (NUL) or is too long.
    """
    if not name or name in (".", "..") or _NO_NAME.search(name):
        raise ConfigError(f"{field} {name!r} is not a name; {remedy}")
    if len(name.encode("utf-8", "surrogatepass")) > LONGEST:
        raise ConfigError(f"{field} {name[:40]!r}... is a name of more than {LONGEST} bytes; give a shorter one")
    return name


# -- links ----------------------------------------------------------------------------------------------------------


def refuse_link(path: Path, field: str = "output_dir") -> None:
    """Refuses a symbolic link where this package is to write a file or folder of its own.

    Args:
        path: The file or folder.
        field: What names the folder that it lies in, for the message.

    Raises:
        OutputError: If it is one, also one that leads nowhere.
    """
    if path.is_symlink():
        raise OutputError(
            f"{field}: {path} is a symbolic link to {os.readlink(path)!r}, and nothing is written through it; remove "
            f"the link, or choose another folder (the folder itself may be a link)"
        )


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Refuses, before any work, a folder in which one of these names is a link (:func:`refuse_link`)."""
    for name in names:
        refuse_link(folder / name)


def refuse_links_to(folder: Path, below: str) -> None:
    """Refuses a path (``a/b/c``) below a folder of which a part is a link (:func:`refuse_link`)."""
    for part in below.split("/"):
        folder = folder / part
        refuse_link(folder)


# -- folders --------------------------------------------------------------------------------------------------------


def own_folder(path: Path, field: str = "output_dir") -> Path:
    """Makes a folder inside a chosen one where it is not there, and returns it; a link in its place is refused.

    Raises:
        OutputError: If it is a link.
        OSError: If it cannot be made.
    """
    refuse_link(path, field)
    path.mkdir(parents=True, exist_ok=True)
    return path


def fresh_folder(path: Path) -> Path:
    """Makes an empty folder in place of whatever a killed process, or somebody else, left there, and returns it."""
    clear(path)
    path.mkdir(parents=True)
    return path


def clear(path: Path) -> None:
    """Removes a file, a link (not what it leads to) or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def sync(path: Path) -> None:
    """Has the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- files ----------------------------------------------------------------------------------------------------------


def create(path: Path) -> int:
    """Returns a descriptor of a new, empty file; what lay there under its name is removed and never written to."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def open_kept(path: Path, field: str) -> int:
    """Returns a descriptor, for reading and writing, of a file that stays where it is: a lock, a ledger.

    Args:
        path: The file; it is made where it is not there.
        field: What names it, for messages.

    Raises:
        OutputError: If it is a link, or no file at all (a pipe, a device).
        OSError: If it cannot be opened.
    """
    refuse_link(path, field)
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            refuse_link(path, field)
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OutputError(f"{field}: {path} is not a file; remove it, or give another one")
    return descriptor


def write_atomically(path: Path, content: str | bytes, field: str = "output_dir") -> None:
    """Writes a file such that a reader sees the old or the new content, never a part; text as UTF-8.

    Args:
        path: The file; its folder is made where it is not there.
        content: What it is to hold.
        field: What names the folder, for messages.

    Raises:
        OutputError: If it cannot be written, or a link stands in its place.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with explained(path.parent, field):
        refuse_link(path, field)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with open(create(temporary), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync(path.parent)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a new safetensors file with the mode of all other files; safetensors itself makes one of mode 0600.

    Args:
        path: The file; a rename brings it to its place.
        tensors: The tensors.
        metadata: Texts that the file holds beside them.

    Raises:
        OSError: If it cannot be written. Safetensors has a class of its own for that.
    """
    from safetensors.torch import save_file

    descriptor = create(path)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)  # what the umask, or the folder's own rules, leave of 0666
    os.close(descriptor)
    try:
        save_file(dict(tensors), str(path), metadata)
    except OSError:
        raise
    except Exception as error:
        text = str(error)
        raise OSError(errno.ENOSPC if "No space left" in text else errno.EIO, text) from error
    os.chmod(path, mode)
