"""A LIBER run is moved, asked and updated: the evaluator's lists, and a bill for what closed since."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from liber_helpers import GENRES
from llm_server import serving
from run_helpers import run
from serve_helpers import answers, same_ranking

import recbole_cl
from recbole_cl.cli import main
from recbole_cl.errors import ConfigError
from recbole_cl.evaluation.rows import build_rows
from recbole_cl.model.liber_texts import history_of
from recbole_cl.model.state import owned_state
from recbole_cl.serve.update import update
from recbole_cl.testing.toy import PlantedDrift, write_planted_drift
from recbole_cl.tree import tree_hash

NAMES = {"user": "user", "item": "item", "time": "time"}
FIRST = {"time_range": [0, 2_999_999], "boundaries": [1_000_000, 2_000_000]}
OWN: dict[str, Any] = {
    "liber_partition_size": 4, "liber_encoder": "hash", "liber_size": 8, "liber_hidden": 8, "matrix_cells": "diagonal",
}  # fmt: skip
BACKBONES: dict[str, dict[str, Any]] = {
    "SASRec": {}, "DeepFM": {"eval_args": {"mode": "full"}}, "DIN": {"epochs": 1},
}  # fmt: skip


def write_log(folder: Path) -> PlantedDrift:
    """The planted-drift log, its items with titles and tags."""
    log = write_planted_drift(folder, n_stages=4)
    rows = (log.folder / log.name / f"{log.name}.inter").read_text().splitlines()[1:]
    items = sorted({row.split("\t")[1] for row in rows})
    lines = [f"{i}\tTitle {i}\t{GENRES[n % 6]} {GENRES[n % 5]}" for n, i in enumerate(items)]
    path = log.folder / log.name / f"{log.name}.item"
    path.write_text("item_id:token\ttitle:token_seq\ttags:token_seq\n" + "\n".join(lines) + "\n")
    return log


def new_rows(log: PlantedDrift, path: Path, since: int, until: int) -> Path:
    lines = (log.folder / log.name / f"{log.name}.inter").read_text().splitlines()[1:]
    chosen = [line for line in lines if since <= int(line.split("\t")[2]) < until]
    path.write_text("user,item,time\n" + "\n".join(line.replace("\t", ",") for line in chosen) + "\n")
    return path


def made(folder: Path) -> int:
    """Answers in a run's folder."""
    with sqlite3.connect(folder / "knowledge" / "answers.sqlite") as cache:
        return int(cache.execute("SELECT COUNT(*) FROM answers").fetchone()[0])


def ranks_as_evaluated(loaded: Any, evaluated: Any) -> None:
    """Lists for users with the partitions that a target of theirs had are the evaluator's, and hang on them."""
    rows = build_rows(loaded.config, loaded.stream, loaded.stream.stages[-1], "test")
    table, parts = loaded.stream.table, loaded.model.knowledge
    held = np.bincount(parts.user.numpy(), minlength=table.n_users)
    seen = history_of(loaded.config, loaded.stream).seen
    # A request comes after all that the log holds; these targets have the same partitions behind them.
    same = np.flatnonzero(seen[rows.targets.position] == held[rows.targets.user])
    assert len(same) > 10 and (held[rows.targets.user[same]] > 0).sum() > 5
    users = loaded.ids.users.names(rows.targets.user[same])
    items = loaded.ids.items
    histories = [
        items.names(table.item[table.seq[lo:hi]])
        for lo, hi in zip(rows.targets.lo[same], rows.targets.hi[same], strict=True)
    ]
    k = evaluated.recommended.shape[1]
    if loaded.sequential:
        found = loaded.recommend(users, k, histories=histories)
    else:
        excluded = [items.names(rows.mask_item[rows.mask_row == n]) for n in same]
        found = loaded.recommend(users, k, excluded=excluded, filter_seen=False)
    lists, scores = np.zeros((len(found), k), dtype=np.int64), np.full((len(found), k), -np.inf)
    for number, one in enumerate(found):
        lists[number, : len(one.items)] = items.ids(one.items)
        scores[number, : len(one.items)] = one.scores
    assert same_ranking(lists, scores, evaluated.recommended[same])
    with torch.no_grad():
        loaded.model._summaries.neg_()
        other = loaded.recommend(users, k, **({"histories": histories} if loaded.sequential else {}))
    assert [one.scores for one in other] != [one.scores for one in found], "requests do not see the knowledge"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_moved_run_answers_and_is_updated_without_its_log(backbone: str, tmp_path: Path) -> None:
    """Recommendations are the evaluator's; an update has the bits of a longer run and pays for what closed since."""
    log = write_log(tmp_path / "data")
    own = {**OWN, **BACKBONES[backbone], "liber_backbone": backbone}
    runner, _ = run(log, tmp_path / "run", "LIBER", **FIRST, **own)
    whole, _ = run(log, tmp_path / "whole", "LIBER", **own)
    told = answers(runner.standing(2))
    evaluated = runner.evaluator.evaluate(runner.standing(2), runner.known, runner.stream.stages[-1])
    path = new_rows(log, tmp_path / "new.csv", 3_000_000, 4_000_000)
    folder = tmp_path / "elsewhere" / "run"
    folder.parent.mkdir()
    shutil.move(tmp_path / "run", folder)
    shutil.rmtree(log.folder)

    loaded = recbole_cl.load(folder)
    parts = loaded.model.knowledge
    again = answers(loaded.saved.runner().standing(2))
    assert all(np.array_equal(told[name], again[name]) for name in told)
    if backbone != "DIN":  # which compares candidates and ranks no whole list in evaluation
        ranks_as_evaluated(loaded, evaluated)
    before = made(folder)
    done = update(folder, path, columns=NAMES, margin=1.0)
    assert done.promoted and not (tmp_path / "run").exists()
    longer = recbole_cl.load(folder)
    assert longer.stream.fingerprint() == whole.stream.fingerprint()
    assert tree_hash(owned_state(longer.model)) == tree_hash(owned_state(whole.model))
    new = longer.model.knowledge
    closed = int((new.stage == 3).sum())
    calls = closed + int((new.number[new.stage == 3] > 0).sum())
    assert 0 < closed < len(parts) and made(folder) - before == _noted(done.notes) <= calls
    assert made(folder) == made(tmp_path / "whole")


