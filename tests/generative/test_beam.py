"""Beam search over a trie: Hugging Face's sequences and scores, brute force, and nothing but items."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_llm import SIZES, TOKENS, items, prompts, small_llm, trie_of

from recbole_cl.errors import ConfigError, DataError
from recbole_cl.generative.beam import CodeTokens, beam_search, best_items, in_parts, sequence_scores
from recbole_cl.generative.decoder import CopyingDecoder, TreeDecoder
from recbole_cl.generative.trie import Trie

DECODERS = [TreeDecoder, CopyingDecoder]


@pytest.fixture(scope="module")
def llm() -> Any:
    return small_llm()


def all_scores(llm: Any, tokens: torch.Tensor, lengths: torch.Tensor, codes: torch.Tensor, how: str) -> torch.Tensor:
    """Returns the log-probability of every item's codes after each prompt by whole passes, ``[B, n]``; no cache."""
    out = torch.zeros(len(tokens), len(codes))
    for row, length in enumerate(lengths.tolist()):
        asked = TOKENS.of(codes)
        whole = torch.cat([tokens[row, :length].expand(len(codes), -1), asked], dim=1)
        logits = llm(input_ids=whole).logits.double()
        for level in range(4):
            at = logits[:, length - 1 + level]
            if how == "level":
                block = at[:, TOKENS.first[level] : TOKENS.first[level] + SIZES[level]]
                gained = block.log_softmax(-1).gather(1, codes[:, level : level + 1])
            else:
                gained = at.log_softmax(-1).gather(1, asked[:, level : level + 1])
            out[row] += gained.squeeze(1).float()
    return out


