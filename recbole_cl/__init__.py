"""RecBole-CL: any RecBole model through a stream of stages under any continual strategy."""

from recbole_cl import interrupt

interrupt.end_at_once()  # before anything that takes time is imported

from importlib.metadata import PackageNotFoundError, version  # noqa: E402
from typing import Any  # noqa: E402

from recbole_cl import compat  # noqa: E402

try:
    __version__ = version("recbole-cl")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0.1.0"

# Before any of RecBole's modules is imported: some read removed numpy names while they load.
compat.apply()

__all__ = ["__version__", "load", "run_recbole_cl"]


def __getattr__(name: str) -> Any:
    """Loads functions when they are first asked for, so that importing the package does not import torch."""
    if name == "run_recbole_cl":
        from recbole_cl.quick_start import run_recbole_cl

        return run_recbole_cl
    if name == "load":
        from recbole_cl.serve import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
