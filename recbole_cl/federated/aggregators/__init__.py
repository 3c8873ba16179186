"""What a server makes of the clients' updates, one file each; ``registry.aggregators`` finds them by name."""
