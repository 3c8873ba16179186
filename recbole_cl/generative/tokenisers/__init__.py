"""Tokenisers of items, one file each. ``recbole_cl.registry.tokenisers`` finds them by name."""
