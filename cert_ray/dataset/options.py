"""The options of preprocessing: everything that decides the dataset's bytes, and nothing else (workers do not)."""

from __future__ import annotations

from cert_ray.config import Config
from cert_ray.corpus.cleaning import CleaningConfig
from cert_ray.corpus.sources import SourceConfig
from cert_ray.dedup.minhash import MinHashConfig
from cert_ray.dedup.quality import QualityConfig
from cert_ray.quality.weights import WeightConfig
from cert_ray.sketching.anonymize import SketchKind


class PreprocessConfig(Config):
    """What is read, how it is cleaned, deduplicated, weighted and sketched."""

    sources: SourceConfig
    cleaning: CleaningConfig = CleaningConfig()
    minhash: MinHashConfig = MinHashConfig()
    dedup_quality: QualityConfig | None = QualityConfig()  # None does not measure it
    weights: WeightConfig = WeightConfig()
    sketch_kind: SketchKind = SketchKind.CONSTANTS


class AnnotateConfig(Config):
    """The part of the options that the last stage depends on."""

    weights: WeightConfig
    sketch_kind: SketchKind
