"""Training on devices that keep their data: what federated recommenders are made of."""
