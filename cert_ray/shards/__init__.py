"""Deterministic work units: a stage is a list of them, and each can be killed and run again."""
