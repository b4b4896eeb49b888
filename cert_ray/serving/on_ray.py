"""The Ray Serve application: front doors, and engines that hold the models.

In: a `ServeConfig`, from `serve run cert_ray.serving.on_ray:build_app model=DIR`, from a Serve config file, or from
`start_server`. Out: a running server. This module holds resources, queues, calls between processes and their errors;
no answers.

Sketcher and generator share a process, since a hop between them costs more than fifteen tokens of decoding. An engine
of several models loads those that are asked for and drops the least recently used; `replicas` says what an engine does.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import grpc
import ray
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayError, RayTaskError
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.schema import DeploymentStatus

from cert_ray import storage
from cert_ray.errors import CertRayError, ConfigError, RequestError
from cert_ray.serving.admission import Admission
from cert_ray.serving.answering import Answerer
from cert_ray.serving.answers import CascadeAnswer
from cert_ray.serving.api_keys import read_key_file
from cert_ray.serving.backends import ContradictedError, Retelling, Served, Told
from cert_ray.serving.deployment import ServeConfig, ServerConfig
from cert_ray.serving.openai_responses import write_usage
from cert_ray.serving.replicas import Engines
from cert_ray.serving.sampling import Sampling
from cert_ray.serving.tracebacks import reason_in
from cert_ray.telemetry import logs
from cert_ray.telemetry import on_ray as telemetry

_log = logging.getLogger(__name__)

_SERVE = "ray.serve"  # its logger
# For Serve's own lines, which Ray brings to the terminal; cert-ray's lines report each request.
_WARNINGS_ALONE = {"log_level": "WARNING"}
_ENGINE = "engine"
_FRONT_DOOR = "front-door"
_ATTEMPTS = 4  # for a request whose engines die: it may be the request that kills them
# Requests that a front door holds only to refuse them; as many again wait for it. A burst arrives faster than it is
# refused, at a few milliseconds each, and what finds no room here Serve refuses as plain text. Assumed: some hundreds
# at once, a few KB each.
_REFUSALS = 512
# When an engine's node dies, an answer larger than Ray sends with the call (100 KB) is lost too.
_GONE = (RayActorError, ObjectLostError, NodeDiedError)
# With gRPC between Serve's processes, a dead engine is reported as by Ray; a stopping one cancels its calls.
_GONE_STATUS = grpc.StatusCode.CANCELLED
_FAILED = frozenset({DeploymentStatus.DEPLOY_FAILED, DeploymentStatus.UNHEALTHY})


def _replica(engines: type[Engines], config: ServeConfig) -> type[Engines]:
    """`engines` as Serve runs them. Of several models, each keeps `models_per_engine`, set when the class is made."""

    class Replica(engines):  # type: ignore[valid-type,misc]
        def __init__(self, options: dict[str, Any]) -> None:
            _log_as_serve_does()
            super().__init__(options)

        if len(config.models) > 1:

            @serve.multiplexed(max_num_models_per_replica=config.models_per_engine)  # type: ignore[untyped-decorator]
            async def load(self, name: str) -> Answerer:
                answerer: Answerer = await super().load(name)
                return answerer

    return Replica


class HandleBackend:
    """The front door's `Backend`: calls over a deployment handle, whose failures become `RequestError`s.

    A request whose engine dies goes to another one. With the same seed the second answer equals the first, so a stream
    goes on where it stopped. If they differ after all (16-bit weights), the stream ends in an error.

    At most `at_once` requests are with the engines. The others wait here, first come, first served: with all engines
    full, Serve's router would retry each request at times of its own, so that engines idle while some requests miss
    their deadline.
    """

    def __init__(self, handle: Any, served: Mapping[str, str | None], at_once: int) -> None:
        self._handle, self._served = handle, served
        self._places = asyncio.Semaphore(at_once)

    @property
    def served(self) -> Mapping[str, str | None]:
        """The models by name, each with its library."""
        return self._served

    async def answer(
        self, model: str, prompts: Sequence[str], sampling: Sampling, timeout_s: float
    ) -> list[CascadeAnswer]:
        """One answer per prompt, in order.

        Raises:
            RequestError: what the engine refuses; 503 when the queue is full or no engine is up.
        """
        ends = time.monotonic() + timeout_s
        async with self._places:
            return await self._answer(model, prompts, sampling, ends)

    async def _answer(self, model: str, prompts: Sequence[str], sampling: Sampling, ends: float) -> list[CascadeAnswer]:
        options = sampling.model_dump(mode="json")
        for attempt in range(1, _ATTEMPTS + 1):
            left_s = max(0.0, ends - time.monotonic())
            response = self._handle_of(model).answer.remote(model, list(prompts), options, left_s)
            try:
                answers: list[CascadeAnswer] = await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except RequestError:
                raise
            except Exception as error:  # noqa: BLE001 - by gRPC, whatever the engine raised comes as it is
                _retry_or_raise(error, attempt)
            else:
                return answers
        raise AssertionError("the last attempt returns or raises")

    async def stream(
        self, model: str, prompts: Sequence[str], sampling: Sampling, timeout_s: float
    ) -> AsyncGenerator[Told, None]:
        """The same, reported while it is drawn."""
        ends = time.monotonic() + timeout_s
        async with self._places, aclosing(self._stream(model, prompts, sampling, ends)) as batches:
            async for told in batches:
                yield told

    async def _stream(
        self, model: str, prompts: Sequence[str], sampling: Sampling, ends: float
    ) -> AsyncGenerator[Told, None]:
        options, retelling = sampling.model_dump(mode="json"), Retelling()
        for attempt in range(1, _ATTEMPTS + 1):
            left_s = max(0.0, ends - time.monotonic())
            retelling.begin_again()
            handle = self._handle_of(model).options(stream=True)
            response = handle.stream.remote(model, list(prompts), options, left_s)
            try:
                async for told in response:
                    yield retelling.new(told)
                return
            except ContradictedError as error:
                problem = "The engine died, and another one gives a different answer: try again."
                raise RequestError(503, problem, None, "unavailable") from error
            except RequestError:
                raise
            except Exception as error:  # noqa: BLE001 - as above
                _retry_or_raise(error, attempt)
            finally:
                response.cancel()  # does nothing once the response has ended

    def _handle_of(self, model: str) -> Any:
        return self._handle.options(multiplexed_model_id=model) if len(self._served) > 1 else self._handle


def _retry_or_raise(error: Exception, attempt: int) -> None:
    """Return if the request may be tried again; else raise what the front door says about `error`."""
    if isinstance(error, BackPressureError):
        raise RequestError(503, "The server is busy: try again.", None, "overloaded") from error
    if isinstance(error, RayTaskError) and isinstance(error.cause, RequestError):
        raise error.cause from None
    if not (isinstance(error, (*_GONE, DeploymentUnavailableError)) or _is_cancelled_call(error)):
        _log.error("the engine failed", exc_info=error)
        raise RequestError(500, "The engine failed; its log says why.", None, "engine_failed") from error
    _log.warning("attempt %d: an engine died or cannot be reached: %s", attempt, error)
    if attempt == _ATTEMPTS or isinstance(error, DeploymentUnavailableError):
        raise RequestError(503, "The engine is restarting: try again.", None, "unavailable") from error


def _is_cancelled_call(error: Exception) -> bool:
    return isinstance(error, grpc.RpcError) and error.code() == _GONE_STATUS


def build_app(args: Mapping[str, Any] | ServeConfig) -> serve.Application:
    """The Serve application for `args`: a `ServeConfig`, or a mapping for one, as Serve passes it to builders.

    This may run on a node where the models do not lie or may not be read. Those within reach are checked (those in a
    store without their weights); for the others, a log line says that their engines will check them.

    Raises:
        CertRayError: when an option cannot be used, a model cannot be loaded, or its documentation is missing or not
            the one that is meant.
    """
    config = args if isinstance(args, ServeConfig) else ServeConfig.from_mapping(args, "build_app")
    for name, why in config.check_models_in_reach().items():
        _log.warning("%s cannot be checked here; its engines will check it when they load it: %s", name, why)
    return application(config)


def application(config: ServeConfig, engines: type[Engines] = Engines) -> serve.Application:
    """The Serve application for `config`. Tests pass `engines` without models.

    Raises:
        ConfigError: when the key file cannot be used.
        InputError: when a model's documentation is missing, or not the one that is meant.
    """
    options = _portable(config)
    drain_s = config.request_timeout_s if config.drain_timeout_s is None else config.drain_timeout_s
    stopping = {"graceful_shutdown_timeout_s": drain_s + 1, "graceful_shutdown_wait_loop_s": 0.2}
    engine = serve.deployment(
        _replica(engines, config),
        name=_ENGINE,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        health_check_period_s=config.health_check_period_s,
        max_surge_percent=config.surge_percent,
        **_replicas(config),
        **stopping,
    ).bind(options)
    # A front door only waits. It holds its share of the requests that the engines work on and queue, and some more, to
    # refuse these in OpenAI's words. What comes while it has no time even for that, Serve's proxy refuses.
    waiting = math.ceil(config.max_in_flight / config.front_doors) + _REFUSALS
    front_door = serve.deployment(
        serve.ingress(_front_door(options))(),
        name=_FRONT_DOOR,
        num_replicas=config.front_doors,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=waiting,
        max_queued_requests=_REFUSALS,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
        health_check_period_s=config.health_check_period_s,
        max_surge_percent=100,
        **stopping,
    )
    bound: serve.Application = front_door.bind(engine)
    return bound


def _portable(config: ServeConfig) -> dict[str, Any]:
    """The options for replicas, which run in other folders: local paths are made absolute.

    Every replica, however late it starts, reads the documentation that is there now, and refuses any other.
    """
    models = {name: model.pinned().absolute() for name, model in config.models.items()}
    keys_file = None if config.api_keys_file is None else storage.absolute(config.api_keys_file)
    if keys_file is not None:
        read_key_file(keys_file)  # reports here what is wrong with it
    written = config.model_copy(update={"models": models, "api_keys_file": keys_file}).model_dump(mode="json")
    return {name: value for name, value in written.items() if name in ServeConfig.model_fields}


def _replicas(config: ServeConfig) -> dict[str, Any]:
    scaling = config.autoscaling
    if scaling is None:
        return {"num_replicas": config.replicas}
    return {"autoscaling_config": AutoscalingConfig(**scaling.model_dump())}


def _front_door(options: dict[str, Any]) -> Callable[[], Any]:
    """Builds the HTTP application on a front door's replica: an application cannot be pickled."""

    def build() -> Any:
        from cert_ray.serving.http import create_app

        _log_as_serve_does()
        config = ServeConfig.from_mapping(options, "front door")
        address = _running_address()
        config.check_exposure(None if address is None else address[0])
        handle = serve.get_deployment_handle(_ENGINE, app_name=serve.get_replica_context().app_name)
        # Its share: Serve spreads requests evenly over the front doors.
        at_once = math.ceil(config.at_once / config.front_doors)
        return create_app(
            HandleBackend(handle, config.served, at_once),
            config,
            any_library=config.model_name,
            keys=None if config.api_keys_file is None else read_key_file(config.api_keys_file),
            admission=Admission(
                math.ceil(config.max_in_flight / config.front_doors),
                at_once,
                config.request_timeout_s,
                observe=telemetry.count_in_flight,
            ),
            front_doors=config.front_doors,
            observe=_count,
        )

    return build


