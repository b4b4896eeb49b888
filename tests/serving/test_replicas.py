"""What an engine's replica does with models that cannot be loaded, and when it says that it is not healthy."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest

from cert_ray.errors import DeadlineError, InputError, RequestError
from cert_ray.serving import batching, replicas
from cert_ray.serving.answering import Answerer
from cert_ray.serving.answers import CascadeAnswer, Listener, Route
from cert_ray.serving.deployment import ServedModel
from cert_ray.serving.replicas import Engines
from cert_ray.serving.sampling import Sampling
from tests.serving.builders import save_model
from tests.serving.fakes import FakeAnswerer


def test_a_damaged_model_of_several_is_told_at_the_start_and_the_others_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = {name: {"model": save_model(tmp_path / name)} for name in ("fine", "cut")}
    weights = tmp_path / "cut" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    engines = Engines({"models": folders})
    assert "cut cannot be loaded" in caplog.text
    loaded = []
    engines.load_now = lambda model: loaded.append(model) or Answerer.load(model)  # type: ignore[method-assign]
    options = {"max_tokens": 2}

    def asked(name: str) -> list[CascadeAnswer]:
        return asyncio.run(engines.answer(name, ["x ="], options, 60))

    assert asked("fine")[0].choices
    with pytest.raises(
        RequestError, match=r"^cut cannot be loaded: .*cut: it cannot be the model: its model\.safe.*Copy"
    ):
        asked("cut")
    assert [model.model for model in loaded] == [folders["fine"]["model"]]  # so none had to make room for it
    engines.check_health()
    weights.write_bytes(whole)
    engines._unfit._again_s = -1  # as after a minute
    engines._unfit.postpone("cut")
    assert asked("cut")[0].choices


def test_weights_that_do_not_fit_are_read_once_for_all_who_wait(tmp_path: Path) -> None:
    engines = Engines({"models": {name: {"model": save_model(tmp_path / name)} for name in ("a", "b")}})
    tried = []

    def load(model: ServedModel) -> Answerer:
        tried.append(model)
        raise InputError(str(model.model), "its weights do not match its config.json", "Copy it again.")

    engines.load_now = load  # type: ignore[method-assign]

    async def ask_often() -> list[str]:
        refusals = []
        for _ in range(3):
            with pytest.raises(RequestError) as refused:
                async for _ in engines.stream("a", ["x ="], {}, 60):
                    pass
            refusals.append(refused.value.message)
        return refusals

    assert set(asyncio.run(ask_often())) == {
        f"a cannot be loaded: {tmp_path / 'a'}: its weights do not match its config.json. Copy it again."
    }
    assert len(tried) == 1


def test_a_model_is_not_loaded_again_beside_itself_for_requests_that_go_away(tmp_path: Path) -> None:
    """An editor asks at each key and gives the last request up: each left a thread that loaded on."""
    engines = Engines({"models": {name: {"model": save_model(tmp_path / name)} for name in ("a", "b")}})
    begun, ready, one_at_a_time, loads = threading.Event(), threading.Event(), threading.Lock(), []

    def load(model: ServedModel) -> Answerer:
        loads.append(Path(model.folders["model"]).name)
        assert one_at_a_time.acquire(blocking=False)  # what is loaded for nobody keeps others from it, too
        begun.set()
        assert ready.wait(60)
        try:
            return Answerer.load(model)
        finally:
            one_at_a_time.release()

    engines.load_now = load  # type: ignore[method-assign]

    async def ask(name: str) -> CascadeAnswer:
        (answer,) = await engines.answer(name, ["x ="], {"max_tokens": 2}, 60)
        return answer

    async def ask_at_each_key() -> list[CascadeAnswer]:
        for _ in range(3):
            asked = asyncio.ensure_future(ask("a"))
            while not begun.is_set():
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
        last = [asyncio.ensure_future(ask(name)) for name in ("b", "a")]
        for _ in range(10):
            await asyncio.sleep(0)
        ready.set()
        return await asyncio.gather(*last)

    assert all(answer.choices for answer in asyncio.run(ask_at_each_key()))
    assert loads == ["a", "b"]


def test_engines_do_not_start_for_models_of_which_none_can_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model folder"):
        Engines({"models": {name: {"model": str(tmp_path / name)} for name in ("a", "b")}})


@pytest.mark.parametrize("several", [False, True])
def test_an_engine_whose_step_hangs_is_not_healthy_and_its_threads_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several: bool
) -> None:
    model = {"model": save_model(tmp_path / "m", "llama"), "answer_cache": 0}
    engines = Engines({"models": {"cert": model, "other": model}} if several else model)
    begun, goes_on, hung = threading.Event(), threading.Event(), []
    load = Answerer.load(ServedModel(**model))
    if several:
        engines.load_now = lambda model: load  # type: ignore[method-assign]
    else:
        assert engines._only is not None
        load = engines._only
    forward_pass = load._generator._batch._model  # type: ignore[attr-defined]
    forward = forward_pass.forward

    def hang(feeds: Any) -> Any:
        begun.set()
        hung.append(goes_on.wait(60))
        return forward(feeds)

    async def ask(seed: int, timeout_s: float) -> list[CascadeAnswer]:
        return await engines.answer("cert", ["x ="], {"max_tokens": 2, "seed": seed}, timeout_s)

    async def ask_in_vain() -> None:
        with pytest.raises(DeadlineError):
            await asyncio.wait_for(ask(1, 0.2), 30)

    assert asyncio.run(ask(0, 60))
    engines.check_health()
    monkeypatch.setattr(forward_pass, "forward", hang)
    monkeypatch.setattr(batching, "_LOOK_S", 0.01, raising=False)
    try:
        asyncio.run(ask_in_vain())  # though the step goes on
        assert begun.is_set()
        assert not hung
        engines.check_health()  # it may be a long step
        monkeypatch.setattr(replicas, "_HANGS_S", 0.01, raising=False)
        with pytest.raises(RuntimeError, match="hangs"):
            engines.check_health()
    finally:
        goes_on.set()
    monkeypatch.setattr(replicas, "_HANGS_S", 60.0)
    assert asyncio.run(ask(2, 60))
    engines.check_health()


class Fails(FakeAnswerer):
    """Answers with what stands in `outcomes`, one after the other."""

    def __init__(self, *outcomes: Exception | None) -> None:
        self._outcomes = list(outcomes)

    def answer_one(self, prompt: str, sampling: Sampling, listener: Listener) -> CascadeAnswer:
        outcome = self._outcomes.pop(0)
        if outcome is not None:
            raise outcome
        return CascadeAnswer((), Route.MODEL)


@pytest.mark.parametrize(
    ("outcomes", "is_healthy"),
    [
        ([OSError(), OSError()], True),
        ([OSError(), OSError(), OSError()], False),
        ([OSError(), OSError(), None, OSError()], True),
        ([OSError(), OSError(), RequestError(400, "too long"), OSError()], False),
        ([RequestError(400, "too long")] * 5, True),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_three_times_in_a_row_is_not_healthy(
    tmp_path: Path, outcomes: list[Exception | None], is_healthy: bool, stream: bool
) -> None:
    class Stand(Engines):
        def load_now(self, model: ServedModel) -> Answerer:
            return Fails(*outcomes)

    engines = Stand({"model": str(tmp_path)})

    async def ask_all() -> None:
        for _ in outcomes:
            with contextlib.suppress(OSError, RequestError):
                if stream:
                    async for _ in engines.stream("cert", ["x ="], {}, 60):
                        pass
                else:
                    await engines.answer("cert", ["x ="], {}, 60)

    asyncio.run(ask_all())
    with contextlib.nullcontext() if is_healthy else pytest.raises(RuntimeError, match="the last 3 requests failed"):
        engines.check_health()
