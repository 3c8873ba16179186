"""The fusion's variants: by hand, zero means the backbone, and refused where no gradient reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from liber_helpers import LABELLED, OWN, RUNS, Counted, Job, Log, assert_same_walk, job, write_liber_log

from recbole_cl.config import get_model_class
from recbole_cl.errors import ConfigError
from recbole_cl.model.liber_fusion import InterestFusion
from recbole_cl.model.liber_layers import CausalMixer, HybridExperts
from recbole_cl.model.liber_tables import interest_tables

VARIANTS: dict[str, dict[str, Any]] = {
    "self": {"liber_attention": "self"},
    "experts": {"liber_experts": 2},
    "items": {"liber_item_field": True},
    "all": {"liber_attention": "self", "liber_experts": 2, "liber_item_field": True, "liber_query": "target"},
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return write_liber_log(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("backbone", "variant"), [("SASRec", "self"), ("SASRec", "experts"), ("DIN", "self"), ("DIN", "all")]
)
def test_zero_vectors_are_the_backbone_bit_for_bit(backbone: str, variant: str, log: Log, tmp_path: Path) -> None:
    plain = Job(get_model_class(backbone), log.folder, {**RUNS[backbone], "epochs": 1, "n_stages": 2}).walk(
        tmp_path / "plain"
    )
    wrapped = job(backbone, log, liber_vectors="zeros", n_stages=2, **VARIANTS[variant]).walk(tmp_path / "wrapped")
    assert wrapped.result["matrix"] == plain.result["matrix"]
    inner = wrapped.runner.model.backbone.state_dict()
    assert all(torch.equal(value, inner[name]) for name, value in plain.runner.model.state_dict().items())


@pytest.mark.parametrize(
    ("backbone", "variant"), [("DeepFM", "self"), ("DeepFM", "experts"), ("DeepFM", "items"), ("DCNV2", "all"),
                              ("DIN", "items"), ("SASRec", "self")]
)  # fmt: skip
def test_every_part_is_trained_and_survives_a_kill(backbone: str, variant: str, log: Log, tmp_path: Path) -> None:
    """After two stages no weight of the fusion is what it was; the vectors of items and the rest come back."""
    settings = RUNS.get(backbone, LABELLED)
    run = Job(Counted, log.folder, {**settings, **OWN, "liber_backbone": backbone, "n_stages": 2, **VARIANTS[variant]})
    walk = run.walk(tmp_path / "one")
    model: Any = walk.runner.model
    fresh: Any = Counted(walk.runner.config, walk.runner.standing(1).view)
    begun = dict(fresh.named_parameters())
    own = {name: p for name, p in model.named_parameters() if name.startswith(("fusion", "join", "target_query"))}
    same = [name for name, p in own.items() if begun[name].shape == p.shape and torch.equal(p, begun[name])]
    assert not same, f"{same} were not trained"
    if "liber_item_field" in VARIANTS[variant]:
        assert len(model._items) == walk.runner.stream.table.n_items and (model._items[1:].abs().sum(1) > 0).all()
    if variant in ("items", "self") and backbone != "DIN":
        run.killed(tmp_path / "killed", walk.ticks - 3)
        assert_same_walk(walk, run.walk(tmp_path / "killed", resume=True))


def test_the_answers_hang_on_the_items_text(log: Log, tmp_path: Path) -> None:
    walk = job("DIN", log, n_stages=2, **VARIANTS["items"]).walk(tmp_path)
    model: Any = walk.runner.model.eval()
    ctx = walk.runner.standing(1)
    rows = ctx.batcher.rows(ctx.stage.test, evaluation=True)
    with torch.no_grad():
        told = model.predict(rows)
        model._items = -model._items
        assert not torch.equal(told, model.predict(rows))


@pytest.mark.parametrize("variant", VARIANTS)
def test_backbones_that_no_gradient_reaches_are_refused(variant: str, log: Log, tmp_path: Path) -> None:
    for backbone in ("LR", "FFM"):
        run = Job(Counted, log.folder, {**LABELLED, **OWN, "liber_backbone": backbone, **VARIANTS[variant]})
        with pytest.raises(ConfigError, match=f"liber_backbone: '{backbone}' cannot take the knowledge in"):
            run.walk(tmp_path)


def test_a_field_that_one_of_two_does_not_reach_is_refused(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backbone that reads the user's field and not the item's is refused as well."""
    from recbole_cl.model.liber_fusion import KnowledgeField

    whole = KnowledgeField.concat_embed_input_fields

    def halved(self: Any, interaction: Any) -> torch.Tensor:
        fields = whole(self, interaction)
        return torch.cat([fields[:, :-1], fields[:, -1:].detach()], dim=1)

    monkeypatch.setattr(KnowledgeField, "concat_embed_input_fields", halved)
    with pytest.raises(ConfigError, match="no gradient reaches it"):
        job("DeepFM", log, n_stages=2, **VARIANTS["items"]).walk(tmp_path)


