"""From the annotated dataset to training rows: a vocabulary, token shards, and plans of packed rows.

`vocabulary` trains and saves the tokenizer, `encoding` turns one dataset shard into tokens, `shards` writes token
shards and opens a finished pack, `packing` plans rows of `context_tokens + 1`, `on_ray` runs a pack on a cluster.
"""
