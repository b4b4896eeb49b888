"""Benchmarks against named peers, run by hand: pytest does not collect them."""
