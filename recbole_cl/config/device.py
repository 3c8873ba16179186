"""Which device a run computes on."""

from __future__ import annotations

import os
from typing import Any

import torch

from recbole_cl import distributed
from recbole_cl.errors import ConfigError


def choose_device(final: dict[str, Any]) -> list[str]:
    """Chooses the device. CUDA_VISIBLE_DEVICES is not touched: it would hold for everything in the process.

    Args:
        final: The effective properties; ``device``, ``gpu_id`` and what RecBole derives from them are set.

    Returns:
        Warnings.

    Raises:
        ConfigError: If ``gpu_id`` names a GPU that is not there, or a process of torchrun has none.
    """
    gpu = final.get("gpu_id")
    ids = gpu if isinstance(gpu, list | tuple) else str("" if gpu is None else gpu).strip("()[] ").split(",")
    ids = [str(i).strip() for i in ids if str(i).strip()]
    final["gpu_id"] = ",".join(ids)
    final["single_spec"] = True
    final["local_rank"] = 0
    final["device"] = torch.device("cpu")
    if not final["use_gpu"] or not ids:
        return []
    if not torch.cuda.is_available():
        return ["property 'use_gpu' is True, but torch finds no CUDA device: the run uses the CPU"]
    if distributed.launched():  # one GPU a process; CUDA_VISIBLE_DEVICES chooses among them
        ids = [os.environ["LOCAL_RANK"]]
        if int(ids[0]) >= torch.cuda.device_count():
            raise ConfigError(
                f"torchrun: process {ids[0]} of this machine has no GPU, there are {torch.cuda.device_count()}; "
                f"start as many with --nproc_per_node, or set use_gpu to False"
            )
    if not ids[0].isdigit() or int(ids[0]) >= torch.cuda.device_count():
        raise ConfigError(
            f"property 'gpu_id' is {gpu!r}, but the GPUs here are numbered 0 to {torch.cuda.device_count() - 1}"
        )
    final["device"] = torch.device("cuda", int(ids[0]))
    return []
