"""A result as a run writes it, made up but of realistic size and shape; for tests and for looking at a page."""

from __future__ import annotations

from typing import Any

import numpy as np

from recbole_cl.results import STRATA, exposure_disparity, head_mask, stage_curve, steps_to_95, summarise_all

METRICS = {"NDCG@10": 0.11, "Recall@10": 0.19, "MRR@10": 0.09, "Hit@10": 0.21, "Precision@10": 0.021}


def make_result(stages: int = 5, seed: int = 2020, metrics: dict[str, float] | None = None) -> dict[str, Any]:
    """Makes a result.

    Args:
        stages: Number of stages T.
        seed: Seed of the made-up numbers.
        metrics: ``{metric: typical value}``; the first one is the primary metric.

    Returns:
        The result, JSON-able.
    """
    random = np.random.default_rng(seed)
    metrics = metrics or METRICS
    t, s = np.meshgrid(np.arange(stages), np.arange(stages), indexing="ij")
    # Learnt best at its own stage, forgotten slowly after, of some use before.
    shape = np.where(t >= s, 0.55 + 0.45 * np.exp(-0.35 * (t - s)), 0.42 * np.exp(-0.25 * (s - t - 1)))
    shape = shape * np.linspace(0.85, 1.1, stages)[None, :]
    noise = random.normal(0, 0.02, (stages, stages))
    matrix = {m: (typical * (shape + noise)).round(12).tolist() for m, typical in metrics.items()}
    reference = {m: (typical * 0.06 * np.ones(stages)).tolist() for m, typical in metrics.items()}
    primary = next(iter(metrics))

    table, curves, cost, disparity = [], [], [], []
    users, items = 0, 0
    for i in range(stages):
        n_train = 60000 if i == 0 else 8000 + 150 * i
        new_users, new_items = (5200, 2900) if i == 0 else (610 - 30 * i, 160 - 10 * i)
        users, items = users + new_users, items + new_items
        table.append(
            {
                "name": f"2011-{2 * i + 1:02d}",
                "start": 1293840000 + 5184000 * i,
                "end": 1293840000 + 5184000 * (i + 1),
                "n_train": n_train,
                "n_valid": n_train // 8,
                "n_test": n_train // 8,
                "n_users": users,
                "n_items": items,
                "n_new_users": new_users,
                "n_new_items": new_items,
                "n_cold_targets": 0 if i == 0 else 41 + i,
            }
        )
        epochs = 9 if i == 0 else 5
        best = epochs - 3
        for epoch in range(epochs):
            level = matrix[primary][i][i] * (1 - 0.7 * np.exp(-0.7 * (epoch + (0.2 if i == 0 else 1.2))))
            level *= 1 - 0.02 * max(0, epoch - best)
            curves.append(
                {
                    "stage": i,
                    "pass": "main",
                    "epoch": epoch,
                    "targets": n_train * (epoch + 1),
                    "seconds": 0.00021 * n_train,
                    "train_loss": 7.9 * float(np.exp(-0.08 * epoch)) - 0.2 * i,
                    "terms": {
                        "data": 7.6 * float(np.exp(-0.08 * epoch)) - 0.2 * i,
                        "EWC": 0.0 if i == 0 else 0.11 * epoch,
                    },
                    "valid": {m: float(level * typical / metrics[primary]) for m, typical in metrics.items()},
                    "best": epoch == best,
                }
            )
        cost.append(
            {
                "seconds": 0.00021 * n_train * epochs + 6.5,
                "train_seconds": 0.00021 * n_train * epochs,
                "eval_seconds": 4.2 + 0.3 * i,
                "peak_memory_mb": 612.0 + 14 * i,
                "trainable_parameters": 64 * (items + 50) + 52000,
                "parameters": 64 * (items + 50) + 52000,
                "model_bytes": 4 * (64 * (items + 50) + 52000),
            }
        )
        counts = np.concatenate([[0], (1000 / np.arange(1, 201) ** 0.7).astype(int)])
        weight = counts[1:] ** (1.1 - 0.08 * i)
        lists = 1 + random.choice(200, (300, 10), p=weight / weight.sum())
        active = random.random(300) < 0.2
        values = random.random(300) * (0.12 + 0.03 * active)
        disparity.append({"stage": i, **exposure_disparity(lists, head_mask(counts), None, values, active)})

    factor = {
        "all": 1,
        "warm_user": 1.12,
        "new_user": 0.61,
        "warm_item": 1.08,
        "new_item": 0.2,
        "known": 1.05,
        "cold": 0,
    }
    strata: dict[str, dict[str, list[list[float | None]]]] = {
        m: {
            g: [
                [None if g in ("warm_user", "warm_item") and k == 0 else v * factor[g] for k, v in enumerate(row)]
                for row in rows
            ]
            for g in STRATA
        }
        for m, rows in matrix.items()
    }
    return {
        "name": "SASRec-online-retail-EWC-TimeSlices-seed2020",
        "seed": seed,
        "output_dir": "runs/SASRec-online-retail-EWC-TimeSlices-seed2020",
        "config": {
            "model": "SASRec",
            "dataset": "online-retail",
            "strategy": [["EWC", {"lambda": 10.0}]],
            "scheduler": "BaseThenIncrements",
            "n_stages": stages,
            "base_ratio": 0.6,
            "epochs": 30,
            "learning_rate": 0.001,
            "metrics": list(metrics),
            "topk": [10],
            "valid_metric": primary,
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "time_range": None,
        },
        "versions": {
            "recbole-cl": "0.1.0",
            "recbole": "1.2.1",
            "torch": "2.8.0+cpu",
            "numpy": "2.4.0",
            "python": "3.11.9",
        },
        "stages": table,
        "matrix": matrix,
        "primary_metric": primary,
        **summarise_all(matrix, reference),
        "reference": reference,
        "curves": curves,
        "steps_to_95": [steps_to_95(stage_curve(curves, i, primary)) for i in range(stages)],
        "strata": strata,
        "disparity": disparity,
        "cost": cost,
        "warnings": [
            "stage 3: 44 of 1,037 test targets have a user or item that was never trained on; they count as misses",
            "time_range: 5 interactions lie more than 30 years before the others (1956-08-21)",
        ],
    }
