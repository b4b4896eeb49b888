"""A model that cannot be loaded is refused with the reason, and tried again after a while, by one request."""

from __future__ import annotations

import logging

import pytest

from cert_ray.errors import InputError, RequestError
from cert_ray.serving.unfit_models import UnfitModels


class Clock:
    now_s = 5.0

    def __call__(self) -> float:
        return self.now_s


def refused(unfit: UnfitModels, name: str = "pandas") -> str:
    with pytest.raises(RequestError) as error:
        unfit.refuse(name)
    assert (error.value.status, error.value.param, error.value.code) == (500, "model", "model_not_loaded")
    return error.value.message


def test_what_can_be_loaded_is_not_refused() -> None:
    unfit = UnfitModels()
    unfit.refuse("pandas")
    assert "pandas" not in unfit
    assert len(unfit) == 0


def test_a_model_is_refused_with_cause_and_cure_until_it_is_tried_again() -> None:
    clock = Clock()
    unfit = UnfitModels(60, clock)
    told = unfit.add("pandas", InputError("/m", "no config.json in it", "Copy it again."))
    assert told.message == refused(unfit) == "pandas cannot be loaded: /m: no config.json in it. Copy it again."
    unfit.refuse("numpy")
    clock.now_s += 60
    unfit.refuse("pandas")
    assert "pandas" in unfit
    unfit.refuse("pandas")  # who only asks changes nothing
    unfit.postpone("pandas")
    assert refused(unfit) == told.message  # others, while the one tries
    unfit.remove("pandas")
    unfit.refuse("pandas")
    assert "pandas" not in unfit


def test_what_was_not_expected_is_told_in_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    unfit = UnfitModels()
    with caplog.at_level(logging.ERROR):
        assert "secret" not in unfit.add("pandas", RuntimeError("a secret")).message
    assert "pandas cannot be loaded: a secret" in caplog.text
    assert "its engine's log says why" in refused(unfit)


def test_no_refusal_is_raised_twice() -> None:
    """An error that is raised again grows by a traceback each time."""
    unfit = UnfitModels()
    errors = [unfit.add("pandas", RuntimeError())]
    for _ in range(2):
        with pytest.raises(RequestError) as error:
            unfit.refuse("pandas")
        errors.append(error.value)
    assert len(set(map(id, errors))) == 3
