"""How old knowledge is kept: one file a strategy. ``recbole_cl.registry.strategies`` finds them by name."""
