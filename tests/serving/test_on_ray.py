"""The served application, asked with the real `openai` client: answers as in process, and errors it knows."""

from __future__ import annotations

import asyncio
import io
import logging
import pickle
import socket
import warnings
from collections.abc import AsyncIterator, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import openai
import pydantic
import pytest
import ray
import yaml
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayTaskError

from cert_ray.errors import CertRayError, ConfigError, InputError, RequestError
from cert_ray.retrieval.library_docs import write_docs
from cert_ray.retrieval.retriever import RetrieveConfig
from cert_ray.serving.answering import Answerer
from cert_ray.serving.answers import CascadeAnswer, Route
from cert_ray.serving.backends import Told
from cert_ray.serving.events import TextDrawn
from cert_ray.serving.sampling import Sampling
from tests.retrieval.builders import DOCS
from tests.serving.builders import save_model

with warnings.catch_warnings():
    # Importing ray.serve 2.60 under pydantic 2: its own options are declared with Field(update_type=...).
    warnings.simplefilter("ignore", pydantic.warnings.PydanticDeprecatedSince20)
    from ray.serve.exceptions import BackPressureError

    from cert_ray.serving import on_ray
    from cert_ray.serving.deployment import ServerConfig
    from cert_ray.serving.on_ray import HandleBackend, ServedApp, build_app, start_server

