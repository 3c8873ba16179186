"""Items as sequences of tokens: what generative recommenders are made of."""
