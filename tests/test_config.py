"""What is said of options that cannot be used."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Literal

import pytest

from cert_ray.config import Config
from cert_ray.errors import ConfigError


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Coat(Config):
    litres: float | None = None
    layers_mm: tuple[float, ...] = ()


class Paint(Config):
    colour: Literal[Colour.RED, Colour.BLUE] = Colour.RED
    coat: Coat = Coat()


def test_members_of_an_enumeration_are_told_as_they_are_written() -> None:
    with pytest.raises(ConfigError) as refused:
        Paint.from_mapping({"colour": "green"}, "paint")
    assert str(refused.value) == "paint: colour: Input should be 'red' or 'blue' (got 'green')"


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, "inf", "nan"])
def test_numbers_that_are_not_finite_are_refused_by_name(number: float | str) -> None:
    for coat, name in (({"litres": number}, "litres"), ({"layers_mm": [1.0, number]}, r"layers_mm\.1")):
        with pytest.raises(ConfigError, match=rf"coat\.{name}: Input should be a finite number"):
            Paint.from_mapping({"coat": coat}, "paint")
