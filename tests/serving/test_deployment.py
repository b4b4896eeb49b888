"""Options of a served application: one model or several, bounds that fit together, and no open door by accident."""

from __future__ import annotations

from pathlib import Path

import pytest

from cert_ray.errors import ConfigError
from cert_ray.serving.deployment import ServeConfig, ServerConfig

PANDAS = {"sketcher": "s", "generator": "g", "library": "pandas"}


def config(**options: object) -> ServeConfig:
    return ServeConfig.from_mapping(options, "test")


def test_a_single_model_stands_among_the_other_options() -> None:
    single = config(model="m", model_name="mine", replicas="2", engine={"dtype": "bfloat16"})
    assert single.models["mine"].folders["model"].endswith("/m")
    assert single.models["mine"].engine.dtype == "bfloat16"
    assert single.replicas == 2
    assert config(model="m").served == {"cert": None}


def test_each_model_has_its_librarys_documentation_by_a_path_that_holds_everywhere() -> None:
    pandas = {**PANDAS, "retrieve": {"docs": "pandas.jsonl", "top": 3}}
    models = config(models={"cert-pandas": pandas, "base": {"model": "b"}}).models
    elsewhere = models["cert-pandas"].absolute()
    assert elsewhere.retrieve is not None
    assert (elsewhere.retrieve.docs, elsewhere.retrieve.top) == (str(Path("pandas.jsonl").absolute()), 3)
    assert elsewhere.sketcher == str(Path("s").absolute())
    assert models["base"].absolute().retrieve is None


def test_several_models_have_names_and_libraries() -> None:
    several = config(models={"cert-pandas": PANDAS, "base": {"model": "b"}})
    assert several.served == {"cert-pandas": "pandas", "base": None}


def test_options_survive_being_written() -> None:
    for options in ({"model": "m"}, {"models": {"a": PANDAS, "b": {"model": "b"}}}):
        written = config(**options).model_dump(mode="json")
        assert ServeConfig.from_mapping(written, "test").model_dump(mode="json") == written


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "models: required"),
        ({"models": {}}, "models"),
        ({"models": {"a": PANDAS}, "model": "m"}, "not both"),
        ({"sketcher": "s"}, "give either model, or sketcher and generator"),
        ({"model": "m", "modle": "x"}, "modle: unknown option"),
        ({"model": "m", "rate": "often"}, "not a rate"),
        ({"model": "m", "autoscaling": {"min_replicas": 3, "max_replicas": 2}}, "min_replicas=3 is more"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        config(**options)


def test_room_is_counted_over_all_engines_that_may_be() -> None:
    options = {"model": "m", "max_ongoing_requests": 4, "max_queued_requests": 10}
    assert config(**options, replicas=3).max_in_flight == 22
    assert config(**options, autoscaling={"max_replicas": 5}).max_in_flight == 30


def test_an_open_server_wants_keys() -> None:
    with pytest.raises(ConfigError, match="api_keys_file"):
        ServerConfig.from_mapping({"model": "m", "host": "0.0.0.0"}, "test")
    ServerConfig.from_mapping({"model": "m", "host": "0.0.0.0", "api_keys_file": "keys"}, "test")
    ServerConfig.from_mapping({"model": "m", "host": "0.0.0.0", "without_keys": True}, "test")
    for host in ("127.0.0.1", "::1", "localhost"):
        ServerConfig.from_mapping({"model": "m", "host": host}, "test")


def test_a_server_that_may_be_open_wants_keys() -> None:
    with pytest.raises(ConfigError, match=r"not known.*api_keys_file"):
        config(model="m").check_exposure(None)
    config(model="m", api_keys_file="keys").check_exposure(None)
    config(model="m", without_keys=True).check_exposure(None)
