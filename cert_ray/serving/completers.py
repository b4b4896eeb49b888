"""`complete(prompts, n) -> completions` for evaluation and `cert-ray generate`: by local models, or by an endpoint.

In: model folders, or the URL of an OpenAI-compatible server. Out: for each prompt a list of `n` texts that continue it,
cut at the paper's stop strings. Nothing is scored and nothing is run in here.

An endpoint's key is a `SecretStr`: it is sent, but never shown or written. A busy or unreachable server is asked again
(tenacity), after the time it names or after 1, 2, 4, ... seconds. h11's errors about a request that it will not send
quote the headers, so they are not passed on.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import Any, Final

import httpx
import pydantic
import tenacity

from cert_ray.config import Config
from cert_ray.errors import ConfigError, InputError, RequestError
from cert_ray.retrieval.retriever import Retriever
from cert_ray.serving.answering import Answerer, ModelConfig
from cert_ray.serving.boundaries import PAPER_STOPS, cut_at
from cert_ray.serving.sampling import Mode, Sampling

Complete = Callable[[list[str], int], list[list[str]]]

_log = logging.getLogger(__name__)

_OPENAI_MAX_STOPS = 4  # OpenAI API reference, "Completions"
_BUSY: Final = frozenset({408, 429, 502, 503, 504})
_KEY_WANTED: Final = frozenset({401, 403})
_TOO_LONG: Final = "context_length_exceeded"  # OpenAI's, and cert-ray's own
_WINDOW: Final = re.compile(r"maximum context length|available context size")  # as vLLM and llama.cpp word it


class CompleterConfig(Config):
    """How completions are sampled: the paper's 100 new tokens and top_p 0.9, and its temperature for pass@1."""

    max_tokens: int = pydantic.Field(default=100, ge=1)
    temperature: float = pydantic.Field(default=0.2, ge=0, le=2)
    top_p: float = pydantic.Field(default=0.9, gt=0, le=1)
    seed: int = 0
    stop: tuple[str, ...] = PAPER_STOPS
    mode: Mode | None = None  # None: that of the models, or of the server

    def sampling(self, n: int) -> Sampling:
        """These options for `n` samples."""
        return Sampling(n=n, **self.model_dump())


def check_endpoint(url: str, option: str) -> None:
    """Raise `ConfigError` unless `url` begins with http(s)://. Without, every request would be retried in vain."""
    if url.startswith(("http://", "https://")):
        return
    address = url.rpartition("://")[2]
    raise ConfigError(f"{option}: {url!r} does not begin with http:// or https://. Write http://{address}")


class EndpointConfig(Config, hide_input_in_errors=True):
    """An OpenAI-compatible server. `url` is its base, with or without `/v1`."""

    url: str
    model: str | None = None  # None: the first that the server lists
    api_key: pydantic.SecretStr | None = None
    timeout_s: float = pydantic.Field(default=300.0, gt=0)
    attempts: int = pydantic.Field(default=6, ge=1)
    longest_wait_s: float = pydantic.Field(default=30.0, gt=0)  # between attempts, whatever the server asks for
    max_n: int = pydantic.Field(default=100, ge=1)  # samples per request; more take further requests

    @pydantic.field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        check_endpoint(url, "the endpoint")
        return url

    @pydantic.field_validator("api_key")
    @classmethod
    def _check_key(cls, key: pydantic.SecretStr | None) -> pydantic.SecretStr | None:
        """A key from a file often ends in a line break."""
        if key is None:
            return None
        bare = key.get_secret_value().strip()
        if not bare or not bare.isascii() or not bare.isprintable() or " " in bare:
            raise ConfigError("the endpoint's key: empty, or with blanks or other characters not allowed in a header.")
        return pydantic.SecretStr(bare)


class LocalCompleter:
    """Completions by models on this machine: one model, or the cascade."""

    def __init__(self, answerer: Answerer, config: CompleterConfig | None = None) -> None:
        self._answerer = answerer
        self._config = config or CompleterConfig()

    def __call__(self, prompts: list[str], n: int) -> list[list[str]]:
        """`n` completions for each prompt, in order."""
        answers = self._answerer.answer(prompts, self._config.sampling(n))
        return [[choice.text for choice in answer.choices] for answer in answers]


