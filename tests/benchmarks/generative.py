"""What the parts of PESO cost: beam search beside ``generate``, pulls and past adapters beside a plain step, codes.

``python tests/benchmarks/generative.py`` prints the table of docs/peso.md: CPU seconds of one thread, medians of pairs
in turn. With ``--cuda`` it prints the beam searches alone, in wall-clock seconds on a GPU, also of a model of the size
of Llama-3.2 1B.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from side_by_side import alternate

from recbole_cl.generative.beam import CodeTokens, beam_search
from recbole_cl.generative.decoder import TreeDecoder
from recbole_cl.generative.trie import Trie
from recbole_cl.model.small_llama import add_lora, factors, lora_layers, small_llama, train_only
from recbole_cl.registry import strategies, tokenisers

SIZES = (256,) * 4
TOKENS = CodeTokens((4, 260, 516, 772), SIZES)
N_ITEMS, BEAM = 20_000, 10
CASES = [("small", 64, 81), ("small", 16, 81), ("medium", 16, 81), ("medium", 8, 201), ("small", 1, 81)]
CUDA_CASES = [
    ("small", 64, 81),
    ("small", 256, 81),
    ("medium", 64, 201),
    ("1B", 16, 81),
    ("1B", 64, 81),
    ("small", 1, 81),
]
SHAPES = {"small": (64, 2, 4, 2, 256), "medium": (128, 4, 4, 4, 512), "1B": (2048, 16, 32, 8, 8192)}


def llama(shape: str, longest: int = 256) -> Any:
    """Returns an embedded Llama of a shape."""
    names = ("llm_hidden", "llm_layers", "llm_heads", "llm_kv_heads", "llm_intermediate")
    torch.manual_seed(0)
    return small_llama(dict(zip(names, SHAPES[shape], strict=True)), 1028, longest).eval()


def same_but_for_near_ties(ours: Any, theirs: torch.Tensor) -> bool:
    """Tells whether two searches found the same sequences, up to those whose scores rounding cannot tell apart."""
    differ = (TOKENS.of(ours.codes) != theirs).any(dim=-1)
    gaps = (ours.scores.unsqueeze(1) - ours.scores.unsqueeze(2)).abs()
    gaps.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return bool((~differ | (gaps.amin(dim=-1) < 1e-4)).all())


def beam_sides(
    shape: str, batch: int, longest: int, device: str = "cpu"
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns our beam search and Hugging Face's ``generate`` with a trie of dicts, over the same items and prompts."""
    llm = llama(shape).to(device)
    rng = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (N_ITEMS, 4), generator=rng)
    allowed = torch.ones(N_ITEMS, dtype=torch.bool)
    trie = Trie(codes.to(device), allowed.to(device), SIZES)
    prompts = torch.randint(4, 1028, (batch, longest), generator=rng).to(device)
    lengths = torch.full((batch,), longest, device=device)
    tree: dict[int, Any] = {}
    for row in TOKENS.of(codes).tolist():
        node = tree
        for token in row:
            node = node.setdefault(token, {})

    def children(_: int, ids: torch.Tensor) -> list[int]:
        node = tree
        for token in ids[longest:].tolist():
            node = node[token]
        return list(node)

    def ours() -> Any:
        with torch.no_grad():
            return beam_search(TreeDecoder(llm), TOKENS, trie, prompts, lengths, BEAM)

    def theirs() -> Any:
        return llm.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=4, num_beams=BEAM,
            num_return_sequences=BEAM, prefix_allowed_tokens_fn=children, do_sample=False, length_penalty=0.0,
        )  # fmt: skip

    found = theirs()[:, longest:].view(batch, BEAM, 4)
    assert same_but_for_near_ties(ours(), found), "the two sides do not find the same"
    return ours, theirs


class Adapted:
    """What a strategy sees of a model: its adapters."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def adapters(self) -> Any:
        return {name: factors(layer) for name, layer in lora_layers(self.llm).items()}

    def adapted_layers(self) -> Any:
        return lora_layers(self.llm)


class Ctx:
    """The little of a stage's context that the hooks read."""

    def __init__(self, llm: Any, index: int) -> None:
        self.model, self.index, self.terms = Adapted(llm), index, {}
        self.config = {"seed": 0, "lora_alpha": 16, "lora_rank": 8}

    def log(self, name: str, value: Any) -> None:
        float(value)


