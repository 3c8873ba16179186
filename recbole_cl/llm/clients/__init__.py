"""Clients of large language models, one file each. ``recbole_cl.registry.llm_clients`` finds them by name."""
