"""Sketches: source text whose user-defined details are placeholders.

In: Python source. Out: the sketch as text and the spans of its placeholders (`anonymize`), blocks of code aligned with
blocks of sketch (`segments`), and the token ids of both (`prompt_format`, not imported here).
"""

from cert_ray.sketching.anonymize import (
    PLACEHOLDER_KINDS,
    Placeholder,
    Sketched,
    SketchKind,
    moved,
    sketch,
    sketch_source,
    sketch_spans,
)

__all__ = [
    "PLACEHOLDER_KINDS",
    "Placeholder",
    "SketchKind",
    "Sketched",
    "moved",
    "sketch",
    "sketch_source",
    "sketch_spans",
]