pytestmark = [
    pytest.mark.ray,
    # Ray's own sockets and its import of pkg_resources-era modules warn while Serve starts and stops.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

KEY = "a-key-of-the-tests"
PROMPT = "import pandas as pd\ndf = pd.DataFrame([1])\nx ="


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ServerConfig:
    folder = tmp_path_factory.mktemp("models")
    (folder / "sketcher").mkdir()
    (folder / "generator").mkdir()
    (folder / "keys").write_text(f"{KEY}\nanother\n")
    return ServerConfig(
        sketcher=save_model(folder / "sketcher", seed=1, window=128),
        generator=save_model(folder / "generator", seed=2, window=128),
        model_name="cert-test",
        api_keys_file=str(folder / "keys"),
        max_ongoing_requests=1,
        max_queued_requests=1,
        request_timeout_s=60,
    )


@pytest.fixture(scope="module")
def served(ray_cluster: None, config: ServerConfig) -> Iterator[ServedApp]:
    with start_server(config) as app:
        yield app


@pytest.fixture
def client(served: ServedApp) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.base_url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_the_served_answer_is_the_answer_in_process(client: openai.OpenAI, config: ServerConfig) -> None:
    response = client.completions.create(
        model="cert-test", prompt=PROMPT, n=4, max_tokens=12, temperature=0.8, top_p=0.9, seed=11, stop=["\n\n"]
    )
    sampling = Sampling(n=4, max_tokens=12, temperature=0.8, top_p=0.9, seed=11, stop=("\n\n",))
    expected = Answerer.load(config.models["cert-test"]).answer([PROMPT], sampling)[0]
    assert [choice.text for choice in response.choices] == [choice.text for choice in expected.choices]
    assert response.usage is not None
    assert response.usage.prompt_tokens == expected.prompt_tokens
    cert = response.model_extra["cert"] if response.model_extra else {}
    assert (cert["route"], cert["sketch"]) == (expected.route.value, expected.sketch)
    assert cert["sketch_votes"] == expected.sketch_votes
    assert set(cert["timings_s"]) == set(expected.timings_s)


def test_the_server_listens_on_loopback_alone(served: ServedApp) -> None:
    assert served.base_url.startswith("http://127.0.0.1:")


def test_the_client_lists_the_model_and_finds_it(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["cert-test"]
    assert client.models.retrieve("cert-test").id == "cert-test"


def test_the_clients_own_exceptions_are_raised(client: openai.OpenAI, served: ServedApp) -> None:
    with pytest.raises(openai.NotFoundError, match="cert-test"):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.BadRequestError, match="window is 128 tokens") as refused:
        client.completions.create(model="cert-test", prompt="a b c d " * 200)
    assert refused.value.code == "context_length_exceeded"
    with (
        openai.OpenAI(base_url=f"{served.base_url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
    assert httpx.get(f"{served.base_url}/health").json() == {"status": "ok"}


def test_a_stream_through_the_cluster_is_the_answer_in_process(client: openai.OpenAI) -> None:
    options = {"model": "cert-test", "prompt": PROMPT, "n": 2, "max_tokens": 12, "seed": 5, "temperature": 0.8}
    whole = client.completions.create(**options)
    texts = {0: "", 1: ""}
    for chunk in client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert list(texts.values()) == [choice.text for choice in whole.choices]


def test_no_prompt_is_logged_on_the_way(client: openai.OpenAI) -> None:
    client.completions.create(model="cert-test", prompt="PRIVATE =", max_tokens=2)
    list(client.completions.create(model="cert-test", prompt="PRIVATE =", max_tokens=2, stream=True))
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="cert-test", prompt="PRIVATE = " * 200)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    texts = [path.read_text(errors="replace") for path in logs.rglob("*") if path.is_file()]
    assert any("completion 200" in text and "key key-1" in text for text in texts)
    assert not any("PRIVATE" in text for text in texts)


def test_starting_and_stopping_serve_says_nothing_itself(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ray import serve

    shown = io.StringIO()
    console = logging.StreamHandler(shown)
    theirs = logging.getLogger("ray.serve")

    asked = []

    def speak(*_: object, **options: object) -> None:
        asked.append(options.get("logging_config"))
        theirs.info("started")
        theirs.warning("a port is slow")

    for call in ("start", "run", "delete", "shutdown"):
        monkeypatch.setattr(serve, call, speak)
    addresses = iter([None, ("127.0.0.1", 1)])
    monkeypatch.setattr(on_ray, "_running_address", lambda: next(addresses))
    monkeypatch.setattr(theirs, "handlers", [console])
    start_server(ServerConfig(model=save_model(tmp_path / "model"), port=1)).stop()
    assert shown.getvalue().splitlines() == ["a port is slow"] * 4
    assert asked == [{"log_level": "WARNING"}] * 2 + [None] * 2  # so Serve's processes send none through Ray either


def test_more_requests_than_the_queue_holds_are_refused_and_the_others_answered(served: ServedApp) -> None:
    body = {"model": "cert-test", "prompt": PROMPT, "n": 200, "max_tokens": 60}

    def ask(_: int) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.post(f"{served.base_url}/v1/completions", json=body, headers=headers, timeout=60)

    with ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(ask, range(12)))
    assert {response.status_code for response in responses} == {200, 503}
    for response in responses:
        if response.status_code == 503:
            assert response.json()["error"]["code"] == "overloaded"
            assert response.headers["Retry-After"]


def test_a_burst_is_refused_in_openais_words(served: ServedApp) -> None:
    body = {"model": "cert-test", "prompt": PROMPT, "n": 8, "max_tokens": 60}

    async def burst() -> list[httpx.Response]:
        options = {"headers": {"Authorization": f"Bearer {KEY}"}, "timeout": 120}
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), **options) as client:  # type: ignore[arg-type]
            url = f"{served.base_url}/v1/completions"
            return await asyncio.gather(*[client.post(url, json=body) for _ in range(400)])

    responses = asyncio.run(burst())
    assert {response.status_code for response in responses} == {200, 503}
    refused = [response for response in responses if response.status_code == 503]
    assert {response.headers["Content-Type"] for response in refused} == {"application/json"}
    assert {response.json()["error"]["code"] for response in refused} == {"overloaded"}


