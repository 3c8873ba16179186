"""What is learnt: RecBole models, some of them extended. ``recbole_cl.registry.models`` finds them by name."""