def step_of(name: str | None, stages: int = 1) -> Callable[[], Any]:
    """Returns one training step of the adapter, 64 windows of 81 tokens, under a strategy."""
    llm = llama("small")
    add_lora(llm, 8, 16, 0.0, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    train_only(llm, "adapter")
    ctx = Ctx(llm, 0)
    strategy = None
    if name is not None:
        cls = strategies.get(name)
        strategy = cls(cls.defaults)
        strategy.prepare_model(ctx)
        for index in range(stages):
            ctx.index = index
            strategy.begin_stage(ctx)
            for _, b in ctx.model.adapters().values():
                torch.nn.init.normal_(b, std=0.02)
            strategy.end_stage(ctx)
        ctx.index = stages
        strategy.begin_stage(ctx)
    tokens = torch.randint(4, 1028, (64, 81), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam([p for p in llm.parameters() if p.requires_grad], lr=1e-4, fused=True)
    llm.train()

    def step() -> None:
        optimizer.zero_grad()
        hidden = llm.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        torch.nn.functional.cross_entropy(llm.lm_head(hidden).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        if strategy is not None:
            strategy.add_gradients(ctx)
        optimizer.step()

    return step


def seconds_of(work: Callable[[], Any]) -> float:
    """Returns the median CPU seconds of three runs."""
    found = []
    for _ in range(3):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return statistics.median(found)


def codes_of(name: str) -> Callable[[], Any]:
    """Returns fitting and encoding of 12,000 vectors of 384 numbers."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(300, 384))
    vectors = (centres[rng.integers(0, 300, 12_000)] + 0.3 * rng.normal(size=(12_000, 384))).astype(np.float32)
    parameters = {"levels": 4, "size": 256, "beam": 1, "iterations": 25}

    def work() -> None:
        tokeniser = tokenisers.get(name)(parameters, 0)
        tokeniser.fit(vectors)
        tokeniser.encode(vectors)

    return work


def cuda() -> None:
    """Prints the beam searches on a GPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print("| | ours, s | `generate`, s | ratio |")
    print("|---|---|---|---|")
    for shape, batch, longest in CUDA_CASES:
        ours, theirs = beam_sides(shape, batch, longest, "cuda")
        found = alternate(ours, theirs, 7, device="cuda")
        width, layers = SHAPES[shape][:2]
        words = f"width {width}, {layers} layers, batch {batch}, {longest} tokens"
        print(f"| {words} | {found.ours:.4f} | {found.theirs:.4f} | {found.ratio:.1f} |", flush=True)
    version = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"\n{torch.cuda.get_device_name()}, float32, {version}, {date.today()}.")


def main() -> None:
    """Prints the table."""
    import faiss

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    print("| | ours, CPU s | rival, CPU s | ratio |")
    print("|---|---|---|---|")
    for shape, batch, longest in CASES:
        ours, theirs = beam_sides(shape, batch, longest)
        found = alternate(ours, theirs, 5 if batch > 1 else 15)
        width, layers = SHAPES[shape][:2]
        told = f"beam search, width {width}, {layers} layers, batch {batch}, {longest} tokens, beside `generate`"
        print(f"| {told} | {found.ours:.3f} | {found.theirs:.3f} | {found.ratio:.1f} |", flush=True)
    for told, name, stages in (
        ("a step without a pull beside one with PESO's", "PESO", 1),
        ("a step of SingleLoRA beside one of SumLoRA at stage 5", "SumLoRA", 4),
        ("a step of SingleLoRA beside one of SDLoRA at stage 5", "SDLoRA", 4),
    ):
        found = alternate(step_of(None), step_of(name, stages), 25)
        print(f"| {told} | {found.ours:.3f} | {found.theirs:.3f} | {found.ratio:.2f} |", flush=True)
    for name in ("residual_quantiser", "residual_kmeans"):
        print(
            f"| `{name}`: 12,000 vectors of 384 numbers to codes | {seconds_of(codes_of(name)):.1f} | - | - |",
            flush=True,
        )
    version = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"\nOne thread ({platform.machine()}), {version}, {date.today()}.")


if __name__ == "__main__":
    cuda() if "--cuda" in sys.argv else main()
