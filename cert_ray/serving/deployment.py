"""What is served and how: models by name, resources, queues, deadlines, keys. Options only; nothing is deployed here.

In: a mapping, from a Serve config file, a command line or code. Out: a validated `ServeConfig`.

`models` lists each model by name, with its library; `model_name` stands for whichever model's library a prompt imports.
A single model's options may instead stand beside the other options; then `model_name` is its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import pydantic

from cert_ray.config import Config
from cert_ray.errors import ConfigError
from cert_ray.serving.answering import ModelConfig
from cert_ray.serving.api_keys import parse_rate
from cert_ray.serving.openai_schema import RequestLimits

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class ServedModel(ModelConfig):
    """One of several models: its folders, and the library it was trained for."""

    library: str | None = None


class Autoscaling(Config):
    """How many engines there are: as many as the ongoing requests need, between two bounds."""

    min_replicas: int = pydantic.Field(default=1, ge=0)
    max_replicas: int = pydantic.Field(ge=1)
    target_ongoing_requests: float = pydantic.Field(default=8.0, gt=0)  # per engine
    upscale_delay_s: float = pydantic.Field(default=10.0, ge=0)
    downscale_delay_s: float = pydantic.Field(default=300.0, ge=0)

    @pydantic.model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ConfigError(f"min_replicas={self.min_replicas} is more than max_replicas={self.max_replicas}.")
        return self


class FrontDoorConfig(Config):
    """What the HTTP front door allows and logs."""

    limits: RequestLimits = RequestLimits()
    # Includes waiting; after it the work ends, with a 504.
    request_timeout_s: float = pydantic.Field(default=300.0, gt=0)
    rate: str | None = None  # per key, as 60/minute; a key file may give a key its own
    log_prompts: bool = False
    playground: bool = True  # the page at /

    @pydantic.field_validator("rate")
    @classmethod
    def _check_rate(cls, rate: str | None) -> str | None:
        if rate is not None:
            parse_rate(rate)
        return rate


class ServeConfig(FrontDoorConfig):
    """A served application: which models, under what names, with what resources and queues."""

    model_name: str = "cert"
    models: dict[str, ServedModel] = pydantic.Field(min_length=1)
    models_per_engine: int = pydantic.Field(default=2, ge=1)  # of several, in memory; the least recently used goes
    replicas: int = pydantic.Field(default=1, ge=1)  # engines, without autoscaling
    autoscaling: Autoscaling | None = None
    front_doors: int = pydantic.Field(default=1, ge=1)
    # Engines beyond `replicas` during an update, so that old ones serve until new ones are ready; rounded up. Use 0
    # where there is no room for another: then old ones stop first, and requests wait.
    surge_percent: int = pydantic.Field(default=25, ge=0, le=100)
    num_cpus: float = pydantic.Field(default=1, ge=0)  # per engine
    num_gpus: float = pydantic.Field(default=0, ge=0)  # per engine
    # Requests decoded together, per engine; each holds its part of the cache in memory.
    max_ongoing_requests: int = pydantic.Field(default=16, ge=1)
    max_queued_requests: int = pydantic.Field(default=64, ge=1)  # more are refused with 503
    health_check_period_s: float = pydantic.Field(default=5.0, gt=0)
    drain_timeout_s: float | None = pydantic.Field(default=None, ge=0)  # None: request_timeout_s
    api_keys_file: str | None = None  # see api_keys.py; None: no keys, which suits a server on loopback only
    without_keys: bool = False  # ask for no key although others may reach the server

    @pydantic.model_validator(mode="before")
    @classmethod
    def _read_single(cls, options: Any) -> Any:
        """One model's options may stand among the others; that model is served as `model_name`."""
        if not isinstance(options, Mapping):
            return options
        single = {name: value for name, value in options.items() if name in ServedModel.model_fields}
        if not single:
            return options
        if options.get("models"):
            raise ConfigError(f"models and {', '.join(single)}: give one model's options, or models, not both.")
        others = {name: value for name, value in options.items() if name not in single}
        return {**others, "models": {options.get("model_name", cls.model_fields["model_name"].default): single}}

    @property
    def served(self) -> Mapping[str, str | None]:
        """The models by name, each with its library."""
        return {name: model.library for name, model in self.models.items()}

    @property
    def most_engines(self) -> int:
        """The largest number of engines there can be."""
        return self.autoscaling.max_replicas if self.autoscaling is not None else self.replicas

    @property
    def at_once(self) -> int:
        """Requests that are worked on together."""
        return self.most_engines * self.max_ongoing_requests

    @property
    def max_in_flight(self) -> int:
        """Requests that are worked on or waiting."""
        return self.at_once + self.max_queued_requests

    def check_models(self) -> None:
        """Raise what `answering.ModelConfig.check` raises."""
        for name, model in self.models.items():
            model.check(self._told(name))

    def check_models_in_reach(self) -> dict[str, str]:
        """`check_models` for the models that can be read from here. Returns, by name, why the others cannot."""
        looked = {name: model.check_in_reach(self._told(name)) for name, model in self.models.items()}
        return {name: why for name, why in looked.items() if why is not None}

    def _told(self, name: str) -> str | None:
        return name if len(self.models) > 1 else None

    def check_exposure(self, host: str | None) -> None:
        """Raise `ConfigError` if others can reach a server at `host` and no key keeps them out. None: not known."""
        if host not in LOOPBACK and self.api_keys_file is None and not self.without_keys:
            where = "the address that Serve listens on is not known" if host is None else f"host={host!r}"
            raise ConfigError(
                f"{where}: others could reach this server, and api_keys_file is not set. Set it to a file with one "
                "key per line, or listen on 127.0.0.1, or set without_keys=true if something else keeps others out."
            )


class ServerConfig(ServeConfig):
    """A server on this machine or its cluster: a `ServeConfig`, and where it listens."""

    host: str = "127.0.0.1"  # Serve's own default is every interface
    port: int | None = pydantic.Field(default=None, ge=1, le=65535)  # None: a free one
    app_name: str = "cert-ray"

    @pydantic.model_validator(mode="after")
    def _check_exposure(self) -> ServerConfig:
        self.check_exposure(self.host)
        return self
