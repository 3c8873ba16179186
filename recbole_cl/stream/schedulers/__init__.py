"""Schedulers: one file each. ``recbole_cl.registry.schedulers`` finds them by name."""
