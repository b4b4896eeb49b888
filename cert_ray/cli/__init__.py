"""`cert-ray VERB`: parses options and calls the stage. One module per part of the flow; `app` is their frame.

The order of these imports is the order in which verbs are registered, and in which `--help` lists them.
"""

from cert_ray.cli import corpus, retrieval, training, serving, evaluation, operations  # noqa: I001  in the order of the flow
from cert_ray.cli.app import app, main

__all__ = ["app", "corpus", "evaluation", "main", "operations", "retrieval", "serving", "training"]
