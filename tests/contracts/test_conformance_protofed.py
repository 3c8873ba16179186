"""ProtoFedSP through a whole walk: killed at any place of a round it resumes to the same bits; epsilon counts all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conformance_helpers import FUSE, Job, Walk, assert_reported, assert_same_walk, checkpoints, matrix, write_log
from safetensors.numpy import save_file

from recbole_cl import checkpoint
from recbole_cl.errors import CheckpointError, ConfigError
from recbole_cl.federated.ledger import BudgetSpent, Ledger
from recbole_cl.federated.uploads import Upload
from recbole_cl.model import protofed_sp
from recbole_cl.model.protofed_plan import budget_of
from recbole_cl.model.protofed_rounds import Rounds
from recbole_cl.tree import tree_hash

pytest.importorskip("dp_accounting", reason="dp-accounting, of the extra 'federated', is not installed")


class ProtoFedSP(protofed_sp.ProtoFedSP):
    """The model, with a fuse at the places where a round can be interrupted."""

    places: ClassVar[list[tuple[int, str]]] = []

    def outputs(self, sequence: torch.Tensor) -> Any:
        self._tick("clients")
        return super().outputs(sequence)

    def calculate_loss(self, batch: Any) -> torch.Tensor:
        self._tick("backbone")
        return super().calculate_loss(batch)

    def ledger(self) -> Ledger:
        return Ledger(self._ledger_path(), budget_of(self.config), float(self.config["protofed_delta"]), at=self._tick)

    def _tick(self, place: str) -> None:
        self.places.append((FUSE.ticks + 1, place))
        FUSE.tick()


SETTINGS = {
    "hidden_size": 16,
    "inner_size": 16,
    "n_layers": 2,
    "n_heads": 2,
    "epochs": 3,
    "eval_args": {"mode": {"valid": "uni20", "test": "uni20"}},
    "protofed_tokens": 2,
    "protofed_hidden": 16,
    "protofed_prototypes": 4,
    "protofed_width": 4,
    "protofed_shared_epochs": 2,
    "protofed_rounds": 2,
    "protofed_noise_multiplier": 1.5,
    "protofed_epsilon": 6.9,
    "checkpoint_keep": 100,
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(ProtoFedSP, write_log(tmp_path_factory.mktemp("log")).folder, SETTINGS)


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """The uninterrupted walk."""
    ProtoFedSP.places.clear()
    FUSE.ticks = 0
    return job.walk(tmp_path_factory.mktemp("whole"))


def ledger_of(walk: Walk) -> Ledger:
    return Ledger(walk.runner.folder / "ledger.jsonl", math.inf, 1e-5)


def test_the_backbone_is_trained_once_and_frozen(whole: Walk) -> None:
    """Its weights do not move after the first stage, nor do the shared parts but for prototypes; prompts do."""
    ends = {}
    for path in checkpoints(whole):
        state = checkpoint.read(path)
        if state["phase"] == "done":
            ends[state["stage"]] = state["model"]
    first, last = ends[0]["tensors"], ends[2]["tensors"]
    n = whole.runner.stream.stages[0].n_items
    for name, tensor in first.items():
        if name == "shared.prototypes":
            assert not torch.equal(tensor, last[name]), "no prototype was refreshed"
        elif name == "backbone.item_embedding.weight":
            assert torch.equal(tensor[1:n], last[name][1:n]) and not last[name][n:].any()
        else:
            assert torch.equal(tensor, last[name]), name
    clients = ends[2]["owned"]["clients"]
    assert clients["long"].abs().sum() > 0 and clients["short"].abs().sum() > 0
    users = {int(u) for stage in whole.runner.stream.stages for u in np.unique(stage.train.user)}
    assert set(clients["users"].tolist()) <= users
    assert np.isfinite(matrix(whole, "ndcg@5")).all()
    assert not any(p.requires_grad for p in whole.runner.model.parameters())


def test_passes_and_targets(whole: Walk) -> None:
    """Backbone and shared parts, then rounds; targets whose item the backbone never saw are not trained on."""
    passes = [(c["stage"], c["pass"]) for c in whole.result["curves"]]
    assert passes == [(0, "backbone")] * 3 + [(0, "shared")] * 2 + [(s, "rounds") for s in (1, 1, 2, 2)]
    stages, n = whole.runner.stream.stages, whole.runner.stream.stages[0].n_items
    assert (stages[2].train.label >= n).any(), "the log has no new items"
    assert not whole.runner.known.items[n:].any()
    rounds = [c for c in whole.result["curves"] if c["stage"] == 2]
    # What has only unseen items before it in its window cannot be trained on.
    table, targets = whole.runner.stream.table, stages[2].train[stages[2].train.label < n]
    dark = (table.item[table.seq[np.maximum(targets.hi - 1, targets.lo)]] >= n).sum()
    assert len(targets) - dark <= rounds[0]["targets"] < len(targets)
    cold = [c["n_cold"] for c in whole.result["cold"] if (c["t"], c["s"]) == (2, 2)]
    assert cold[0] >= (stages[2].test.label >= n).sum() > 0


def test_it_is_told(whole: Walk) -> None:
    """Epsilon with unit, adjacency, mode and delta; bytes; the share of targets that the backbone cannot know."""
    told = [r for r in whole.result["reports"] if r["who"] == "ProtoFedSP"]
    assert [r["stage"] for r in told] == [0, 1, 2]
    privacy = {row["what"]: row["value"] for row in told[-1]["tables"]["Privacy"]}
    spent = ledger_of(whole).spent()
    assert told[-1]["numbers"]["epsilon"] == pytest.approx(spent, abs=1e-4) and 0 < spent <= 6.9
    assert (privacy["unit"], privacy["adjacency"]) == ("the user", "add or remove one user")
    assert privacy["delta"] == "1e-05" and privacy["trust"].startswith("central")
    assert privacy["releases"] == "4 so far, 4 in the run" and "base stage" in privacy["outside the guarantee"]
    stages, n = whole.runner.stream.stages, whole.runner.stream.stages[0].n_items
    shares = told[-1]["tables"]["Targets whose item the backbone never saw"]
    assert [row["test"] for row in shares] == [f"{100 * (s.test.label >= n).mean():.1f} %" for s in stages]
    cost = whole.result["cost"][-1]
    assert cost["bytes_up_per_client"] == 2 * (4 + 4 * 4) and cost["bytes_down_per_client"] == 2 * (16 + 32)
    assert cost["trainable_per_client"] == 2 * 2 * 16
    assert len(told[-1]["tables"]["Rounds"]) == 2
    assert_reported(whole)


@pytest.mark.parametrize("place", ["clients", "charged", "drawn", "written"])
def test_killed_in_a_round(place: str, job: Job, whole: Walk, tmp_path: Path) -> None:
    """In the second round of the second stage: the same bits afterwards, and the budget counts each release once."""
    before = ledger_of(whole)
    charged = [tick for tick, name in ProtoFedSP.places if name == "charged"]
    at = {name: next(tick for tick, n in ProtoFedSP.places if n == name and tick >= charged[1]) for name in
          ("charged", "drawn", "written")}  # fmt: skip
    at["clients"] = max(tick for tick, name in ProtoFedSP.places if name == "clients" and tick < charged[1])
    state = job.killed(tmp_path, at[place])
    assert (state["phase"], state["stage"], state["progress"]["epoch"]) == ("train", 1, 1)
    path = tmp_path / "run" / "ledger.jsonl"
    kept = path.read_bytes()
    n = len(Ledger(path, math.inf, 1e-5).charges())
    assert n == (1 if place == "clients" else 2), "what was charged before the kill is not counted"
    assert state["side_stores"] == {"privacy ledger": str(path)}
    again = job.walk(tmp_path, resume=True)
    assert path.read_bytes().startswith(kept), "the ledger was rolled back"
    assert_same_walk(whole, again)
    assert path.read_bytes() == before.path.read_bytes(), "another budget than without the kill"
    assert again.result["reports"] == whole.result["reports"]


def test_a_ledger_that_is_gone_stops_the_run(job: Job, tmp_path: Path) -> None:
    """Going on with a new one would forget what was spent."""
    charged = [tick for tick, name in ProtoFedSP.places if name == "charged"]
    job.killed(tmp_path, charged[1])
    (tmp_path / "run" / "ledger.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"protofed_ledger.*Restore"):
        job.walk(tmp_path, resume=True)


def test_a_ledger_may_be_shared(job: Job, whole: Walk, tmp_path: Path) -> None:
    """Another run over the same users finds what was spent: the same releases are free, others exceed the budget."""
    path = tmp_path / "shared.jsonl"
    path.write_bytes(ledger_of(whole).path.read_bytes())
    same = job.walk(tmp_path / "same", protofed_ledger=str(path))
    assert same.result["matrix"] == whole.result["matrix"]
    assert path.read_bytes() == ledger_of(whole).path.read_bytes()
    with pytest.raises(BudgetSpent, match=r"holds 4 releases"):
        job.walk(tmp_path / "other", protofed_ledger=str(path), protofed_long_rate=7.0)


def test_static_prototypes_release_nothing(job: Job, tmp_path: Path) -> None:
    """There is no ledger, and the report says that nothing was spent; unseen items may have the mean row."""
    given = {"protofed_static": True, "protofed_new_items": "mean", "protofed_short_lifetime": "kept"}
    walk = job.walk(tmp_path, **given, protofed_participation=0.5)
    assert not (tmp_path / "run" / "ledger.jsonl").exists()
    told = walk.result["reports"][-1]
    assert {row["what"]: row["value"] for row in told["tables"]["Privacy"]}["epsilon spent"] == "0"
    n = walk.runner.stream.stages[0].n_items
    table = walk.runner.model.backbone.item_embedding.weight
    torch.testing.assert_close(table[n:], table[1:n].mean(0).expand(len(table) - n, -1))
    stage = walk.runner.stream.stages[2]
    cold = (stage.test.label >= stage.n_items).sum()
    assert walk.result["cold"][-1]["n_cold"] == cold < (stage.test.label >= n).sum(), "the mean row is ranked"
    trained = [c["targets"] for c in walk.result["curves"] if c["stage"] == 2]
    assert 0 < trained[0] < (stage.train.label < n).sum(), "half of the clients were to take part"


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_new_items_have_rows_of_their_content(suffix: str, job: Job, whole: Walk, tmp_path: Path) -> None:
    """By ridge regression on the items that the backbone saw; their targets are trained on and ranked."""
    rng = np.random.default_rng(0)
    names = [f"i{number}" for number in range(45) if number != 44]  # one item has no vector
    matrix = rng.normal(size=(len(names), 3)).astype(np.float32)
    file = tmp_path / f"content{suffix}"
    np.save(file, matrix) if suffix == ".npy" else save_file({"vectors": matrix}, file)
    file.with_suffix(".txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    walk = job.walk(tmp_path, protofed_new_items="vectors", protofed_item_vectors=str(file))
    n = walk.runner.stream.stages[0].n_items
    tokens = walk.runner.stream.dataset.field2id_token["item_id"]
    table = walk.runner.model.backbone.item_embedding.weight.numpy()
    x = np.stack([matrix[names.index(t)] if t in names else [np.nan] * 3 for t in tokens[: len(table)]])
    known = [number for number in range(1, n) if np.isfinite(x[number]).all()]
    centre, scale = x[known].mean(0), np.sqrt(((x[known] - x[known].mean(0)) ** 2).mean())
    # The ridge as three more rows of a plain least squares, an independent way to the same numbers.
    design = np.r_[(x[known] - centre) / scale, np.eye(3)]
    level = table[known].mean(0)
    weights = np.linalg.lstsq(design, np.r_[table[known] - level, np.zeros((3, table.shape[1]))], rcond=None)[0]
    new = [number for number in range(n, len(table)) if np.isfinite(x[number]).all()]
    np.testing.assert_allclose(table[new], (x[new] - centre) / scale @ weights + level, atol=1e-5)
    trained, plain = ([c["targets"] for c in w.result["curves"] if c["stage"] == 2] for w in (walk, whole))
    assert trained[0] > plain[0] and walk.runner.known.items[n:].any()


def test_vectors_that_do_not_fit_are_refused(job: Job, tmp_path: Path) -> None:
    """Without a file, without its tokens, with another number of them, or with a pickle inside."""
    np.save(tmp_path / "a.npy", np.zeros((3, 2)))
    np.save(tmp_path / "b.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("i1\ni2\n")
    for path in (None, "c.npy", "a.npy", "b.npy", "a.txt"):
        with pytest.raises(ConfigError, match="protofed_item_vectors"):
            given = None if path is None else str(tmp_path / path)
            job.walk(tmp_path, protofed_new_items="vectors", protofed_item_vectors=given)


def test_engines_agree(job: Job, whole: Walk, tmp_path: Path) -> None:
    """One client after the other gives the same prompts within 1e-6, and the same matrix."""
    loop = job.walk(tmp_path, protofed_engine="loop", protofed_ledger=str(tmp_path / "ledger.jsonl"))
    one, two = whole.runner.model.clients, loop.runner.model.clients
    torch.testing.assert_close(two.prompts.long, one.prompts.long, rtol=0, atol=1e-6)
    torch.testing.assert_close(two.prompts.short, one.prompts.short, rtol=0, atol=1e-6)
    np.testing.assert_allclose(matrix(loop, "ndcg@5"), matrix(whole, "ndcg@5"), atol=0.02)


def test_prompts_are_those_of_the_oracle(whole: Walk) -> None:
    """With the same prompt in every row the outputs are those of the adapters' prefix prompts on RecBole's encoder."""
    from recbole_cl.model.adapters import Prompt

    model = whole.runner.model.eval()
    sequence = torch.tensor([[3, 5, 2, 9, 0, 0], [4, 0, 0, 0, 0, 0]])
    tokens = torch.randn(2, 16)
    encoder = model.backbone.trm_encoder
    prompt = Prompt(2, 16)
    prompt.tokens.data.copy_(tokens)
    hidden, mask = model.backbone._embed(sequence), model.backbone.get_attention_mask(sequence)
    prompt.stand_before(encoder, active=True)
    try:
        expected = encoder(hidden, mask, output_all_encoded_layers=False)[-1]
    finally:
        prompt.stand_before(encoder, active=False)
    for wanted in (sequence > 0, torch.tensor([[0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.bool)):
        found = protofed_sp.ProtoFedSP.outputs(model, sequence)(tokens.expand(2, -1, -1), wanted)
        torch.testing.assert_close(found, expected[wanted], rtol=1e-5, atol=1e-6)


def test_answers_change_nothing(whole: Walk) -> None:
    """A user whom nobody knows is answered from the prototypes; asking leaves the clients as they are."""
    runner = whole.runner
    stage = runner.stream.stages[-1]
    ctx = runner.state.models.context(2, runner.model, runner.stream.view(2))
    batch = ctx.batcher.rows(stage.test[:4], evaluation=True)
    before = tree_hash(runner.model.owned_state())
    batch.interaction["user_id"] = torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        full = runner.model.full_sort_predict(batch)
        some = runner.model.scores(batch, torch.tensor([[1, 5]] * 4))
    torch.testing.assert_close(some, full[:, [1, 5]])
    assert tree_hash(runner.model.owned_state()) == before and torch.isfinite(full).all()


def test_online_steps_read_no_label_before_its_answer(job: Job, whole: Walk, tmp_path: Path) -> None:
    """Another label changes later answers of its user, and none before or of others; nothing of it lasts."""
    runner, model = whole.runner, whole.runner.model
    stage = runner.stream.stages[-1]
    ctx = runner.state.models.context(2, model, runner.stream.view(2))
    batch = ctx.batcher.rows(stage.test, evaluation=True)
    batch.interaction["user_id"] = torch.arange(len(stage.test)) % 3 + 1
    before, online = tree_hash(model.owned_state()), {**model.config.final_config_dict, "protofed_online": True}

    def answers(labels: torch.Tensor) -> torch.Tensor:
        batch.interaction["_label"] = labels
        model.config, kept = online, model.config
        try:
            with torch.no_grad(), model.evaluating(stage, "test"):
                return model.represent(batch)
        finally:
            model.config = kept

    labels = torch.randint(1, runner.stream.stages[0].n_items, (len(stage.test),))
    first, again = answers(labels), answers(labels)
    assert torch.equal(first, again), "an evaluation depends on the one before"
    changed = labels.clone()
    changed[4] = changed[4] % 20 + 1
    moved = (answers(changed) - first).abs().amax(1) > 1e-6
    later = torch.arange(len(labels)) > 4
    mine = batch["user_id"] == batch["user_id"][4]
    assert moved.any() and not (moved & ~(later & mine)).any()
    with torch.no_grad():
        plain = model.represent(batch)
    torch.testing.assert_close(first[:3], plain[:3])
    assert (first[3:] - plain[3:]).abs().max() > 1e-5, "nobody learnt"
    assert tree_hash(model.owned_state()) == before
    walk = job.walk(tmp_path, protofed_online=True)  # the run's own hash of the model stands guard, too
    assert np.isfinite(matrix(walk, "ndcg@5")).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"protofed_loss": "BCF"}, "protofed_loss.*BCE"),
        ({"protofed_backbone": "GRU4Rec"}, "protofed_backbone.*SASRec"),
        ({"protofed_participation": 0.0}, "protofed_participation"),
        ({"protofed_epsilon": -1.0}, "protofed_epsilon"),
        ({"protofed_steps": 0}, "protofed_steps"),
        ({"protofed_trust": "distributed"}, "protofed_trust.*not offered"),
        ({"protofed_preset": "paper"}, "protofed_preset.*paper_literal"),
        ({"protofed_prototypes": None, "protofed_width": None, "protofed_noise_multiplier": 9.0}, "drown"),
        ({"strategy": "FullRetrain"}, "FullRetrain cannot serve ProtoFedSP"),
        ({"strategy": "EWC"}, "EWC cannot serve"),
    ],
)
def test_what_makes_no_sense_is_refused(changed: dict, message: str, job: Job, tmp_path: Path) -> None:
    """With the property and what to use."""
    with pytest.raises(ConfigError, match=message):
        job.walk(tmp_path, **changed)


def test_the_ledger_is_readable(whole: Walk) -> None:
    """Two lines a release, the first one before the second; what was published is what is in it."""
    rows = [json.loads(line) for line in ledger_of(whole).path.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["charge", "release"] * 4
    assert [row["round"] for row in rows[1::2]] == whole.runner.model.published


def test_broken_clients_are_refused_and_the_round_goes_on(
    job: Job, whole: Walk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What else comes with the uploads is counted by its reason, and the released sums are those of the honest ones."""
    sent = Rounds.sent

    def attacked(rounds: Rounds, round_id: str, users: np.ndarray, vectors: np.ndarray) -> list[Upload]:
        honest = sent(rounds, round_id, users, vectors)
        one, width = users.tolist()[0], vectors.shape[1]
        return [
            *honest,
            Upload(one, round_id, -vectors[0]),  # once more, with its sign turned
            Upload(one, round_id.replace("round0", "round9"), vectors[0]),  # of another round
            Upload(10**9, round_id, vectors[0]),  # who was never asked
            Upload(True, round_id, vectors[0]),
            Upload("u1", round_id, vectors[0]),
            Upload(one, None, np.ones(width)),
        ]

    monkeypatch.setattr(Rounds, "sent", attacked)
    walk = job.walk(tmp_path)
    assert ledger_of(walk).path.read_bytes() == ledger_of(whole).path.read_bytes()
    assert walk.result["matrix"] == whole.result["matrix"]
    told = {row["reason"]: row["uploads"] for row in walk.result["reports"][1]["tables"]["Refused uploads"]}
    assert told["a client that was not asked"] == 2 and told["a client that is no number"] == 4
    assert told["another round: replayed, stale or from the future"] >= 3
    assert sum(row["refused"] for row in walk.result["reports"][1]["tables"]["Rounds"]) == 12
    monkeypatch.setattr(Rounds, "sent", lambda *given: [])
    lonely = job.walk(tmp_path / "all gone")
    assert np.isfinite(matrix(lonely, "ndcg@5")).all(), "a round that nobody answers ends the run"