def _log_as_serve_does() -> None:
    """Write this replica's log lines where Serve writes its own."""
    logger = logging.getLogger("cert_ray")
    logger.setLevel(logging.INFO)
    for handler in logging.getLogger(_SERVE).handlers:
        logger.addHandler(handler)


def _count(served: Served) -> None:
    telemetry.count_request(served.model, served.status, served.seconds, served.first_s)
    for answer in served.answers:
        tokens = {
            "prompt": answer.prompt_tokens,
            "cached": answer.cached_tokens,
            "sketch": answer.sketch_tokens,
            "completion": write_usage([answer]).completion_tokens,
        }
        share = None if answer.sketch is None else answer.vote_share
        telemetry.count_answer(served.model, answer.route.value, share, answer.timings_s, tokens, answer.from_cache)


class ServedApp:
    """A running server. `stop` takes down the application, and Serve too if this server started it."""

    def __init__(self, base_url: str, app_name: str, owns_serve: bool) -> None:
        self.base_url = base_url
        self._app_name, self._owns_serve = app_name, owns_serve

    def stop(self) -> None:
        """Stop serving. A second call does nothing."""
        if not ray.is_initialized() or _running_address() is None:
            return
        with logs.warnings_alone(_SERVE):
            serve.delete(self._app_name)
            if self._owns_serve:
                serve.shutdown()

    def __enter__(self) -> ServedApp:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start_server(config: ServerConfig, engines: type[Engines] = Engines, *, checked: bool = False) -> ServedApp:
    """Serve `config` on the connected Ray, and return once it answers.

    The models are checked first, unless they were `checked` just before.

    Raises:
        ConfigError: when Ray is not connected, or Serve already listens elsewhere.
        CertRayError: when a model cannot be loaded, its documentation is not there, nothing can listen at the address,
            or the application does not come up, with the reason.
    """
    if not ray.is_initialized():
        raise ConfigError("start_server: no Ray is connected. Call ray.init() first.")
    if not checked:
        engines.check(config)  # fails at once, instead of after three replicas that cannot start
    app = application(config, engines)
    running = _running_address()
    host, port = running or (config.host, config.port or _free_port(config.host))
    if running is None:
        with logs.warnings_alone(_SERVE):
            _start_serve(host, port)
    elif host != config.host or config.port not in (None, port):
        raise ConfigError(
            f"host={config.host!r}, port={config.port}: Serve already listens on {host}:{port}, and has one address "
            "per cluster. Stop it with `serve shutdown`, or use that address."
        )
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    served = ServedApp(f"http://{address}", config.app_name, owns_serve=running is None)
    try:
        with logs.warnings_alone(_SERVE):
            serve.run(app, name=config.app_name, route_prefix="/", blocking=False, logging_config=_WARNINGS_ALONE)
    except RuntimeError as error:  # a model that cannot be loaded, a front door that cannot be built
        try:
            why = _why_failed(config.app_name) or str(error)  # `error` itself says only that it failed
        finally:
            served.stop()
        raise CertRayError(f"{config.model_name} cannot be served: {why}") from error
    _log.info("serving %s at %s/v1", config.model_name, served.base_url)
    return served


def _start_serve(host: str, port: int) -> None:
    """Start Serve and its proxy at an address. On failure, whatever did start is stopped."""
    options = {"host": host, "port": port}
    try:
        serve.start(proxy_location="HeadOnly", http_options=options, logging_config=_WARNINGS_ALONE)
    except (RayError, TimeoutError) as error:
        serve.shutdown()
        raise CertRayError(
            f"host={host!r}, port={port}: Serve's proxy does not listen there: {reason_in(str(error))} Give another "
            "port if that one is taken; if the machine was too busy to start it in time, try again."
        ) from error


def _why_failed(app_name: str) -> str:
    """Why replicas did not start, from Serve's status; empty if it does not say."""
    application = serve.status().applications.get(app_name)
    if application is None:
        return ""
    failed = [one.message for one in application.deployments.values() if one.status in _FAILED]
    return "; ".join(reason_in(message) for message in failed if message)


def _running_address() -> tuple[str, int] | None:
    """Where Serve listens on this cluster, or None while it does not run.

    No public function of Serve tells this, and when started again it only logs that it ignores other options. So its
    private client is asked, only here. `test_a_second_address_is_refused` fails when that stops working.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else (str(client.http_config.host), int(client.http_config.port))


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
