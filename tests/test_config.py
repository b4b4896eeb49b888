"""What is said of options that cannot be used."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import pytest

from cert_ray.config import Config
from cert_ray.errors import ConfigError


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Paint(Config):
    colour: Literal[Colour.RED, Colour.BLUE] = Colour.RED


def test_members_of_an_enumeration_are_told_as_they_are_written() -> None:
    with pytest.raises(ConfigError) as refused:
        Paint.from_mapping({"colour": "green"}, "paint")
    assert str(refused.value) == "paint: colour: Input should be 'red' or 'blue' (got 'green')"
