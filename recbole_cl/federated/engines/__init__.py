"""What runs the clients of a round, one file each. ``recbole_cl.registry.engines`` finds them by name."""
