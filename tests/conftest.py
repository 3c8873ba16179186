"""Tests run on one thread: two shared cores are slower than one when something else runs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _level_of_the_log() -> Iterator[None]:
    """A run sets the level of the process's log; a test that reads the log finds it as a fresh process has it."""
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    yield
    root.setLevel(logging.WARNING)
