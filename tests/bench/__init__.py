"""Benchmarks against named peers, and the makers of their input. Not part of the test suite: see README.md."""
