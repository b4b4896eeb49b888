"""A library's documentation for models that never saw it: signatures found by what a prompt says, as comments ahead.

`library_docs` makes the file of a package's API, once; `retriever` finds in it, and writes what was found. Training
(`tokens`), serving and evaluation use the same `Retriever`, so a model reads what it was trained to read.
"""
