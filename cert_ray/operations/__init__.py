"""Verbs that cross stages: recipes, the pipeline they describe, the demo, the doctor."""
