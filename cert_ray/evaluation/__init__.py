"""Scoring generated code on benchmarks: problems and samples in; pass@k, per-problem results and a report out.

Generated code runs only inside `sandbox`, never in the calling process. How completions are made is not known here: a
model is a `Complete`, a callable from prompts to completions.
"""
