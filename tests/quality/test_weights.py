"""The sampling weight, computed by hand from the paper's formula."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from cert_ray.errors import ConfigError
from cert_ray.quality.weights import WeightConfig, sampling_weights


@pytest.mark.parametrize(
    ("stars", "ut_score", "func_score", "weight"),
    [
        (0, 0.0, 1.0, 1.0),  # (1 + 0) * min(1.5, 1) * 1
        (9, 0.0, 1.0, 1.2),  # (1 + 1/5)
        (99_999, 0.0, 1.3, 2.0),  # (1 + 5/5), the bonus clipped
        (10_000_000, 0.0, 1.0, 2.0),  # log10 clipped at 5
        (0, 1.0, 1.0, 0.5),  # all tests: 1 - 1 + 0.5
        (0, 0.5, 1.0, 1.0),  # half tests: 1 - 0.5 + 0.5
        (0, 0.75, 1.0, 0.75),
        (99, 1.0, 0.2, 0.7),  # (1 + 2/5) * 0.5 * 1: rs2 = 1 hides empty functions
    ],
)
def test_published_constants(stars: int, ut_score: float, func_score: float, weight: float) -> None:
    assert sampling_weights([stars], [ut_score], [func_score], WeightConfig()) == pytest.approx([weight])


def test_rs2_below_one_lets_the_function_score_count() -> None:
    config = WeightConfig(rs0=0.5, rs1=0.0, rs2=0.4)
    weights = sampling_weights([9, 9, 9], [0.0, 0.25, 0.0], [0.2, 0.8, 1.3], config)
    assert weights == pytest.approx([0.7 * 1 * 0.4, 0.7 * 0.75 * 0.8, 0.7 * 1 * 1])


def test_unknown_stars_count_as_none() -> None:
    stars = pa.array([None, 0, 9], pa.int64())
    weights = sampling_weights(stars, pa.array([0.0] * 3), pa.array([1.0] * 3), WeightConfig())
    assert weights == pytest.approx([1.0, 1.0, 1.2])
    assert sampling_weights(np.array([]), np.array([]), np.array([]), WeightConfig()).shape == (0,)


def test_constants_that_no_file_could_satisfy_are_refused() -> None:
    with pytest.raises(ConfigError, match="rs0"):
        WeightConfig.from_mapping({"rs0": 0}, "recipe")