def _noted(notes: list[str]) -> int:
    (note,) = [note for note in notes if note.startswith("llm_calls_made: ")]
    return int(note.removeprefix("llm_calls_made: "))


def test_a_night_pays_for_few_partitions(tmp_path: Path) -> None:
    """Counted by a server: the first night asks for each text once, the next one for those of its own partitions."""
    log = write_log(tmp_path / "data")
    with serving(lambda number, prompt: ("answer", f"Mostly {GENRES[len(prompt) % 6]}.")) as server:
        client = {
            "liber_backbone": "SASRec", "liber_client": "openai_compatible", "openai_base_url": server.url,
            "openai_model": "m", "liber_concurrency": 2, **OWN, "liber_partition_size": 9,
        }  # fmt: skip
        run(log, tmp_path / "run", "LIBER", **FIRST, **client)
        first = server.calls
        assert first == made(tmp_path / "run") == len(server.prompts)
        model = recbole_cl.load(tmp_path / "run").model
        spent = []
        for night, (since, until) in enumerate([(3_000_000, 3_000_040), (3_000_040, 3_000_528)], 1):
            before = server.calls
            path = new_rows(log, tmp_path / "day.csv", since, until)
            if night == 2:
                with pytest.raises(ConfigError, match="'liber_max_calls' is 1"):
                    update(tmp_path / "run", path, {"liber_max_calls": 1}, columns=NAMES, guard="none")
                assert server.calls == before + 1, "what was paid is kept"
            done = update(tmp_path / "run", path, columns=NAMES, guard="none")
            known = recbole_cl.load(tmp_path / "run").model.knowledge
            closed = len(known) - len(model.knowledge)
            shifts = int((known.number > 0).sum()) - int((model.knowledge.number > 0).sum())
            model = recbole_cl.load(tmp_path / "run").model
            spent.append(server.calls - before)
            assert done.champion == night and spent[-1] <= closed + shifts
            assert set(server.prompts.values()) == {1}, "none is asked twice"
        assert spent[0] < 10 < spent[1] < 528 / 3


def test_the_command_says_what_a_night_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write_log(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    run(log, tmp_path / "run", "LIBER", liber_backbone="SASRec", **FIRST, **OWN)
    path = new_rows(log, tmp_path / "new.csv", 3_000_000, 4_000_000)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    shared = ["update", "moved", f"--new-data={path}", "--user=user", "--item=item", "--time=time", "--margin=1.0"]
    capsys.readouterr()
    assert main([*shared, "--liber_max_calls=5000"]) == 0
    assert "llm_calls_made: " in capsys.readouterr().out
    assert main(["recommend", "moved", "--users=u1,u2", "--k=3"]) == 0
    assert [len(json.loads(line)["items"]) for line in capsys.readouterr().out.splitlines()] == [3, 3]
    assert main([*shared, "--liber_partition_size=9"]) == 2
    assert "cannot change in an update" in capsys.readouterr().err


def test_vectors_of_items_are_the_backbones(tmp_path: Path) -> None:
    log = write_log(tmp_path / "data")
    run(log, tmp_path / "run", "LIBER", liber_backbone="SASRec", **FIRST, **OWN)
    loaded = recbole_cl.load(tmp_path / "run")
    vectors = loaded.vectors("items")
    table = loaded.model.backbone.item_embedding.weight.detach().numpy()
    assert np.array_equal(vectors.values, table[loaded.ids.items.ids(vectors.tokens)])
