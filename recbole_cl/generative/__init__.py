"""Items as sequences of codes: what generative recommenders are made of.

Parts that know nothing of each other's inside::

    tokenisers/, collisions.py, index.py, quality.py    texts' vectors to codes of items, kept in a JSON file
    template.py                                         a history as the tokens of a prompt
    trie.py                                             which codes may follow which, over the allowed items
    decoder.py, beam.py                                 a causal language model asked for the best items
    lora.py, proximal.py                                adapters of several stages: sums, magnitudes, pulls
"""
