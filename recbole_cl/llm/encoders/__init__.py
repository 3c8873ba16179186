"""Sentence encoders, one file each. ``recbole_cl.registry.encoders`` finds them by name."""
