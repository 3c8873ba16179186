"""What LIBER costs: a step, a preparation, calls beside asking anew at every behaviour, and a server under load.

``OMP_NUM_THREADS=1 python tests/benchmarks/liber.py [steps] [preparation] [calls] [load]`` prints what
docs/liber.md tells; without a word it does all. ``--picture FILE`` draws the calls. CPU seconds of one thread, medians
of pairs in turn; ``load`` is wall-clock time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "llm"))

import numpy as np
import torch
from recbole.data.transform import construct_transform

from recbole_cl.config import CLConfig
from recbole_cl.llm.cache import AnswerCache
from recbole_cl.llm.cascade import Cascade, Limits
from recbole_cl.llm.clients.base import Request
from recbole_cl.llm.clients.offline import Offline
from recbole_cl.llm.clients.openai_compatible import OpenAICompatible
from recbole_cl.llm.encode import encode_texts
from recbole_cl.llm.prompts import read_prompt
from recbole_cl.llm.vectors import clause_vectors
from recbole_cl.model.liber_texts import History
from recbole_cl.strategy.context import StageContext
from recbole_cl.stream.batch import Batcher
from recbole_cl.stream.build import build_stream
from recbole_cl.stream.loader import make_loader

ALLOWED = {"DeepFM": 15, "DCNV2": 10, "DIN": 10}
RATED = {
    "load_col": {
        "inter": ["user_id", "item_id", "rating", "timestamp"],
        "user": ["user_id", "age", "gender", "occupation"],
        "item": ["item_id", "class", "release_year"],
    },
    "threshold": {"rating": 4}, "metrics": ["AUC"], "valid_metric": "AUC", "eval_args": {"mode": "labeled"},
}  # fmt: skip
CLICKED = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "MAX_ITEM_LIST_LENGTH": 50,
           "metrics": ["AUC"], "valid_metric": "AUC"}  # fmt: skip


def median_pair(one: Callable[[], Any], two: Callable[[], Any], times: int) -> tuple[float, float]:
    """Returns the medians of the CPU seconds of two calls, made in turn."""
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(times):
        for seconds, call in zip(found, (one, two), strict=True):
            begun = time.process_time()
            call()
            seconds.append(time.process_time() - begun)
    return statistics.median(found[0]), statistics.median(found[1])


def stepper(model: str, folder: str, **own: Any) -> Callable[[], Any]:
    """Returns a training step of a model on a batch of ml-100k's last stage; each call takes the next batch."""
    backbone = own.get("liber_backbone", model)
    settings = {**(CLICKED if backbone == "DIN" else RATED), "n_stages": 3, "train_batch_size": 2048, "seed": 2020,
                "show_progress": False, "output_dir": folder, **own}  # fmt: skip
    if backbone == "DIN":
        settings["mlp_hidden_size"] = [32, 16]
    config = CLConfig(model=model, dataset="ml-100k", config_dict=settings)
    stream = build_stream(config)
    construct_transform(config)
    stage, view = stream.stages[-1], stream.view(len(stream.stages) - 1)
    torch.manual_seed(0)
    made = config.model_class(config, view)
    batcher = Batcher(config, stream, view, stage.n_users, stage.n_items)
    ctx = StageContext(config, stream, stage.index, made, view, batcher, torch.device("cpu"))
    if model == "LIBER":
        batcher.collate = made.collate
        made.prepare_stage(ctx)
    batches = [batch for batch, _ in zip(make_loader(ctx, stage.train, "train"), range(8), strict=False)]
    optimiser = torch.optim.Adam(made.parameters(), 1e-3)
    number = 0

    def step() -> None:
        nonlocal number
        batch = batches[number % len(batches)]
        number += 1
        optimiser.zero_grad()
        made.calculate_loss(batch).backward()
        optimiser.step()

    return step