class EndpointCompleter:
    """Completions by an OpenAI-compatible server. Close it, or use it in a `with` block."""

    def __init__(
        self,
        endpoint: EndpointConfig,
        config: CompleterConfig | None = None,
        *,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`transport` and `sleep` are for tests."""
        self._endpoint = endpoint
        self._config = config or CompleterConfig()
        self._sleep = sleep
        key = endpoint.api_key
        self._client = httpx.Client(
            base_url=endpoint.url.rstrip("/").removesuffix("/v1") + "/v1/",
            headers={"Authorization": f"Bearer {key.get_secret_value()}"} if key else None,
            timeout=endpoint.timeout_s,
            transport=transport,
        )
        self._model = endpoint.model

    def __enter__(self) -> EndpointCompleter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __call__(self, prompts: list[str], n: int) -> list[list[str]]:
        """`n` completions for each prompt, in order.

        Raises:
            RequestError: when the server refuses a request.
            InputError: when it cannot be reached, or answers with something other than completions.
        """
        return [self._complete_one(prompt, n) for prompt in prompts]

    def _complete_one(self, prompt: str, n: int) -> list[str]:
        if self._model is None:
            self._model = self._first_model()
        mode = {} if self._config.mode is None else {"mode": self._config.mode}  # not in OpenAI's API: only if set
        texts: list[str] = []
        while len(texts) < n:
            part = min(n - len(texts), self._endpoint.max_n)
            # Each further request needs another seed, or it would repeat the first samples.
            body = {
                "model": self._model,
                "prompt": prompt,
                "n": part,
                "max_tokens": self._config.max_tokens,
                "temperature": self._config.temperature,
                "top_p": self._config.top_p,
                "seed": self._config.seed + len(texts),
                "stop": list(self._config.stop[:_OPENAI_MAX_STOPS]),  # `cut_at` below handles the rest
                **mode,
            }
            texts += self._read_texts(self._request("POST", "completions", body), part)
        return [cut_at(text, self._config.stop) for text in texts]

    def _first_model(self) -> str:
        listed = self._request("GET", "models", None)
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise self._not_openai("lists no model", "Name one with --endpoint-model.") from error

    def _read_texts(self, answer: Any, n: int) -> list[str]:
        try:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            texts = [str(choice["text"]) for choice in choices]
        except (KeyError, TypeError, ValueError) as error:
            raise self._not_openai("answers without choices") from error
        if len(texts) != n:
            raise self._not_openai(f"gave {len(texts)} of the {n} samples asked for", "Set max_n to what it allows.")
        return texts

    def _not_openai(self, problem: str, cure: str = "Is it an OpenAI-compatible server?") -> InputError:
        return InputError(self._endpoint.url, problem, cure)

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """The parsed answer. Asks again while the server is busy or cannot be reached."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            stop=tenacity.stop_after_attempt(self._endpoint.attempts),
            wait=self._wait_s,
            sleep=self._sleep,
            before_sleep=self._log_wait,
            reraise=True,
        )
        try:
            return self._read_response(retrying(self._ask, method, path, body))
        except httpx.LocalProtocolError:
            problem = "the request cannot be sent: a header or the address is not valid in HTTP"
            raise InputError(self._endpoint.url, problem, "Check the URL and the key.") from None  # it quotes the key
        except httpx.TransportError as error:
            cure = "Check the URL, and that the server runs."
            raise InputError(self._endpoint.url, f"cannot be reached: {error!r}", cure) from error
        except _BusyError as busy:
            return self._read_response(busy.response)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        response = self._client.request(method, path, json=body)
        if response.status_code in _BUSY:
            raise _BusyError(response)
        return response

    def _wait_s(self, state: tenacity.RetryCallState) -> float:
        """The time the server asks for, else 1, 2, 4, ... seconds; at most `longest_wait_s`."""
        longest_s = self._endpoint.longest_wait_s
        error = state.outcome.exception() if state.outcome is not None else None
        try:
            return min(max(float(error.response.headers["Retry-After"]), 0.0), longest_s)  # type: ignore[union-attr]
        except (AttributeError, KeyError, ValueError):  # not busy, or not in seconds: an HTTP date is rare
            return tenacity.wait_exponential(max=longest_s)(state)

    def _log_wait(self, state: tenacity.RetryCallState) -> None:
        why = state.outcome.exception() if state.outcome is not None else None
        wait_s = state.next_action.sleep if state.next_action is not None else 0.0
        place = (self._endpoint.url, why, state.attempt_number, wait_s)
        _log.warning("endpoint %s: %s, attempt %d, trying again in %.1f s", *place)

    def _read_response(self, response: httpx.Response) -> Any:
        try:
            answer = response.json()
        except ValueError as error:
            problem = f"status {response.status_code}, and the body is not JSON"
            raise self._not_openai(problem) from error
        if response.is_success:
            return answer
        error_fields = answer.get("error") if isinstance(answer, dict) else None
        message = error_fields.get("message") if isinstance(error_fields, dict) else response.text
        cure = ""
        if response.status_code in _KEY_WANTED:
            cure = " Name the environment variable that holds the server's key: --api-key-env NAME."
        code = _TOO_LONG if response.status_code == 400 and _says_too_long(error_fields, str(message)) else None
        raise RequestError(response.status_code, f"{self._endpoint.url}: {message}{cure}", None, code)


def _says_too_long(error_fields: Any, message: str) -> bool:
    """Whether prompt and answer are too long for the model: by OpenAI's code, or by other servers' wording."""
    code = error_fields.get("code") if isinstance(error_fields, dict) else None
    return code == _TOO_LONG or _WINDOW.search(message) is not None


class _BusyError(Exception):
    """A status that may pass with time."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(f"status {response.status_code}")
        self.response = response


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, httpx.LocalProtocolError):  # the request itself is wrong
        return False
    return isinstance(error, httpx.TransportError | _BusyError)


def complete_with_models(models: ModelConfig, config: CompleterConfig | None = None) -> Complete:
    """A `complete` that runs `models`: one model, or sketcher and generator."""
    return LocalCompleter(Answerer.load(models), config)


def complete_with_endpoint(endpoint: EndpointConfig, config: CompleterConfig | None = None) -> Complete:
    """A `complete` that asks a server."""
    return EndpointCompleter(endpoint, config)


def with_documentation(complete: Complete, retriever: Retriever) -> Complete:
    """`complete` with documentation ahead of each prompt, for what does not retrieve it by itself, such as an endpoint.

    When the window has no room for both, the prompt is asked alone, as with local models.
    """

    def complete_one(prompt: str, n: int) -> list[str]:
        header = retriever.header(prompt)
        if header:
            try:
                return complete([header + prompt], n)[0]
            except RequestError as error:
                if error.code != _TOO_LONG:
                    raise
                _log.info("one prompt is too long with documentation and is sent without it: %s", error)
        return complete([prompt], n)[0]

    return lambda prompts, n: [complete_one(prompt, n) for prompt in prompts]