@pytest.mark.parametrize("decoder", DECODERS)
def test_it_finds_what_generate_finds(llm: Any, decoder: type) -> None:
    """The same sequences as ``generate`` with a prefix function, scores within 1e-5: two ways to one number."""
    codes, allowed = items(400)
    tokens, lengths = prompts(6, 30)
    width, longest = 10, tokens.size(1)
    found = beam_search(decoder(llm), TOKENS, trie_of(codes, allowed), tokens, lengths, width)
    tree: dict[int, Any] = {}
    for row in TOKENS.of(codes[allowed]).tolist():
        node = tree
        for token in row:
            node = node.setdefault(token, {})

    def children(_: int, ids: torch.Tensor) -> list[int]:
        node = tree
        for token in ids[longest:].tolist():
            node = node[token]
        return list(node)

    left, seen = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, length in enumerate(lengths.tolist()):
        left[row, longest - length :], seen[row, longest - length :] = tokens[row, :length], 1
    theirs = llm.generate(
        left, attention_mask=seen, max_new_tokens=4, num_beams=width, num_return_sequences=width, do_sample=False,
        prefix_allowed_tokens_fn=children, length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    sequences = theirs.sequences[:, longest:].view(len(tokens), width, 4)
    assert torch.equal(sequences, TOKENS.of(found.codes))
    assert torch.allclose(theirs.sequences_scores.view(len(tokens), width), found.scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("how", ["full", "level"])
def test_a_beam_as_wide_as_the_trie_is_brute_force(llm: Any, decoder: type, how: str) -> None:
    codes, allowed = items(300)
    tokens, lengths = prompts(4, 12)
    trie = trie_of(codes, allowed)
    width = max(trie.width(level) for level in range(4))
    spelt = CodeTokens(TOKENS.first, SIZES, how)
    found = beam_search(decoder(llm), spelt, trie, tokens, lengths, width)
    listed, scores = best_items(found, trie, 50)
    reference = all_scores(llm, tokens, lengths, codes, how).masked_fill(~allowed, -torch.inf)
    values, _ = reference.topk(50, dim=1)
    assert torch.allclose(values, scores, atol=1e-4, rtol=0)
    assert torch.allclose(reference.gather(1, listed), scores, atol=1e-4, rtol=0)
    assert all(len(set(row)) == 50 for row in listed.tolist())


def test_a_narrow_beam_finds_less_than_brute_force(llm: Any) -> None:
    """So the width matters, and the test before could fail."""
    codes, allowed = items(300)
    tokens, lengths = prompts(16, 12)
    trie = trie_of(codes, allowed)
    _, narrow = best_items(beam_search(TreeDecoder(llm), TOKENS, trie, tokens, lengths, 2), trie, 2)
    _, wide = best_items(beam_search(TreeDecoder(llm), TOKENS, trie, tokens, lengths, 300), trie, 2)
    assert (narrow <= wide + 1e-5).all() and (narrow < wide - 1e-3).any()


@pytest.mark.parametrize("decoder", DECODERS)
def test_nothing_but_allowed_items_is_found(llm: Any, decoder: type) -> None:
    for seed in range(5):
        codes, allowed = items(60, seed)
        tokens, lengths = prompts(8, 9, seed)
        trie = trie_of(codes, allowed)
        listed, scores = best_items(beam_search(decoder(llm), TOKENS, trie, tokens, lengths, 7), trie, 7)
        assert allowed[listed].all() and torch.isfinite(scores).all()
        assert (scores.diff(dim=1) <= 0).all()


def test_excluded_items_leave_full_lists(llm: Any) -> None:
    """A prefix whose items are all excluded takes no beam; the lists are those of a trie without the items."""
    codes, allowed = items(200, most=(2, 2, 3, 9))
    tokens, lengths = prompts(3, 9)
    trie = trie_of(codes, allowed)
    g = torch.Generator().manual_seed(1)
    gone = torch.rand(3, 200, generator=g) < 0.5
    gone[1] = codes[:, 0] == 0  # half the trie
    gone[2] = False
    excluded = gone.nonzero(as_tuple=True)
    found = beam_search(TreeDecoder(llm), TOKENS, trie, tokens, lengths, 6, excluded)
    listed, scores = best_items(found, trie, 6, excluded)
    for row in range(3):
        alone = trie_of(codes, allowed & ~gone[row])
        part = tokens[row : row + 1, : lengths[row]]
        want = beam_search(TreeDecoder(llm), TOKENS, alone, part, lengths[row : row + 1], 6)
        expected, values = best_items(want, alone, 6)
        assert torch.equal(expected[0], listed[row])
        assert torch.allclose(values[0], scores[row], atol=1e-5, rtol=0)


def test_fewer_items_than_asked_leave_empty_slots(llm: Any) -> None:
    codes, allowed = items(40)
    allowed[:] = False
    allowed[[3, 9]] = True
    tokens, lengths = prompts(2, 6)
    trie = trie_of(codes, allowed)
    excluded = (torch.tensor([0, 1, 1]), torch.tensor([3, 3, 9]))
    listed, scores = best_items(
        beam_search(TreeDecoder(llm), TOKENS, trie, tokens, lengths, 5, excluded), trie, 5, excluded
    )
    assert listed.tolist() == [[9, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert torch.isfinite(scores).tolist() == [[True] + [False] * 4, [False] * 5]


def test_items_of_one_leaf_follow_each_other(llm: Any) -> None:
    codes, allowed = items(30)
    codes[5] = codes[11] = codes[17]
    allowed[:] = False
    allowed[[5, 11, 17, 20]] = True
    tokens, lengths = prompts(4, 6)
    trie = trie_of(codes, allowed)
    excluded = (torch.tensor([3]), torch.tensor([11]))
    listed, _ = best_items(beam_search(TreeDecoder(llm), TOKENS, trie, tokens, lengths, 4, excluded), trie, 4, excluded)
    for row in listed.tolist()[:3]:
        assert "5, 11, 17" in str(row)
    assert sorted(listed[3].tolist()) == [0, 5, 17, 20]


@pytest.mark.parametrize("decoder", DECODERS)
def test_ragged_batches_are_single_rows(llm: Any, decoder: type) -> None:
    codes, allowed = items(200)
    tokens, lengths = prompts(5, 20)
    trie = trie_of(codes, allowed)
    together = beam_search(decoder(llm), TOKENS, trie, tokens, lengths, 8)
    for row, length in enumerate(lengths.tolist()):
        alone = beam_search(decoder(llm), TOKENS, trie, tokens[row : row + 1, :length], lengths[row : row + 1], 8)
        assert torch.equal(alone.codes[0], together.codes[row])
        assert torch.allclose(alone.scores[0], together.scores[row], atol=1e-5, rtol=0)


def test_given_candidates_are_scored_by_teacher_forcing(llm: Any) -> None:
    codes, _ = items(40)
    tokens, lengths = prompts(4, 11)
    asked = codes.expand(4, -1, -1)
    found = sequence_scores(TreeDecoder(llm), TOKENS, tokens, lengths, asked)
    assert torch.allclose(found, all_scores(llm, tokens, lengths, codes, "full"), atol=1e-4, rtol=0)


def test_an_empty_catalogue_is_told() -> None:
    codes, allowed = items(10)
    with pytest.raises(DataError, match="no item may be recommended"):
        trie_of(codes, allowed & False)


def test_an_unknown_normaliser_is_told() -> None:
    with pytest.raises(ConfigError, match="beam_normaliser"):
        CodeTokens((0,), (4,), "row")


def test_a_trie_by_hand() -> None:
    """The drawing in the module."""
    codes = torch.zeros(10, 3, dtype=torch.int64)
    codes[7], codes[9] = torch.tensor([0, 1, 0]), torch.tensor([0, 1, 2])
    codes[4], codes[2] = torch.tensor([0, 3, 1]), torch.tensor([5, 0, 0])
    allowed = torch.zeros(10, dtype=torch.bool)
    allowed[[7, 9, 4, 2]] = True
    trie = Trie(codes, allowed, (8, 8, 8))
    assert trie.items.tolist() == [7, 9, 4, 2]
    assert [trie.width(level) for level in range(3)] == [2, 3, 4]
    assert [counts.tolist() for counts in trie.counts] == [[3, 1], [2, 1, 1], [1, 1, 1, 1]]
    nodes, code, there = trie.children(1, torch.tensor([[0, 1]]))
    assert code[there].tolist() == [1, 3, 0] and nodes[there].tolist() == [0, 1, 2]
    nodes, code, there = trie.children(2, torch.tensor([[0, 1, 2]]))
    assert code[there].tolist() == [0, 2, 1, 0] and nodes[there].tolist() == [0, 1, 2, 3]


def test_parts_hold_every_row_once() -> None:
    lengths = torch.tensor([3, 9, 1, 9, 4, 2])
    parts = in_parts(lengths, 18)
    assert sorted(torch.cat(parts).tolist()) == list(range(6))
    assert all(len(part) == 1 or len(part) * int(lengths[part].max()) <= 18 for part in parts)