def steps(times: int = 40) -> None:
    for backbone, allowed in ALLOWED.items():
        with tempfile.TemporaryDirectory() as folder:
            own = {"liber_backbone": backbone, "liber_partition_size": 20, "liber_encoder": "hash"}
            plain, with_it = stepper(backbone, folder), stepper("LIBER", folder, **own)
            for step in (plain, with_it):
                for _ in range(3):
                    step()
            one, two = median_pair(plain, with_it, times)
        print(f"{backbone}: {1e3 * one:.1f} ms a step, with LIBER {1e3 * two:.1f} ms, "
              f"{100 * (two / one - 1):+.1f} % (asked: {allowed} %)", flush=True)  # fmt: skip


def write_log(folder: Path, n_users: int = 4000, n_items: int = 3000, each: int = 420) -> None:
    """Writes a log of users with 20 partitions of 20 behaviours; items have a title and tags."""
    rng, target = np.random.default_rng(0), folder / "many"
    target.mkdir(parents=True)
    popular = rng.permutation(n_items)
    with (target / "many.inter").open("w") as out:
        out.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for user in range(n_users):
            items = popular[(rng.zipf(1.3, each) - 1 + 37 * user) % n_items]
            times = 1_600_000_000 + np.cumsum(rng.integers(1, 5000, each))
            out.writelines(f"u{user}\ti{i}\t{t}\n" for i, t in zip(items, times, strict=True))
    tags = [f"tag{n}" for n in range(60)]
    with (target / "many.item").open("w") as out:
        out.write("item_id:token\ttitle:token_seq\ttags:token_seq\n")
        out.writelines(f"i{i}\tTitle of {i}\t{' '.join(rng.choice(tags, 3, replace=False))}\n" for i in range(n_items))


