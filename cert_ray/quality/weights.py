"""The sampling weight of files, from their stars and scores. In and out: arrays of equal length, one value per file.

    weight = (rs0 + clip(log10(stars + 1), 0, 5) / 5) * clip(1 - ut_score + rs1, 0, 1) * clip(func_score, rs2, 1)

Source: the paper, on resampling. With the published rs2 = 1, the last factor is always 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pydantic

from cert_ray.config import Config

Floats = np.ndarray[Any, np.dtype[np.float64]]


class WeightConfig(Config):
    """The three constants of the formula; the defaults are the published ones."""

    rs0: float = pydantic.Field(default=1.0, gt=0)  # at 0, files without stars would never be drawn
    rs1: float = pydantic.Field(default=0.5, ge=0)
    rs2: float = pydantic.Field(default=1.0, ge=0, le=1)


def sampling_weights(
    stars: npt.ArrayLike, ut_score: npt.ArrayLike, func_score: npt.ArrayLike, config: WeightConfig
) -> Floats:
    """The weight of each file, in [0, (rs0 + 1)]. Unknown stars (null, NaN) count as 0."""
    stars_N = np.asarray(stars, dtype=np.float64)
    stars_N = np.maximum(np.nan_to_num(stars_N, nan=0.0), 0.0)
    ut_N = np.asarray(ut_score, dtype=np.float64)
    func_N = np.asarray(func_score, dtype=np.float64)
    popularity_N = config.rs0 + np.clip(np.log10(stars_N + 1), 0, 5) / 5
    weights: Floats = popularity_N * np.clip(1 - ut_N + config.rs1, 0, 1) * np.clip(func_N, config.rs2, 1)
    return weights
