"""Blocks of users' items, as PESO's authors keep them, read as a log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recbole_cl.config import CLConfig, list_datasets
from recbole_cl.errors import ConfigError, DataError
from recbole_cl.stream.build import build_stream


def entry(before: str, now: str) -> dict[str, list[str]]:
    """Returns a user's entry; items are letters."""
    return {"previous_block": list(before), "current_block": list(now)}


BLOCKS = [{"u": entry("", "abc"), "v": entry("", "ca")}, {"u": entry("abc", "da"), "w": entry("", "bd")}]


def write(folder: Path, blocks: list[Any]) -> Path:
    target = folder / "toy"
    target.mkdir(parents=True)
    for number, block in enumerate(blocks):
        (target / f"all.block_{number}.json").write_text(json.dumps(block))
    return folder


def stream(folder: Path, **more: Any) -> Any:
    given = {"scheduler": "Periods", "period_field": "block", "n_stages": None, "stage_ratios": [1, 0, 0]}
    columns = {"inter": ["user_id", "item_id", "timestamp", "block"]}
    given |= {"data_path": str(folder), "loss_type": "CE", "load_col": columns}
    config = CLConfig(model="SASRec", dataset="toy", config_dict={**given, **more})
    return build_stream(config)


def test_blocks_are_stages(tmp_path: Path) -> None:
    found = stream(write(tmp_path, BLOCKS))
    assert len(found) == 2 and found.table.stage.tolist() == [0] * 5 + [1] * 4
    users, items = (found.dataset.field2id_token[name] for name in ("user_id", "item_id"))
    had: dict[str, list[str]] = {}
    for position in found.table.seq:
        had.setdefault(str(users[found.table.user[position]]), []).append(str(items[found.table.item[position]]))
    assert had == {"u": ["a", "b", "c", "d", "a"], "v": ["c", "a"], "w": ["b", "d"]}
    assert found.table.timestamp.max() == 1_000_001
    assert "toy" in list_datasets(str(tmp_path))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (
            [BLOCKS[0], {"u": {"previous_block": ["a"], "current_block": ["d"]}}],
            "previous_block of user 'u' has 1 items",
        ),
        ([{"u": ["a"]}], "entry of user 'u' is not of the form"),
        ([{"u": {"previous_block": [], "current_block": ["a\tb"]}}], "entry of user 'u' is not of the form"),
        ([["u"]], "it holds no users"),
    ],
)
def test_other_blocks_are_told(tmp_path: Path, blocks: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        stream(write(tmp_path, blocks))


def test_broken_json_and_gaps_are_told(tmp_path: Path) -> None:
    write(tmp_path, BLOCKS)
    (tmp_path / "toy" / "all.block_1.json").write_text("{")
    with pytest.raises(DataError, match=r"all.block_1.json: cannot be read as JSON"):
        stream(tmp_path)
    (tmp_path / "toy" / "all.block_0.json").unlink()
    with pytest.raises(ConfigError, match="'toy' was not found"):
        stream(tmp_path)
