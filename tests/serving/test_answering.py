"""The answerer: many prompts and callers at once, answers kept, work given up."""

from __future__ import annotations

import json
import pickle
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from cert_ray import storage
from cert_ray.errors import (
    ConfigError,
    DeadlineError,
    InputError,
    RequestCancelledError,
    RequestError,
    TokenizerMismatchError,
)
from cert_ray.retrieval.retriever import Retriever
from cert_ray.serving import answering
from cert_ray.serving.answering import AnswerCache, Answerer, ModelConfig
from cert_ray.serving.answers import CascadeAnswer, Route
from cert_ray.serving.cascade_config import CascadeConfig
from cert_ray.serving.engines import DEFAULT_HOOKS, Completion, Drawn, Hooks, TokenLogprobs, Work
from cert_ray.serving.events import Event, TextDrawn
from cert_ray.serving.openai_schema import CompletionRequest, RequestLimits, read_request
from cert_ray.serving.sampling import Mode, Sampling
from cert_ray.sketching import prompt_format
from cert_ray.sketching.prompt_format import encode_code
from tests.retrieval.builders import ASKS_FOR_SORTING, DOCS
from tests.serving.builders import ScriptedEngine, save_model, small_tokenizer

PROMPTS = ["import pandas as pd\n", "df = pd.DataFrame(", "def head(df, n):\n    return", "x = df['a']", "class A"]
SAMPLING = Sampling(n=3, max_tokens=12, temperature=0.8, seed=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    sketcher, generator = tmp_path_factory.mktemp("sketcher"), tmp_path_factory.mktemp("generator")
    return {"sketcher": save_model(sketcher, "llama"), "generator": save_model(generator, "gpt_neo", seed=1)}


@pytest.fixture(scope="module")
def answerer(folders: dict[str, str]) -> Answerer:
    return Answerer.load(ModelConfig(**folders))


def shown(answers: list[CascadeAnswer]) -> list[Any]:
    """What of an answer depends on the request alone."""
    return [([choice.ids for choice in one.choices], one.route, one.sketch, one.sketch_votes) for one in answers]


def test_answers_do_not_depend_on_who_asks_beside(folders: dict[str, str], answerer: Answerer) -> None:
    fresh = Answerer.load(ModelConfig(**folders, answer_cache=0))
    apart = [fresh.answer([prompt], SAMPLING)[0] for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        calls = list(pool.map(lambda _: fresh.answer(PROMPTS, SAMPLING), range(4)))
    assert all(shown(answers) == shown(apart) for answers in calls)
    assert shown(answerer.answer(PROMPTS, SAMPLING)) == shown(apart)


def test_answers_held_to_their_sketch_do_not_depend_on_who_asks_beside(folders: dict[str, str]) -> None:
    fresh = Answerer.load(ModelConfig(**folders, answer_cache=0, cascade={"least_share": 1e-9}))
    held = SAMPLING.model_copy(update={"mode": Mode.CONSTRAINED, "temperature": 1.5})
    apart = [fresh.answer([prompt], held)[0] for prompt in PROMPTS]
    assert shown(fresh.answer(PROMPTS, held)) == shown(apart)
    constrained = [answer for answer in apart if answer.route is Route.CONSTRAINED]
    assert constrained
    for answer in constrained:
        assert answer.off_sketch == sum(not choice.keeps_to_template for choice in answer.choices)


def test_the_same_request_again_is_the_same_answer_and_is_told_again(answerer: Answerer) -> None:
    sampling, told = SAMPLING.model_copy(update={"seed": 99}), []
    first = answerer.answer(PROMPTS[:1], sampling)[0]
    hits = answerer.cache_hits

    def listen(place: int, event: Event) -> None:
        assert place == 0
        told.append(event)

    again = answerer.answer(PROMPTS[:1], sampling, on_event=listen)[0]
    assert (first.from_cache, again.from_cache, answerer.cache_hits) == (False, True, hits + 1)
    assert again.choices == first.choices
    texts = ["".join(e.text for e in told if isinstance(e, TextDrawn) and e.index == place) for place in range(3)]
    assert texts == [choice.text for choice in first.choices]
    assert not answerer.answer(PROMPTS[:1], sampling.model_copy(update={"seed": 98}))[0].from_cache


def test_long_answers_are_kept_as_many_as_take_the_room_of_short_ones() -> None:
    def answer(choices: int, tokens: int, told: TokenLogprobs | None = None) -> CascadeAnswer:
        return CascadeAnswer(
            tuple(Completion(tuple(range(tokens)), "", "stop", 0.0, told) for _ in range(choices)), Route.MODEL
        )

    def kept(cache: AnswerCache) -> list[str]:
        return [prompt for prompt in "abcd" if cache.find(prompt, SAMPLING) is not None]

    cache = AnswerCache(3)
    for prompt in "abcd":
        cache.keep(prompt, SAMPLING, answer(2, 400))
    assert kept(cache) == ["b", "c", "d"]
    cache.keep("b", SAMPLING, answer(2, 700))  # again, and longer
    assert kept(cache) == ["b", "c", "d"]
    cache.keep("a", SAMPLING, answer(2, 600))
    assert kept(cache) == ["a", "c", "d"]  # the longest was the least recently used, too
    cache.keep("c", SAMPLING, answer(1, 100, TokenLogprobs((), (), (), ())))
    assert kept(cache) == ["c", "d"]
    cache.keep("b", SAMPLING, answer(200, 1_000))  # more than there is room for at all
    assert kept(cache) == ["c", "d"]
    same = answer(1, 1_000).choices * 200
    cache.keep("d", SAMPLING, CascadeAnswer(same, Route.MODEL))  # of which there is one
    assert kept(cache) == ["c", "d"]


def test_greedy_answers_are_kept_whatever_the_seed_and_drawn_ones_if_it_was_given() -> None:
    answer = CascadeAnswer((Completion((1,), "x", "stop", 0.0),), Route.MODEL)
    cache = AnswerCache(2)
    greedy, drawn = Sampling(temperature=0, seed=1, is_seeded=False), Sampling(seed=1)
    cache.keep("a", greedy, answer)
    for seed in range(4):
        cache.keep("b", Sampling(seed=seed, is_seeded=False), answer)
    cache.keep("a", drawn, answer)
    assert cache.find("b", Sampling(seed=3)) is None
    assert cache.find("a", Sampling(temperature=0, seed=2)) == replace(answer, from_cache=True)
    assert cache.find("a", drawn) is not None
    assert cache.find("a", Sampling(seed=2)) is None
    assert cache.find("a", Sampling(temperature=0, n=2)) is None


def test_a_greedy_request_without_a_seed_is_answered_once(answerer: Answerer) -> None:
    read = partial(read_request, CompletionRequest(model="cert", prompt="y = df", temperature=0), RequestLimits())
    first, again = (answerer.answer(*read())[0] for _ in range(2))
    assert (first.from_cache, again.from_cache) == (False, True)
    assert again.choices == first.choices


def test_events_of_several_prompts_come_in_order_for_each(answerer: Answerer) -> None:
    told: dict[int, list[Event]] = {place: [] for place in range(len(PROMPTS))}
    answers = answerer.answer(PROMPTS, SAMPLING, on_event=lambda place, event: told[place].append(event))
    for place, answer in enumerate(answers):
        assert told[place][0] == answer.chosen
        for index, choice in enumerate(answer.choices):
            pieces = [event for event in told[place][1:] if isinstance(event, TextDrawn) and event.index == index]
            assert "".join(piece.text for piece in pieces) == choice.text


def test_no_prompts_no_answers(answerer: Answerer) -> None:
    assert answerer.answer([], SAMPLING) == []


def test_what_is_cancelled_or_late_is_not_begun(answerer: Answerer) -> None:
    cancelled = threading.Event()
    cancelled.set()
    sampling = SAMPLING.model_copy(update={"seed": 1})
    with pytest.raises(RequestCancelledError):
        answerer.answer(PROMPTS, sampling, cancelled=cancelled)
    with pytest.raises(DeadlineError):
        answerer.answer(PROMPTS, sampling, deadline_s=time.monotonic())


def test_errors_that_end_work_survive_pickling() -> None:
    for error in (RequestCancelledError(499, "gone", None, "cancelled"), DeadlineError(504, "late", None, "timeout")):
        copied = pickle.loads(pickle.dumps(error))
        assert type(copied) is type(error)
        assert (copied.status, copied.message, copied.code) == (error.status, error.message, error.code)


def test_one_prompt_that_is_refused_ends_the_others_and_is_what_is_raised() -> None:
    class Endless(ScriptedEngine):
        def draw(self, work: Work, hooks: Hooks = DEFAULT_HOOKS) -> Drawn:
            while True:  # until the other prompt's failure is noticed
                hooks.check()

    engine = Endless(small_tokenizer(), lambda _: [("", 0.0)], context_tokens=40)
    with pytest.raises(RequestError, match="40 tokens"):
        Answerer(None, engine).answer(["x", "y = 1 + " * 50], Sampling())


class TestRetrieve:
    """Documentation ahead of prompts."""

    PROMPT = ASKS_FOR_SORTING

    def answerer(self, context_tokens: int = 512, cascade: bool = False) -> tuple[Answerer, list[ScriptedEngine]]:
        tokenizer = small_tokenizer()
        texts = [" x = <|number|>", " x = 1"] if cascade else [" x = 1"]
        engines = [ScriptedEngine(tokenizer, lambda _, text=text: [(text, 0.0)], context_tokens) for text in texts]
        sketcher = engines[0] if cascade else None
        return Answerer(sketcher, engines[-1], retriever=Retriever(DOCS)), engines

    def test_a_model_reads_the_documentation_and_the_answer_is_the_same_text(self) -> None:
        answerer, (engine,) = self.answerer()
        answer = answerer.answer([self.PROMPT], Sampling(max_tokens=8))[0]
        assert engine.prompts == [Retriever(DOCS).header(self.PROMPT) + self.PROMPT.rstrip()]
        assert answer.choices[0].text == " x = 1"

    def test_both_stages_read_it_as_in_training(self) -> None:
        answerer, (sketcher, generator) = self.answerer(cascade=True)
        answerer.answer([self.PROMPT], Sampling(max_tokens=8))
        documented = Retriever(DOCS).header(self.PROMPT) + self.PROMPT.rstrip()
        assert sketcher.prompts == [documented.replace("def f", "def <|func|>")]
        assert generator.prompts == [f"x = <|number|>\n<|segmentation|>\n{documented}"]

    def test_without_room_for_both_the_prompt_stays_alone(self) -> None:
        answerer, (engine,) = self.answerer(context_tokens=100)
        answerer.answer([self.PROMPT], Sampling(max_tokens=40))
        assert engine.prompts == [self.PROMPT.rstrip()]

    @pytest.mark.parametrize("cascade", [False, True])
    def test_a_limit_beyond_the_window_leaves_half_of_it_to_documentation_and_prompt(self, cascade: bool) -> None:
        header = Retriever(DOCS).header(self.PROMPT)
        tokens = len(encode_code(small_tokenizer(), header + self.PROMPT.rstrip()))
        for window, documented in ((2 * tokens, True), (2 * tokens - 2, False)):
            answerer, (first, *_) = self.answerer(window, cascade)
            answerer.answer([self.PROMPT], Sampling(max_tokens=2_048))
            assert first.prompts[0].startswith(header) == documented

    @pytest.mark.parametrize("cascade", [False, True])
    def test_a_prompt_with_documentation_is_tokenised_once_for_each_model(
        self, cascade: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoded: list[str] = []

        def counted(tokenizer: Tokenizer, code: str) -> list[int]:
            encoded.append(code)
            return encode_code(tokenizer, code)

        monkeypatch.setattr(prompt_format, "encode_code", counted)
        self.answerer(cascade=cascade)[0].answer([self.PROMPT], Sampling(max_tokens=8))
        assert encoded == [Retriever(DOCS).header(self.PROMPT) + self.PROMPT.rstrip()]

    @pytest.mark.parametrize("asked", [{"echo": True, "max_tokens": 0}, {"echo": True, "logprobs": 1}])
    def test_a_prompt_whose_tokens_are_told_stays_alone(self, asked: dict[str, Any]) -> None:
        answerer, (engine,) = self.answerer()
        answerer.answer([self.PROMPT], Sampling(**{"max_tokens": 8, **asked}))
        assert engine.prompts == [self.PROMPT]

    def test_missing_documentation_is_named_before_models_are_loaded(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"docs\.jsonl"):
            Answerer.load(ModelConfig(model="absent", retrieve={"docs": str(tmp_path / "docs.jsonl")}))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("mode", "constrained"),
        ("mode", "sketch_only"),
        ("mode", "generator_only"),
        ("routing", "released"),
        ("sketch_scope", "file"),
        ("kind", "names"),
        ("rank", "likelihood"),
        ("sketches", 5),
        ("reseed_every", 50),
        ("least_share", 0.5),
        ("stop", ("\n#",)),
        ("generator_stop", ()),
    ],
)
def test_one_plain_model_has_no_options_of_a_cascade(option: str, value: Any, tmp_path: Path) -> None:
    folder, cascade = save_model(tmp_path), {option: value}
    told = f"cascade.{option}={value!r} with model='{folder}': one plain model has no cascade options"
    with pytest.raises(ConfigError, match=re.escape(told)) as refused:
        ModelConfig.from_mapping({"model": folder, "cascade": cascade}, "test")
    assert f'{folder}/config.json does not say "cert_ray_view": "context_first"' in str(refused.value)
    assert f"or leave out cascade.{option};" in str(refused.value)
    elsewhere = ModelConfig.from_mapping({"model": str(tmp_path / "elsewhere"), "cascade": cascade}, "test")
    with pytest.raises(InputError, match="no such model folder"):
        Answerer.load(elsewhere)
    save_model(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=rf"leave out cascade\.{option};"):
        Answerer.load(elsewhere)


def test_options_are_read_where_the_models_store_may_not_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a front door's, which needs no credentials; whoever loads the model holds them against it."""
    with monkeypatch.context() as patched:
        patched.setattr(storage, "exists", lambda _: pytest.fail("asked"))
        config = ModelConfig.from_mapping({"model": "memory://plain", "cascade": {"sketches": 5}}, "test")
    storage.write_text("memory://plain/config.json", "{}")
    monkeypatch.setattr(answering, "check_models", lambda *_: {"model": None})
    with pytest.raises(ConfigError, match=r"cascade\.sketches=5 with model='memory://plain': one plain model"):
        config.check()


def test_a_cascades_options_may_be_written_out_for_one_plain_model(tmp_path: Path) -> None:
    written = CascadeConfig().model_dump(mode="json")
    assert set(written) >= {"kind", "mode", "rank", "sketches", "stop"}
    assert ModelConfig.from_mapping({"model": save_model(tmp_path), "cascade": written}, "test").model == str(tmp_path)


@pytest.mark.parametrize(
    "cascade", [{"sketches": 5, "rank": "likelihood"}, {"stop": ["\n#"], "least_share": 0.5, "kind": "constants"}]
)
def test_a_model_of_both_stages_has_a_cascades_options(cascade: dict[str, Any], tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"cert_ray_view": "context_first"}))
    ModelConfig.from_mapping({"model": folder, "cascade": cascade}, "test")


