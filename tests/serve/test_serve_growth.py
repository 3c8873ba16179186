"""New rows begin where they are told to; growing by itself changes no score of what is known, to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from run_helpers import run
from test_serve_features import COLUMNS, early, log  # noqa: F401  (fixtures)
from test_serve_update import FIRST, NAMES, new_rows

from recbole_cl.model.new_rows import hops, word_vectors
from recbole_cl.serve.features import read_features
from recbole_cl.serve.incoming import read_incoming
from recbole_cl.serve.update import standing_at, update
from recbole_cl.stream.extend import extended
from recbole_cl.testing.toy import PlantedDrift
from recbole_cl.training.load import SavedRun

WAYS = ("random", "mean", "one_hop", "two_hop", "text")


def test_hops_by_hand() -> None:
    """Items 1, 2 known, 3 and 4 new; users 1, 2 known, 3 new. Item 3: users 1 (had 1, 2) and 2 (had 2); 4: nobody."""
    items, users = np.array([1, 2, 2, 3, 3, 3]), np.array([1, 1, 2, 1, 2, 2])
    one, two = hops(items, users, before=3, after=5, known=3)
    assert one.toarray().tolist() == [[0, 0.5, 0.5], [0, 0, 0]]
    assert two.toarray().tolist() == [[0, 0.25, 0.75], [0, 0, 0]]


def test_words_are_thrown_to_vectors() -> None:
    feature = {"tags": torch.tensor([[0, 0], [1, 2], [2, 1], [3, 0], [0, 0]])}

    class Table(dict):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 5

    found = word_vectors(Table(feature), {"tags": None}, 0)
    assert found is not None and np.isnan(found[[0, 4]]).all()
    assert np.allclose(found[1], found[2]) and not np.allclose(found[1], found[3])
    assert word_vectors(None, {}, 0) is None


@pytest.mark.parametrize("model", ["BPR", "SASRec", "DeepFM"])
def test_growing_changes_no_known_score(
    log: PlantedDrift,  # noqa: F811
    early: PlantedDrift,  # noqa: F811
    tmp_path: Path,
    model: str,
) -> None:
    run(early, tmp_path / "run", model, **FIRST, **COLUMNS)
    files = {side: log.folder / log.name / f"{log.name}.{side}" for side in ("user", "item")}
    begun = {}
    for way in WAYS:
        saved = SavedRun.open(tmp_path / "run", changes={"new_rows": way})
        incoming = read_incoming(saved, new_rows(log, tmp_path / "new.csv"), NAMES)
        features = {side: read_features(saved, file, side)[0] for side, file in files.items()}
        stream, moves = extended(saved.config, saved.stream, incoming.rows, "new", features)
        runner = standing_at(saved, stream, moves)
        last = stream.stages[-1].index
        old_ctx, old = runner.standing(last - 1), runner.model
        n_users, n_items = (stream.stages[last - 1].n_users, stream.stages[last - 1].n_items)
        asked = stream.stages[last - 1].test
        batch = old_ctx.batcher.rows(asked, stage=last - 1, evaluation=True)
        before = old.eval().predict(batch).detach().clone()
        runner._enter(last, None)
        new = runner.model.eval()
        assert torch.equal(new.predict(batch), before), way
        table = dict(new.named_parameters())
        name = next(
            key for key in table if key.endswith(("item_embedding.weight", "token_embedding_table.embedding.weight"))
        )
        assert new is not old and len(stream.dataset.field2id_token["item_id"]) > n_items and n_users > 1
        begun[way] = table[name].detach().clone()
        if model != "DeepFM":
            assert torch.equal(begun[way][:n_items], dict(old.named_parameters())[name])
    assert not torch.equal(begun["random"], begun["two_hop"]) and not torch.equal(begun["random"], begun["text"])
    assert not torch.equal(begun["two_hop"], begun["mean"])
    assert torch.equal(begun["one_hop"], begun["two_hop"]) == (model != "BPR"), "it needs a table of each"


def test_two_hops_are_the_mean_of_what_the_users_had(log: PlantedDrift, tmp_path: Path) -> None:  # noqa: F811
    """Against a loop over the log."""
    run(log, tmp_path / "run", "BPR", **FIRST)
    saved = SavedRun.open(tmp_path / "run", changes={"new_rows": "two_hop"})
    incoming = read_incoming(saved, new_rows(log, tmp_path / "new.csv"), NAMES)
    stream, moves = extended(saved.config, saved.stream, incoming.rows, "new")
    runner = standing_at(saved, stream, moves)
    last = len(stream) - 1
    old = runner.model.item_embedding.weight.detach().clone()
    runner._enter(last, None)
    new = runner.model.item_embedding.weight.detach()
    at = stream.graph_positions(last)
    pairs = set(zip(stream.table.user[at].tolist(), stream.table.item[at].tolist(), strict=True))
    checked = 0
    for item in range(len(old), len(new)):
        means = []
        for user in sorted(user for user, one in pairs if one == item):
            had = sorted(one for who, one in pairs if who == user and one < len(old))
            if had:
                means.append(old[had].mean(dim=0))
        if means:
            assert torch.allclose(new[item], torch.stack(means).mean(dim=0), atol=1e-6)
            checked += 1
    assert checked >= 2


def test_an_update_grows_as_it_is_told(log: PlantedDrift, tmp_path: Path) -> None:  # noqa: F811
    run(log, tmp_path / "run", "BPR", **FIRST)
    done = update(
        tmp_path / "run", new_rows(log, tmp_path / "new.csv"), {"new_rows": "two_hop"}, columns=NAMES, margin=1
    )
    assert done.promoted and SavedRun.open(tmp_path / "run").config["new_rows"] == "two_hop"
