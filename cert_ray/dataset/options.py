"""The options of preprocessing: everything that decides the dataset's bytes, and nothing else (workers do not)."""

from __future__ import annotations

from cert_ray.config import Config
from cert_ray.corpus.cleaning import CleaningConfig
from cert_ray.corpus.decontamination import DecontaminationConfig
from cert_ray.corpus.licences import AllowedLicences
from cert_ray.corpus.secrets import SecretsConfig
from cert_ray.corpus.sources import SourceConfig
from cert_ray.dedup.minhash import MinHashConfig
from cert_ray.dedup.quality import QualityConfig
from cert_ray.quality.weights import WeightConfig
from cert_ray.sketching.anonymize import SketchKind


class PreprocessConfig(Config):
    """What is read, how it is cleaned, deduplicated, weighted and sketched. `docs/corpus.md` explains cleaning."""

    sources: SourceConfig
    # Inputs added later, one list per generation: decisions and shards of earlier generations stay.
    appended: tuple[tuple[str, ...], ...] = ()
    cleaning: CleaningConfig = CleaningConfig()
    secrets: SecretsConfig | None = SecretsConfig()  # None keeps them
    licences: AllowedLicences = None  # SPDX ids; None keeps every file
    decontaminate: DecontaminationConfig = DecontaminationConfig()  # or a list of problem files
    minhash: MinHashConfig = MinHashConfig()
    dedup_quality: QualityConfig | None = QualityConfig()  # None: not measured
    weights: WeightConfig = WeightConfig()
    sketch_kind: SketchKind = SketchKind.CONSTANTS


class AnnotateConfig(Config):
    """The part of the options that the last stage depends on."""

    weights: WeightConfig
    sketch_kind: SketchKind
