"""How the fields of a result are called on the page."""

from __future__ import annotations

from recbole_cl.report import text

#: Labels of the fields of ``disparity``; others are told under their own name.
ITEM_DISPARITY = {
    "item_disparity": "items |head - tail|",
    "exp_head": "Exp head",
    "exp_tail": "Exp tail",
    "share_head": "slots on head",
    "share_tail": "slots on tail",
    "n_head_items": "head items",
    "n_tail_items": "tail items",
    "n_recommendations": "slots",
}
USER_DISPARITY = {
    "user_disparity": "users |hi - lo|",
    "exp_active": "Exp hi (active)",
    "exp_inactive": "Exp lo (inactive)",
    "n_active_users": "active users",
    "n_inactive_users": "inactive users",
}

#: Fields of ``cost`` and how each is told.
COST = {
    "seconds": ("whole stage", text.seconds),
    "train_seconds": ("training", text.seconds),
    "eval_seconds": ("evaluation", text.seconds),
    "peak_memory_mb": ("peak memory", lambda v, none="-": text.size(None if text.finite(v) is None else v * 1e6, none)),
    "parameters": ("parameters", text.count),
    "trainable_parameters": ("trainable", text.count),
    "model_bytes": ("model size", text.size),
    "backbones": ("#B backbones kept", text.count),
    "objectives": ("#F objectives at once", text.count),
    "bytes_per_task": ("kept for the task", text.size),
}