def test_a_prompt_for_each_target_and_the_transport_alignment(job: Job, tmp_path: Path) -> None:
    """Both through a whole walk; the prompts differ from those of an update's one prompt."""
    pytest.importorskip("ot", reason="POT, of the extra 'federated', is not installed")
    walk = job.walk(tmp_path, protofed_prompt_per="target", protofed_align_form="wasserstein")
    trained = [c["targets"] for c in walk.result["curves"] if c["pass"] == "rounds"]
    assert np.isfinite(matrix(walk, "ndcg@5")).all() and min(trained) > 0
    assert walk.runner.model.clients.prompts.long.abs().sum() > 0


def test_the_paper_literally(job: Job, tmp_path: Path) -> None:
    """The preset's own defaults, those that were given all the same, and the true epsilon beside the paper's."""
    kept = {k: v for k, v in SETTINGS.items() if k not in ("protofed_epsilon", "protofed_noise_multiplier",
            "protofed_prototypes", "protofed_width")}  # fmt: skip
    literal = Job(ProtoFedSP, job.data, {**kept, "protofed_hidden": 64, "protofed_preset": "paper_literal"})
    walk = literal.walk(tmp_path, protofed_participation=0.5, protofed_prototypes=6)
    model = walk.runner.model
    assert (model.plan.sizes.prototypes, model.plan.sizes.width) == (6, 64) and model.settings.short_rate == 5e-3
    privacy = {row["what"]: row["value"] for row in walk.result["reports"][-1]["tables"]["Privacy"]}
    assert privacy["epsilon by the paper"].startswith("3.4") and privacy["true epsilon"].startswith("infinite")
    assert privacy["epsilon spent"].startswith("infinite") and privacy["budget"] == "none"
    with pytest.raises(ConfigError, match="AsPrinted has no private form"):
        literal.walk(tmp_path / "budget", protofed_epsilon=3.4)