@pytest.mark.parametrize("mode", [Mode.CASCADE, Mode.CONSTRAINED, Mode.SKETCH_ONLY, Mode.GENERATOR_ONLY])
def test_a_request_for_a_mode_of_a_cascade_is_refused_by_one_plain_model(mode: Mode) -> None:
    plain = Answerer(None, ScriptedEngine(small_tokenizer(), lambda _: [("x", 0.0)]))
    with pytest.raises(RequestError, match=f"mode {mode.value}: one plain model.*leave mode out") as refused:
        plain.answer(["x"], Sampling(mode=mode))
    assert (refused.value.status, refused.value.param) == (400, "mode")


def test_vllm_holds_no_answer_to_a_sketch() -> None:
    models = {"sketcher": "a", "generator": "b", "engine": {"kind": "vllm"}}
    with pytest.raises(ConfigError, match=r"engine\.kind='transformers'"):
        ModelConfig.from_mapping({**models, "cascade": {"mode": "constrained"}}, "test")
    ModelConfig.from_mapping(models, "test")


class TestContextFirst:
    """One model whose config says that it is both stages."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> str:
        save_model(tmp_path, "llama")
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"cert_ray_view": "context_first"}))
        return str(tmp_path)

    def test_it_is_served_as_a_cascade(self, folder: str) -> None:
        answerer = Answerer.load(ModelConfig(model=folder, cascade={"mode": "sketch_only"}))
        (answer,) = answerer.answer(["x = df['a']"], Sampling(n=3, max_tokens=6))
        assert (answer.route, len(answer.choices)) == (Route.SKETCH_ONLY, 3)
        (answer,) = answerer.answer(["x = df['a']"], Sampling(max_tokens=6, mode=Mode.GENERATOR_ONLY))
        assert answer.route is Route.GENERATOR_ONLY

    @pytest.mark.parametrize("cascade", [{"routing": "released"}, {"sketch_scope": "file"}, {"kind": "names"}])
    def test_options_of_the_other_layout_are_refused(self, folder: str, cascade: dict[str, str]) -> None:
        ((option, value),) = cascade.items()
        with pytest.raises(ConfigError, match=f"cascade.{option}='{value}'.*Leave"):
            ModelConfig.from_mapping({"model": folder, "cascade": cascade}, "test")

    @pytest.mark.parametrize("stage", ["sketcher", "generator"])
    def test_it_is_no_half_of_another_cascade(self, folder: str, folders: dict[str, str], stage: str) -> None:
        with pytest.raises(ConfigError, match=r"both stages\. Serve it as `model`, alone"):
            Answerer.load(ModelConfig(**{**folders, stage: folder}))

    def test_one_without_the_special_tokens_is_no_model_of_both_stages(self, folder: str) -> None:
        Tokenizer(WordLevel({"x": 0})).save(f"{folder}/tokenizer.json")
        with pytest.raises(
            TokenizerMismatchError, match=r"cannot serve as model of both stages\. Take 'cert_ray_view'"
        ) as refused:
            Answerer.load(ModelConfig(model=folder))
        assert "Serve it as `model`" not in str(refused.value)

    def test_documentation_stands_ahead_of_the_context(self) -> None:
        engine = ScriptedEngine(small_tokenizer(), lambda _: [(" x = <|number|>", 0.0)])
        answerer = Answerer(None, engine, retriever=Retriever(DOCS), context_first=True)
        answerer.answer([ASKS_FOR_SORTING], Sampling(max_tokens=8))
        documented = Retriever(DOCS).header(ASKS_FOR_SORTING) + ASKS_FOR_SORTING.rstrip()
        assert [prompt.partition("<|segmentation|>")[0] for prompt in engine.prompts] == [documented] * 2
