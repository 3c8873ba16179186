"""What a person sees of a run: a terminal summary, one self-contained HTML page, one picture.

Everything is a function of ``result.json``; a page can be written again at any time from the folder of a run. Keys that
are missing leave their section out or say that nothing was recorded.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from recbole_cl.disk import write_atomically
from recbole_cl.errors import DataError
from recbole_cl.report.html import page
from recbole_cl.report.picture import picture
from recbole_cl.report.shape import check_result
from recbole_cl.report.skeleton import share_script
from recbole_cl.report.terminal import terminal_summary

__all__ = ["page", "picture", "render_folder", "share_script", "terminal_summary", "write_report"]


def write_report(result: dict[str, Any], folder: str | Path, shared: Path | None = None) -> Path:
    """Writes ``report.html`` of a run.

    Args:
        result: The run's result, as in ``result.json``.
        folder: The folder of the run; made where it is missing.
        shared: A folder above it whose pages share one file with Plotly's script; by default the page holds it.

    Returns:
        The file. It is replaced in one step, so that a reader never sees half a page.

    Raises:
        OutputError: The folder cannot be written, or a link stands in the place of the page.
    """
    path = Path(folder) / "report.html"
    script = None if shared is None else os.path.relpath(share_script(shared), path.parent).replace(os.sep, "/")
    write_atomically(path, page(result, script))
    return path


def render_folder(path: str | Path) -> str:
    """Writes ``report.html`` of a finished or running run again and tells its summary.

    Args:
        path: The folder of the run, or its ``result.json``.

    Returns:
        The terminal summary.

    Raises:
        DataError: There is no ``result.json``, or it does not hold a result.
        OutputError: The folder cannot be written.
    """
    source = Path(path)
    if source.is_dir() or source.suffix != ".json":
        source = source / "result.json"
    try:
        result = json.loads(source.read_text(encoding="utf-8"))
        check_result(result)
    except OSError as error:
        raise DataError(f"{source} cannot be read ({error.strerror}); is this the output_dir of a run?") from error
    except DataError as error:
        raise DataError(f"{source}: {error}; restore it from a copy, or run again") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source} is not JSON: {error}; restore it from a copy, or run again") from error
    write_report(result, source.parent)
    # A folder may have been moved since the run: say where it lies now.
    return terminal_summary({**result, "output_dir": str(source.parent)})
