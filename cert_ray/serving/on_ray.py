"""The Ray Serve application: a front door, and one deployment that holds both models.

In: a `ServeConfig`, from `serve run cert_ray.serving.on_ray:build_app model=DIR`, from a Serve config file, or from
`start_server`. Out: a running server. Resources, queues, hops and the errors that cross them stand here, no answers.

Sketcher and generator share a process, since a hop between them costs more than fifteen tokens of decoding.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic
import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from cert_ray import storage
from cert_ray.errors import CertRayError, ConfigError, InputError, RequestError
from cert_ray.serving.answering import Answerer, ModelConfig
from cert_ray.serving.cascade import CascadeAnswer
from cert_ray.serving.openai_schema import RequestLimits
from cert_ray.serving.sampling import Sampling

_log = logging.getLogger(__name__)

_ENGINE = "engine"
_FRONT_DOOR = "front-door"
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class ServeConfig(ModelConfig):
    """A served model: which, under what name, with what resources and queues."""

    model_name: str = "cert"
    replicas: int = pydantic.Field(default=1, ge=1)
    num_cpus: float = pydantic.Field(default=1, ge=0)  # per engine
    num_gpus: float = pydantic.Field(default=0, ge=0)  # per engine
    # Decoded one after another, so more than a few only wait inside the engine instead of in the queue.
    max_ongoing_requests: int = pydantic.Field(default=4, ge=1)
    max_queued_requests: int = pydantic.Field(default=64, ge=1)  # more are refused with 503
    request_timeout_s: float = pydantic.Field(default=300.0, gt=0)
    limits: RequestLimits = RequestLimits()
    api_keys_file: str | None = None  # one key per line; None: no key is asked for


class ServerConfig(ServeConfig):
    """A server on this machine or its cluster: a `ServeConfig`, and where it listens."""

    host: str = "127.0.0.1"  # Serve's own default is every interface
    port: int | None = pydantic.Field(default=None, ge=1, le=65535)  # None: a free one
    app_name: str = "cert-ray"

    @pydantic.model_validator(mode="after")
    def _check_exposure(self) -> ServerConfig:
        if self.host not in _LOOPBACK and self.api_keys_file is None:
            raise ConfigError(
                f"host={self.host!r}: others could reach this server, and api_keys_file is not set. Name a file with "
                "one key per line, or listen on 127.0.0.1."
            )
        return self


class Engines:
    """The deployment that holds the models. Decoding runs in threads, so that queues and health checks are served."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._answerer = Answerer.load(ServeConfig.from_mapping(options, "engine deployment"))

    async def answer(self, prompts: Sequence[str], options: dict[str, Any]) -> list[CascadeAnswer]:
        """One answer per prompt, in order."""
        return await asyncio.to_thread(self._answerer.answer, prompts, Sampling(**options))


class HandleBackend:
    """The front door's `Backend`: one call over a deployment handle, its failures turned into `RequestError`s."""

    def __init__(self, handle: Any, model_name: str, timeout_s: float) -> None:
        self._handle, self._model_name, self._timeout_s = handle, model_name, timeout_s

    @property
    def model_name(self) -> str:
        """The name that requests must give."""
        return self._model_name

    async def complete(self, prompts: Sequence[str], sampling: Sampling) -> list[CascadeAnswer]:
        """One answer per prompt, in order.

        Raises:
            RequestError: 400 for a prompt that does not fit, 503 when the queue is full or no engine is up, 504 when it
                took too long.
        """
        response = self._handle.answer.remote(list(prompts), sampling.model_dump())
        try:
            answers: list[CascadeAnswer] = await asyncio.wait_for(response, self._timeout_s)
        except TimeoutError as error:
            response.cancel()
            problem = f"No answer within {self._timeout_s:g} s. Ask for fewer tokens or samples."
            raise RequestError(504, problem, None, "timeout") from error
        except BackPressureError as error:
            raise RequestError(503, "The server is busy: try again.", None, "overloaded") from error
        except (RayActorError, DeploymentUnavailableError) as error:
            raise RequestError(503, "The engine is restarting: try again.", None, "unavailable") from error
        except RayTaskError as error:
            if isinstance(error.cause, RequestError):
                raise error.cause from None
            raise RequestError(500, "The engine failed; its log says why.", None, "engine_failed") from error
        return answers


