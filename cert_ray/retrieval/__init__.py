"""A library's documentation for models that never saw it: signatures that suit a prompt, put ahead of it as comments.

`library_docs` makes the file of a package's API, once. `retriever` searches it and writes what it finds. Training
(`tokens`), serving and evaluation use the same `Retriever`, so a model reads what it was trained to read.
"""