def test_a_missing_model_folder_is_named_at_once(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent: it cannot be the model: no such model folder"):
        start_server(ServerConfig(model=str(tmp_path / "absent")))


def test_the_builder_refuses_a_model_of_this_disk_that_cannot_be_served(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"it cannot be the sketcher: no tokenizer\.json in it"):
        build_app({"sketcher": folder, "generator": folder})


def test_the_builder_says_in_a_line_which_models_their_engines_will_look_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fine, gone = save_model(tmp_path / "fine"), str(tmp_path / "of-other-nodes")
    assert build_app({"models": {"fine": {"model": fine}, "far": {"model": gone}}})
    (line,) = [record.getMessage() for record in caplog.records if record.name == on_ray.__name__]
    assert line.startswith("far cannot be checked here; its engines will check it when they load it:")
    assert gone in line


def test_models_that_were_checked_are_not_checked_again(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(on_ray, "application", lambda *_: pytest.fail("deployed"))
    config = ServerConfig(model=str(tmp_path / "absent"))
    with pytest.raises(InputError, match="no such model folder"):
        start_server(config)
    with pytest.raises(pytest.fail.Exception, match="deployed"):
        start_server(config, checked=True)


def test_an_application_that_fails_is_stopped_though_serve_cannot_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = []

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no status")

    monkeypatch.setattr(on_ray.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(on_ray, "_running_address", lambda: ("127.0.0.1", 8000))
    monkeypatch.setattr(on_ray, "application", lambda *_: None)
    for name in ("run", "status"):
        monkeypatch.setattr(on_ray.serve, name, fails)
    monkeypatch.setattr(ServedApp, "stop", lambda self: stopped.append(self))
    monkeypatch.setattr(on_ray.Engines, "check", lambda _: None)
    with pytest.raises(RuntimeError, match="no status"):
        start_server(ServerConfig(model="any"))
    assert stopped


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RayTaskError("ready", "trace\nRuntimeError: Failed to bind to address '127.0.0.1:1'.", OSError()),
            "Failed to bind",
        ),
        (RayActorError(), "The actor experienced an error"),
        (TimeoutError("HTTP proxies not available after 60s."), "not available after 60s"),
    ],
)
def test_an_address_that_nothing_can_listen_at_is_named_and_serve_is_stopped(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = []

    def fails(**_: object) -> None:
        raise error

    monkeypatch.setattr(on_ray.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(on_ray, "_running_address", lambda: None)
    monkeypatch.setattr(on_ray, "application", lambda *_: None)
    monkeypatch.setattr(on_ray.serve, "start", fails)
    monkeypatch.setattr(on_ray.serve, "shutdown", lambda: stopped.append(True))
    with pytest.raises(CertRayError, match=rf"port=1: Serve's proxy does not listen there: .*{reason}.*another port"):
        start_server(ServerConfig(model="any", port=1), checked=True)
    assert stopped


def test_a_server_may_listen_on_the_loopback_of_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(on_ray, "_running_address", lambda: ("::1", 8000))
    monkeypatch.setattr(on_ray, "application", lambda *_: None)
    monkeypatch.setattr(on_ray.serve, "run", lambda *_, **__: None)
    assert start_server(ServerConfig(model="any", host="::1"), checked=True).base_url == "http://[::1]:8000"
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    assert on_ray._free_port("::1") > 0


def test_replicas_get_the_documentation_that_was_there_when_the_application_was_built(tmp_path: Path) -> None:
    """By `start_server`, `serve run` and a Serve config file alike: what is bound to the deployments is pinned."""
    docs = str(tmp_path / "docs.jsonl")
    write_docs(docs, DOCS)
    config = on_ray.ServeConfig.from_mapping({"model": str(tmp_path), "retrieve": {"docs": docs}}, "test")
    bound = on_ray._portable(config)
    (model,) = on_ray.ServeConfig.from_mapping(bound, "replica").models.values()
    assert model.retrieve == RetrieveConfig(docs=docs).pinned()
    write_docs(docs, DOCS[1:])
    with pytest.raises(InputError, match="is expected"):
        Answerer.load(model)
    with pytest.raises(InputError, match="is expected"):
        build_app({"model": str(tmp_path / "m"), "retrieve": {"docs": docs, "checksum": model.retrieve.checksum}})


def test_a_second_address_is_refused(served: ServedApp, config: ServerConfig) -> None:
    with pytest.raises(ConfigError, match="already listens"):
        start_server(config.model_copy(update={"port": 1}))


def test_the_builder_takes_what_serve_run_passes(config: ServerConfig) -> None:
    """`serve run ...:build_app model=DIR replicas=2` passes strings."""
    assert build_app({"model": str(folder_of(config)), "replicas": "2", "num_cpus": "0.5"})
    with pytest.raises(ConfigError, match="unknown option"):
        build_app({"model": str(folder_of(config)), "modle": "x"})


@pytest.mark.parametrize(
    ("address", "without_keys", "problem"),
    [
        (None, False, "is not known"),
        (None, True, None),
        (("0.0.0.0", 8000), False, "could reach"),
        (("0.0.0.0", 8000), True, None),
        (("127.0.0.1", 8000), False, None),
    ],
)
def test_a_front_door_that_others_may_reach_does_not_start_without_keys(
    monkeypatch: pytest.MonkeyPatch, address: tuple[str, int] | None, without_keys: bool, problem: str | None
) -> None:
    """Also below `serve deploy` and `serve run`, where nobody else looks."""
    monkeypatch.setattr(on_ray, "_running_address", lambda: address)
    monkeypatch.setattr(on_ray, "_log_as_serve_does", lambda: None)
    monkeypatch.setattr(on_ray.serve, "get_replica_context", lambda: SimpleNamespace(app_name="app"))
    monkeypatch.setattr(on_ray.serve, "get_deployment_handle", lambda *_, **__: Handle())
    build = on_ray._front_door({"models": {"cert": {"model": "m"}}, "without_keys": without_keys})
    with nullcontext() if problem is None else pytest.raises(ConfigError, match=problem):
        assert build()


class Handle:
    """A deployment handle whose calls end in the given outcomes, one after another; None never ends."""

    def __init__(self, *outcomes: Exception | list[CascadeAnswer] | None) -> None:
        self.answer, self.stream = self, self
        self._outcomes = list(outcomes)
        self.calls = 0
        self.cancelled = False

    def options(self, **_: object) -> Handle:
        return self

    def remote(self, *_: object) -> Handle:
        self.calls += 1
        return self

    def cancel(self) -> None:
        self.cancelled = True

    def __await__(self) -> Generator[Any, None, list[CascadeAnswer]]:
        outcome = self._outcomes.pop(0)
        if outcome is None:
            yield from asyncio.sleep(60).__await__()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome or []

    async def __aiter__(self) -> AsyncIterator[Told]:
        """Events before the outcome, if it is an error with some: `error.told`."""
        for told in getattr(self._outcomes[0], "told", ()):
            yield told
        yield Told((), tuple(await self))


def ended(status: grpc.StatusCode) -> grpc.aio.AioRpcError:
    """What a call by gRPC ends in, where Serve does not say it as Ray would."""
    return grpc.aio.AioRpcError(status, grpc.aio.Metadata(), grpc.aio.Metadata(), "a secret of the engine")


@pytest.mark.parametrize(
    ("outcome", "status", "code"),
    [
        (BackPressureError(3, 2), 503, "overloaded"),
        (ended(grpc.StatusCode.RESOURCE_EXHAUSTED), 500, "engine_failed"),
        (ValueError("a secret of the engine"), 500, "engine_failed"),  # by gRPC
        (RequestError(400, "too long", "prompt", "c"), 400, "c"),
        (RayTaskError("answer", "trace", ValueError("a secret of the engine")), 500, "engine_failed"),
        (RayTaskError("answer", "trace", RequestError(400, "too long", "prompt", "c")), 400, "c"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_behind_the_front_door_become_refusals(
    outcome: Exception, status: int, code: str, stream: bool
) -> None:
    handle = Handle(outcome)
    with pytest.raises(RequestError) as refused:
        asyncio.run(ask(handle, stream))
    assert (refused.value.status, refused.value.code) == (status, code)
    assert handle.calls == 1
    assert "secret" not in refused.value.message


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "gone",
    [RayActorError(), NodeDiedError("gone"), ObjectLostError("1", None, ""), ended(grpc.StatusCode.CANCELLED)],
)
def test_a_request_whose_engine_or_answer_is_lost_is_given_to_another(gone: Exception, stream: bool) -> None:
    answers = [CascadeAnswer((), Route.MODEL)]
    handle = Handle(gone, gone, answers)
    assert asyncio.run(ask(handle, stream)) == answers
    assert handle.calls == 3


@pytest.mark.parametrize(("second", "error"), [("ab", None), ("abc", None), ("axy", "unavailable")])
def test_a_stream_whose_engine_dies_goes_on_where_it_stopped(second: str, error: str | None) -> None:
    died, died_again = RayActorError(), RayActorError()
    died.told = [Told(((0, TextDrawn(0, "a")), (0, TextDrawn(0, "b"))))]
    died_again.told = [Told(((0, TextDrawn(0, text)),)) for text in second]
    handle = Handle(died, died_again, [CascadeAnswer((), Route.MODEL)])

    async def texts() -> str:
        stream = HandleBackend(handle, {"cert": None}, 8).stream("cert", ["x"], Sampling(), 60)
        return "".join([event.text async for told in stream for _, event in told.events])

    if error is None:
        assert asyncio.run(texts()) == max(second, "ab", key=len)
    else:
        with pytest.raises(RequestError) as refused:
            asyncio.run(texts())
        assert refused.value.code == error


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_kills_every_engine_is_given_up(stream: bool) -> None:
    handle = Handle(*[RayActorError()] * 50)
    with pytest.raises(RequestError) as refused:
        asyncio.run(ask(handle, stream))
    assert (refused.value.status, refused.value.code) == (503, "unavailable")
    assert 1 < handle.calls < 10


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_stops_waiting_cancels_the_engines_work(stream: bool) -> None:
    handle = Handle(None)

    async def go_away() -> None:
        task = asyncio.ensure_future(ask(handle, stream))
        while not handle.calls:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go_away())
    assert handle.cancelled


class Doors:
    """A deployment handle whose calls wait to be let through, each by its prompt."""

    def __init__(self) -> None:
        self.answer, self.stream = self, self
        self.inside: dict[str, asyncio.Event] = {}

    def options(self, **_: object) -> Doors:
        return self

    def remote(self, _model: str, prompts: list[str], *_: object) -> Handle:
        let = self.inside[prompts[0]] = asyncio.Event()

        class Waiting(Handle):
            def __await__(self) -> Generator[Any, None, list[CascadeAnswer]]:
                yield from let.wait().__await__()
                return [CascadeAnswer((), Route.MODEL)]

        return Waiting([])


@pytest.mark.parametrize("stream", [False, True])
def test_engines_are_given_as_many_as_they_work_on_and_the_others_in_order(stream: bool) -> None:
    doors = Doors()

    async def watch() -> list[list[str]]:
        backend = HandleBackend(doors, {"cert": None}, 2)

        async def one(prompt: str) -> None:
            if stream:
                async for _ in backend.stream("cert", [prompt], Sampling(), 60):
                    pass
            else:
                await backend.answer("cert", [prompt], Sampling(), 60)

        tasks = {prompt: asyncio.ensure_future(one(prompt)) for prompt in "abcdef"}
        seen = []
        for ends in ("b", "a", None):
            await _settle()
            seen.append(list(doors.inside))
            if ends is not None:
                doors.inside[ends].set()
        tasks["e"].cancel()  # while it waits
        tasks["c"].cancel()  # while it is answered
        await _settle()
        seen.append(list(doors.inside))
        for let in doors.inside.values():
            let.set()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        return seen

    assert asyncio.run(watch()) == [[*"ab"], [*"abc"], [*"abcd"], [*"abcdf"]]


async def _settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def ask(handle: Handle, stream: bool) -> list[CascadeAnswer]:
    backend = HandleBackend(handle, {"cert": None}, 8)
    if not stream:
        return await backend.answer("cert", ["x"], Sampling(), 60)
    async with aclosing(backend.stream("cert", ["x"], Sampling(), 60)) as told:
        return [answer async for batch in told for answer in batch.answers or ()]


def folder_of(config: ServerConfig) -> str:
    return config.models["cert-test"].folders["generator"]


@pytest.mark.parametrize("name", ["serve-laptop.yaml", "serve-cpu-cluster.yaml", "serve-gpu-cluster.yaml"])
def test_shipped_config_files_name_host_and_fit_the_builder(name: str) -> None:
    path = Path(__file__).parents[2] / "cluster" / name
    schema = yaml.safe_load(path.read_text())
    host = schema["http_options"]["host"]
    for application in schema["applications"]:
        assert application["import_path"] == "cert_ray.serving.on_ray:build_app"
        ServerConfig.from_mapping({**application["args"], "host": host}, name)


def test_refusals_survive_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(RequestError(400, "no", "prompt", "c")))
    assert (error.status, error.message, error.param, error.code) == (400, "no", "prompt", "c")