def test_what_knows_the_user_before_the_item_has_no_item_field(log: Log, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'liber_item_field' is True, but SASRec knows the user before the item"):
        job("SASRec", log, liber_item_field=True).walk(tmp_path)
    with pytest.raises(ConfigError, match="'liber_attention' is 'both'; it must be one of pooled, self"):
        job("SASRec", log, liber_attention="both").walk(tmp_path)


def test_the_mixer_by_hand() -> None:
    """Against a loop; what is later or padding does not matter, and a row that sees nothing stays what it is."""
    torch.manual_seed(0)
    mixer = CausalMixer(4, 3)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    rows, there = torch.randn(3, 5, 4), torch.ones(3, 5, dtype=torch.bool)
    there[0, 3:], there[1, 0] = False, False
    rows = rows * there.unsqueeze(2)
    found = mixer(rows, there)
    for user in range(3):
        for j in range(5):
            if not there[user, j]:
                continue
            past = [i for i in range(j + 1) if there[user, i]]
            query = mixer.query.weight @ rows[user, j]
            logits = torch.stack([
                query @ (mixer.key.weight @ rows[user, i]) / 2 + mixer.distance[min(j - i, 2)] for i in past
            ])  # fmt: skip
            values = torch.stack([mixer.value.weight @ rows[user, i] for i in past])
            assert torch.allclose(found[user, j], rows[user, j] + logits.softmax(0) @ values, atol=1e-5)
    assert torch.isfinite(found).all()
    assert (mixer(torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)) == 0).all()


def test_experts_by_hand() -> None:
    torch.manual_seed(0)
    experts = HybridExperts(2, 3, 4, 5, 2)
    rows = torch.randn(6, 4)
    for source in (0, 1):
        found = experts(source, rows)
        for row, got in zip(rows, found, strict=True):
            share = (row @ experts.gate[source]).softmax(0)
            outs = [
                torch.relu(row @ experts.first[group, e]) @ experts.last[group, e]
                for group in (0, source + 1)
                for e in range(3)
            ]
            assert torch.allclose(got, sum(s * o for s, o in zip(share, outs, strict=True)), atol=1e-5)
    assert (experts(0, torch.zeros(2, 4)) == 0).all()


def test_a_mixed_state_does_not_depend_on_what_comes_later() -> None:
    """States of one user with fewer partitions are what they are alone; with a query of each row, too."""
    torch.manual_seed(0)
    fusion = InterestFusion(4, 6, 3, False, True, 2, True)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    tables = torch.randn(9, 4), torch.randn(9, 4)
    start, count, query = torch.tensor([0, 0, 5, 0, 5]), torch.tensor([3, 1, 4, 0, 2]), torch.randn(5, 4)
    for asked in (None, query):
        together = fusion(tables, start, count, asked)
        for row in range(5):
            part = slice(row, row + 1)
            alone = fusion(tables, start[part], count[part], None if asked is None else asked[part])
            assert torch.allclose(together[part], alone, atol=1e-6)
        assert (together[3] == 0).all() and fusion(tables, start[3:4], count[3:4]).shape == (1, 3)


def test_shifts_may_be_differences_or_none(log: Log, tmp_path: Path) -> None:
    """Without a second wave there are half the calls; a difference is that of two summaries' vectors."""
    walks = {
        shift: job("DeepFM", log, n_stages=2, liber_shift=shift).walk(tmp_path / shift)
        for shift in ("cascade", "difference", "none")
    }
    numbers = {name: walk.result["reports"][-1]["numbers"] for name, walk in walks.items()}
    assert numbers["difference"]["calls"] == numbers["none"]["calls"] == numbers["none"]["partitions"]
    assert numbers["cascade"]["calls"] > numbers["none"]["calls"]
    model: Any = walks["difference"].runner.model
    known = model.knowledge
    for row in range(len(known)):
        expected = known.summary[row] - known.summary[row - 1] if known.number[row] else torch.zeros(8)
        assert torch.equal(model._shifts[row], expected)
    assert not walks["none"].runner.model._shifts.any()
    shuffled, _ = interest_tables(known, "shuffled", "none", 8, 1)
    assert np.array_equal(np.sort(shuffled.numpy(), 0), np.sort(known.summary.numpy(), 0))
    assert not (shuffled == known.summary).all()


def test_the_whole_history_is_read_at_each_closing(log: Log, tmp_path: Path) -> None:
    walk = job("DeepFM", log, n_stages=2, liber_reading="whole", liber_longest=10_000).walk(tmp_path)
    model: Any = walk.runner.model
    history = model._learner.history
    requests = history.summaries(range(len(history.partitions)))
    ends = [int(history.partitions.end[row] - walk.runner.stream.table.ptr[history.partitions.user[row]])
            for row in range(len(history.partitions))]  # fmt: skip
    assert [len(request.data["behaviours"]) for request in requests] == ends and max(ends) > 30
    numbers = walk.result["reports"][-1]["numbers"]
    assert numbers["calls"] == numbers["partitions"]
    ctx = walk.runner.standing(1)
    rows = ctx.batcher.rows(ctx.stage.test, evaluation=True)
    model.eval()
    with torch.no_grad():
        told = model.predict(rows)
        newest = torch.zeros(len(model._summaries), dtype=torch.bool)
        user, count = rows["_liber_user"], rows["_liber_count"]
        held = model._starts[user + 1] - model._starts[user]
        newest[(model._starts[user] + torch.minimum(count, held) - 1)[count > 0]] = True
        model._summaries = model._summaries * newest.unsqueeze(1)
        assert torch.equal(told, model.predict(rows)), "an older summary matters"
