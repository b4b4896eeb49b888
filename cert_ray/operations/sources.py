"""Who completes prompts: a model, a sketcher and a generator, or an endpoint; and how that becomes a `Complete`.

In: a `Source`, from the command line or a recipe. Out: a function from a temperature to a `Complete`. Models of any
kind are loaded once; one with an encoder and a decoder is recognised by its config. This module joins serving's answers
to evaluation's `Complete`: evaluation never imports serving.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import pydantic

from cert_ray import storage
from cert_ray.config import Config
from cert_ray.errors import ConfigError
from cert_ray.evaluation.benchmarks import Answer
from cert_ray.evaluation.run import Complete
from cert_ray.retrieval.retriever import RetrieveConfig, load_retriever
from cert_ray.serving.completers import (
    CompleterConfig,
    EndpointConfig,
    check_endpoint,
    complete_with_endpoint,
    with_documentation,
)
from cert_ray.serving.deployment import LOOPBACK

if TYPE_CHECKING:
    from cert_ray.serving.answering import Answerer
    from cert_ray.serving.answers import CascadeAnswer

_log = logging.getLogger(__name__)


class Source(Config, hide_input_in_errors=True):
    """Either `model`, or `sketcher` and `generator`, or `endpoint`. Names and addresses only: all of it is recorded."""

    model: str | None = None
    sketcher: str | None = None
    generator: str | None = None
    mask: str | None = None  # the text that tells a sequence-to-sequence `model` where to write
    endpoint: str | None = None
    endpoint_model: str | None = None  # None: the first that the endpoint lists
    api_key_env: str | None = None  # the environment variable that holds the endpoint's key
    retrieve: RetrieveConfig | None = None  # documentation ahead of each prompt; as text, the file or `recorded`'s

    @pydantic.field_validator("retrieve", mode="before")
    @classmethod
    def _read_retrieve(cls, given: object) -> object:
        return RetrieveConfig.from_text(given) if isinstance(given, str) else given

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        given = {name for name in ("model", "sketcher", "generator", "endpoint") if getattr(self, name) is not None}
        if given not in ({"model"}, {"sketcher", "generator"}, {"endpoint"}):
            raise ConfigError("give either --model, or --sketcher and --generator, or --endpoint")
        for option, owner in (("mask", "model"), ("endpoint_model", "endpoint"), ("api_key_env", "endpoint")):
            if getattr(self, option) is not None and owner not in given:
                raise ConfigError(f"--{option.replace('_', '-')} goes with --{owner}")
        if self.endpoint is not None:
            _check_address(self.endpoint)
        return self

    @property
    def recorded(self) -> dict[str, str]:
        """What an evaluation's record says about it."""
        given = self.model_dump(exclude_none=True, exclude={"retrieve"})
        if self.retrieve is not None:
            given["retrieve"] = self.retrieve.text
        return {name: str(value) for name, value in given.items()}

    @property
    def models(self) -> dict[str, str]:
        """The models given, by option."""
        given = {"model": self.model, "sketcher": self.sketcher, "generator": self.generator}
        return {option: folder for option, folder in given.items() if folder is not None}


def _check_address(url: str) -> None:
    """Refuse, without showing it, an address that may hold a password or key: addresses are recorded and logged."""
    try:
        parts = urlsplit(url)
        secret = "@" in parts.netloc or parts.query or parts.fragment
    except ValueError:
        raise ConfigError("--endpoint: not an address; give one as http://HOST:PORT") from None
    if secret:
        raise ConfigError(
            "--endpoint: give the address without user, password and ?query, since evaluations record it; a key "
            "belongs in an environment variable that --api-key-env names"
        )
    check_endpoint(url, "--endpoint")


def complete_at(source: Source, sampling: dict[str, Any]) -> Callable[[float], Complete]:
    """A function from a temperature to a `Complete` by `source`. Models are loaded once, when first asked for.

    Raises:
        ConfigError: for a model that is neither a folder nor on the hub, or a key that is not in the environment.
        InputError: for documentation or a model that cannot be used.
    """
    retrieve = None if source.retrieve is None else source.retrieve.pinned()
    if source.endpoint is not None:
        endpoint = _endpoint(source)

        def ask(temperature: float) -> Complete:
            return _documented(complete_with_endpoint(endpoint, _config(sampling, temperature)), retrieve)

        return ask
    return _local(source, retrieve, sampling)


def _local(source: Source, retrieve: RetrieveConfig | None, sampling: dict[str, Any]) -> Callable[[float], Complete]:
    from cert_ray.serving.answering import Answerer, ModelConfig
    from cert_ray.serving.seq2seq import Seq2SeqCompleter, is_seq2seq
    from cert_ray.training.models import local_folder

    folders = {
        option: folder if storage.is_folder(folder) else str(local_folder(folder, option))
        for option, folder in source.models.items()
    }
    model = folders.get("model")
    if model is not None and is_seq2seq(model):
        if sampling.get("mode"):
            raise ConfigError(f"--mode: {source.model} has no sketcher; leave it out")
        load_seq2seq = cache(lambda: Seq2SeqCompleter(model, mask=source.mask))

        def go_on(temperature: float) -> Complete:
            return _documented(load_seq2seq().at(_config(sampling, temperature)), retrieve)

        return go_on
    if source.mask is not None:
        raise ConfigError(f"--mask: {source.model} has no encoder; leave it out")
    config = ModelConfig.from_mapping({**folders, "retrieve": retrieve}, "models")
    load = cache(lambda: Answerer.load(config))
    return lambda temperature: complete_with_answers(load(), _config(sampling, temperature))


def _documented(complete: Callable[[list[str], int], list[list[str]]], retrieve: RetrieveConfig | None) -> Complete:
    return complete if retrieve is None else with_documentation(complete, load_retriever(retrieve))


def complete_with_answers(answerer: Answerer, config: CompleterConfig) -> Complete:
    """A `Complete` by models on this machine, which says of every sample how it came about."""

    def complete(prompts: list[str], n: int) -> list[list[Answer]]:
        return [_answers(answer) for answer in answerer.answer(prompts, config.sampling(n))]

    return complete


def _answers(answer: CascadeAnswer) -> list[Answer]:
    cascade = answer.sketch is not None
    return [
        Answer(
            text=choice.text,
            sketch=answer.sketch,
            route=str(answer.route) if cascade else None,
            vote_share=answer.vote_share if cascade else None,
            logprob=choice.mean_logprob,
        )
        for choice in answer.choices
    ]


def _endpoint(source: Source) -> EndpointConfig:
    assert source.endpoint is not None
    key = None
    if source.api_key_env is not None:
        key = os.environ.get(source.api_key_env, "").strip()
        if not key:
            raise ConfigError(f"--api-key-env {source.api_key_env}: no such variable, or it is empty. Export the key.")
        parts = urlsplit(source.endpoint)
        if parts.scheme == "http" and parts.hostname not in LOOPBACK:
            _log.warning("%s: the key goes over plain http, which others on the way can read", source.endpoint)
    options = {"url": source.endpoint, "model": source.endpoint_model, "api_key": key}
    return EndpointConfig.from_mapping(options, "endpoint")


def _config(sampling: dict[str, Any], temperature: float) -> CompleterConfig:
    return CompleterConfig.from_mapping({**sampling, "temperature": temperature}, "sampling")
