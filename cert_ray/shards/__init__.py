"""Deterministic work units: what a stage does is a list of them, and each can be killed and run again."""