def build_app(args: Mapping[str, Any] | ServeConfig) -> serve.Application:
    """The Serve application for `args`: a `ServeConfig`, or the mapping of one, as Serve's builders are called.

    Raises:
        ConfigError: when an option cannot be used.
    """
    config = args if isinstance(args, ServeConfig) else ServeConfig.from_mapping(args, "build_app")
    config = config.model_copy(update=config.folders)
    api_keys = _read_api_keys(config.api_keys_file)
    model_name, timeout_s, limits = config.model_name, config.request_timeout_s, config.limits

    def build_front_door() -> Any:
        from cert_ray.serving.http import create_app  # evaluated on the replica: an application does not pickle

        handle = serve.get_deployment_handle(_ENGINE, app_name=serve.get_replica_context().app_name)
        return create_app(HandleBackend(handle, model_name, timeout_s), limits, api_keys)

    engines = serve.deployment(
        Engines,
        name=_ENGINE,
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
    ).bind(config.model_dump(mode="json", include=set(ServeConfig.model_fields)))
    # The front door only waits: it must hold all that the engines work on and queue, and as many again to refuse.
    waiting = 2 * (config.max_queued_requests + config.replicas * config.max_ongoing_requests)
    front_door = serve.deployment(
        serve.ingress(build_front_door)(),
        name=_FRONT_DOOR,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=waiting,
    )
    application: serve.Application = front_door.bind(engines)
    return application


def _read_api_keys(url: str | None) -> tuple[str, ...]:
    if url is None:
        return ()
    keys = tuple(line.strip() for line in storage.read_text(url).splitlines() if line.strip())
    if not keys:
        raise ConfigError(f"api_keys_file={url!r}: no key in it. Write one key per line, or leave the option out.")
    return keys


class ServedApp:
    """A running server. `stop` takes the application down, and Serve with it if this server started Serve."""

    def __init__(self, base_url: str, app_name: str, owns_serve: bool) -> None:
        self.base_url = base_url
        self._app_name, self._owns_serve = app_name, owns_serve

    def stop(self) -> None:
        """Stop serving. A second call does nothing."""
        if not ray.is_initialized() or _running_address() is None:
            return
        serve.delete(self._app_name)
        if self._owns_serve:
            serve.shutdown()

    def __enter__(self) -> ServedApp:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start_server(config: ServerConfig) -> ServedApp:
    """Serve `config` on the connected Ray, and return when it answers.

    Raises:
        ConfigError: when Ray is not connected, or Serve already listens elsewhere.
        InputError: when a model folder is not there.
        CertRayError: when the application does not come up, saying why.
    """
    if not ray.is_initialized():
        raise ConfigError("start_server: no Ray is connected. Call ray.init() first.")
    for folder in config.folders.values():
        if not storage.is_folder(folder):  # at once, instead of after three replicas that fail to start
            raise InputError(folder, "no such model folder", "Give one that `cert-ray export` wrote.")
    application = build_app(config)
    running = _running_address()
    host, port = running or (config.host, config.port or _free_port(config.host))
    if running is None:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    elif host != config.host or config.port not in (None, port):
        raise ConfigError(
            f"host={config.host!r}, port={config.port}: Serve already listens on {host}:{port}, and has one address "
            "per cluster. Stop it with `serve shutdown`, or use that address."
        )
    served = ServedApp(f"http://{host}:{port}", config.app_name, owns_serve=running is None)
    try:
        serve.run(application, name=config.app_name, route_prefix="/", blocking=False)
    except RuntimeError as error:  # a model that cannot be loaded, a front door that cannot be built
        served.stop()
        raise CertRayError(f"{config.model_name} cannot be served: {error}") from error
    _log.info("serving %s at %s/v1", config.model_name, served.base_url)
    return served


def _running_address() -> tuple[str, int] | None:
    """Where Serve listens on this cluster, or None while it does not run.

    Serve says so nowhere in public, and only logs that it ignores other options when it is started again: so its
    private client is asked, here alone. `test_a_second_address_is_refused` fails when that stops working.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else (str(client.http_config.host), int(client.http_config.port))


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