def preparation() -> None:
    """Times 4,000 users of 20 partitions: texts and cache with the offline client, then clause-wise vectors."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_log(folder)
        settings = {"data_path": str(folder), "output_dir": name, "liber_backbone": "SASRec", "show_progress": False,
                    "load_col": {"inter": ["user_id", "item_id", "timestamp"]}}  # fmt: skip
        config = CLConfig(model="LIBER", dataset="many", config_dict=settings)
        begun = time.process_time()
        stream = build_stream(config)
        print(f"reading the log: {time.process_time() - begun:.1f} CPU s")
        from recbole_cl.model.liber_profile import Profiles

        for run in ("first", "second"):
            begun = time.process_time(), time.perf_counter()
            profiles = Profiles.__new__(Profiles)
            profiles.config, profiles.stream, profiles.history = config, stream, History(config, stream)
            told = profiles.prepare()
            cpu, wall = time.process_time() - begun[0], time.perf_counter() - begun[1]
            print(f"{run} preparation: {told['partitions']:,} partitions, {told['texts']:,} texts, "
                  f"{told['calls made']:,} calls: {cpu:.1f} CPU s, {wall:.1f} s", flush=True)  # fmt: skip
        cache = AnswerCache(folder / "knowledge" / "answers.sqlite")
        texts = [kept.text for kept, _ in cache.everything()]
        cache.close()
        for encoder in ("hash", "minilm"):
            try:
                begun = time.process_time()
                _, distinct = clause_vectors(texts, lambda parts, e=encoder: encode_texts(e, parts, 0))
            except Exception as error:
                print(f"{encoder}: not here ({error})")
                continue
            print(f"{encoder}, clause-wise: {distinct:,} distinct clauses of {len(texts):,} texts, "
                  f"{time.process_time() - begun:.1f} CPU s", flush=True)  # fmt: skip
            if encoder == "minilm":
                whole(texts)


def whole(texts: list[str], n: int = 400) -> None:
    """Times whole texts beside their clauses, in one process."""
    part, kept = texts[:n], encode_texts("minilm", ["warm"], 0)
    begun = time.process_time()
    kept = encode_texts("minilm", part, 0)
    one = time.process_time() - begun
    begun = time.process_time()
    clause_vectors(part, lambda parts: encode_texts("minilm", parts, 1))
    two = time.process_time() - begun
    print(f"minilm: {n} whole texts ({kept.size(1)} numbers) {one:.1f} CPU s, their clauses {two:.1f} CPU s")


def calls(picture: str | None = None) -> None:
    """Tells the calls of a user beside asking anew at every behaviour, by the length of the log."""
    drawn = {}
    for dataset in ("lastfm-tags", "online-retail"):
        with tempfile.TemporaryDirectory() as folder:
            settings = {"liber_backbone": "SASRec", "output_dir": folder, "show_progress": False}
            config = CLConfig(model="LIBER", dataset=dataset, config_dict=settings)
            history = History(config, build_stream(config))
        parts, table = history.partitions, history.stream.table
        n = np.bincount(table.user, minlength=table.n_users)
        m = np.bincount(parts.user, minlength=table.n_users)
        made = np.maximum(0, 2 * m - 1)
        assert (made <= np.maximum(0, 2 * (n // 20) - 1)).all()
        print(f"{dataset}: {made.sum():,} calls where asking anew makes {n.sum():,} ({n.sum() / made.sum():.1f} times "
              f"as many); a user with a partition: median {np.median(made[m > 0]):.0f} of {np.median(n[m > 0]):.0f}, "
              f"at most {made.max()} of {n.max()}")  # fmt: skip
        drawn[dataset] = n[1:], made[1:]
    if picture:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=False)
        for axis, (dataset, (behaviours, asked)) in zip(axes, drawn.items(), strict=True):
            axis.plot(behaviours, np.maximum(asked, 0.5), ".", markersize=3, label="LIBER, K = 20")
            line = np.array([1, behaviours.max()])
            axis.plot(line, line, "-", color="0.5", label="asked anew at each behaviour")
            axis.set(xscale="log", yscale="log", xlabel="behaviours of a user", ylabel="calls", title=dataset)
            axis.legend(frameon=False)
        figure.tight_layout()
        figure.savefig(picture, dpi=110)


def load(n: int = 600, delay: float = 0.05) -> None:
    """Tells latency and throughput of questions to a server on loopback that takes its time and sometimes fails."""
    from llm_server import serving

    def behaviour(number: int, prompt: str) -> tuple[str, Any]:
        if number % 20 == 19:
            return "status", 500
        return "slow", (delay, "Mostly rock.")

    own = {"base_url": "", "model": "m", "key_env": "", "temperature": 0.0, "max_tokens": 50, "timeout": 10.0}
    prompt, data = read_prompt("summary", "v1"), {"behaviours": [{"tags": ["rock"]}]}
    for concurrency in (1, 8, 32):
        count = n if concurrency > 1 else n // 8
        with serving(behaviour) as server, tempfile.TemporaryDirectory() as folder:
            work = Cascade(
                "openai_compatible", OpenAICompatible({**own, "base_url": server.url}),
                Offline({"clauses": 8, "min_count": 2}), AnswerCache(Path(folder) / "c.sqlite"),
                Limits(concurrency, backoff=0.01),
            )  # fmt: skip
            asked = work.named(prompt, [Request("summary", f"What of {i}?", data) for i in range(count)])
            begun = time.perf_counter()
            work.wave(prompt, asked)
            seconds = time.perf_counter() - begun
            p50, p95 = np.percentile(work.spent.latencies, [50, 95]) * 1e3
            print(f"{concurrency} at once: {count} texts, {work.spent.calls} calls, {count / seconds:.0f} a second, "
                  f"p50 {p50:.0f} ms, p95 {p95:.0f} ms, {work.spent.fallbacks} stand-ins", flush=True)  # fmt: skip
            work.cache.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["steps", "preparation", "calls", "load"])
    parser.add_argument("--picture")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, CPU seconds unless it says otherwise")
    for what in given.what:
        print(f"-- {what}")
        {"steps": steps, "preparation": preparation, "load": load, "calls": lambda: calls(given.picture)}[what]()


if __name__ == "__main__":
    main()
