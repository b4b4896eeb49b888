"""One model that reads the context first: what each stage goes on from, and that the prompt is read once."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cert_ray.errors import DeadlineError, RequestError
from cert_ray.serving.answering import Answerer, ModelConfig
from cert_ray.serving.answers import CascadeAnswer, Listener, Route
from cert_ray.serving.boundaries import PAPER_STOPS, cut_at
from cert_ray.serving.cascade import run_context_first
from cert_ray.serving.cascade_config import CascadeConfig
from cert_ray.serving.constraints import Template
from cert_ray.serving.deployment import ServeConfig
from cert_ray.serving.engines import DEFAULT_HOOKS, Completion, Drawn, EngineConfig, Hooks, Work
from cert_ray.serving.sampling import Mode, Sampling
from cert_ray.serving.transformers_engine import TransformersEngine
from cert_ray.sketching import Placeholder, prompt_format
from tests.serving.builders import ScriptedEngine, save_model, small_tokenizer

TOKENIZER = small_tokenizer()
MARK = "<|segmentation|>"
CONTEXT = "import pandas as pd\ndf = pd.DataFrame([1])\nx ="
PROMPTS = [
    "import pandas as pd\nx =",
    "def head(df, n):\n    return",
    "df = pd.DataFrame(",
    "class Thing:",
    "y = df['a']",
]


def answer(
    sketches: Sequence[str], codes: Sequence[str] = (" df.head(5)",), context: str = CONTEXT, **options: Any
) -> tuple[CascadeAnswer, ScriptedEngine]:
    """What a model says that draws these sketches behind one separator, and this code behind two or none."""
    window = options.pop("window", 512)
    config = CascadeConfig(**{name: options.pop(name) for name in ("rank", "sketches") if name in options})

    def script(prompt: str) -> list[tuple[str, float]]:
        drawn = sketches if prompt.count(MARK) == 1 else codes
        return [(text, -1.0) for text in drawn]

    model = ScriptedEngine(TOKENIZER, script, window)
    sampling = Sampling(**{"n": len(sketches), "max_tokens": 20, **options})
    return run_context_first(context, sampling, model, config), model


def texts(given: CascadeAnswer) -> list[str]:
    return [choice.text for choice in given.choices]


def test_both_stages_go_on_from_the_context_as_it_is() -> None:
    given, model = answer([" a(<|number|>)", " b(<|number|>)", " b(<|number|>)"])
    assert model.prompts == [f"{CONTEXT}{MARK}", f"{CONTEXT}{MARK} b(<|number|>){MARK}"]
    assert (given.route, given.sketch, given.sketch_votes) == (Route.GENERATOR, " b(number)", 2)
    assert texts(given) == [" df.head(5)"] * 3


def test_a_sketch_ends_with_the_separator_and_code_holds_none() -> None:
    _, model = answer([" a(<|number|>)"], stop_token_ids=(7,))
    sketching, coding = model.requests
    separator = TOKENIZER.token_to_id(MARK)
    assert (sketching.stop_token_ids, sketching.code_only) == ({7, separator}, False)
    assert (coding.stop_token_ids, coding.code_only) == ({7}, True)
    assert separator in prompt_format.marker_ids(TOKENIZER)
    assert set(PAPER_STOPS) <= set(sketching.stop)
    assert {*PAPER_STOPS, "\n\n\n"} <= set(coding.stop)


def test_the_blanks_of_the_context_stand_in_the_sketch_as_in_training() -> None:
    given, model = answer(["\n    return df[<|string|>]"], ["return df['a']"], "def f(df):\n    ")
    assert given.sketch == "return df[string]"
    assert model.prompts == [f"def f(df):{MARK}", f"def f(df):{MARK}\n    return df[<|string|>]{MARK}"]
    assert [request.start for request in model.requests] == ["\n    "] * 2
    (example,) = prompt_format.encode_context_first_batch(
        TOKENIZER, [("def f(df):", "\n    return df[string]", [(15, 21, "string")], "\n    return df['a']")]
    )
    assert list(model.requests[1].prompt) == example[: len(model.requests[1].prompt)]


def test_a_sketch_without_placeholders_is_the_answer() -> None:
    given, model = answer([" df.tail()", " df.head()", " df.head()"])
    assert (given.route, texts(given)) == (Route.SKETCHER, [" df.head()", " df.head()", " df.tail()"])
    assert len(model.prompts) == 1


@pytest.mark.parametrize(
    ("sketch", "window", "route"),
    [("", 512, Route.GENERATOR_EMPTY_SKETCH), (" f(<|number|>)" * 8, 60, Route.GENERATOR_LONG_SKETCH)],
)
def test_without_a_sketch_that_fits_the_context_stands_alone(sketch: str, window: int, route: Route) -> None:
    given, model = answer([sketch], window=window, max_tokens=8)
    assert given.route is route
    assert model.prompts[1] == CONTEXT


def test_empty_code_gives_way_to_the_sketches() -> None:
    given, _ = answer([" df.head(<|number|>)"], ["", "\nprint(x)"])
    assert (given.route, texts(given)) == (Route.SKETCHER_EMPTY_GENERATOR, [" df.head(number)"])


def test_the_other_modes() -> None:
    given, model = answer([" a(<|number|>)"], [" a(5)"], mode=Mode.CONSTRAINED)
    assert (given.route, given.off_sketch) == (Route.CONSTRAINED, 0)
    assert model.requests[1].template == Template((" a(", ")"), ("number",), 0.001)
    given, model = answer([" a(<|number|>)"], mode=Mode.SKETCH_ONLY)
    assert (given.route, texts(given), len(model.prompts)) == (Route.SKETCH_ONLY, [" a(number)"], 1)
    given, model = answer([" a(<|number|>)"], mode=Mode.GENERATOR_ONLY)
    assert (given.route, texts(given), model.prompts) == (Route.GENERATOR_ONLY, [" df.head(5)"], [CONTEXT])


@pytest.mark.parametrize(
    ("options", "param"),
    [({"mode": Mode.SINGLE}, "mode"), ({"suffix": "x"}, "suffix"), ({"echo": True, "logprobs": 1}, "echo")],
)
def test_what_a_cascade_cannot_do_is_refused(options: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        answer([" a()"], **options)
    assert (refused.value.status, refused.value.param) == (400, param)


@pytest.fixture(scope="module", params=["llama", "gpt_neo", "codegen"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return context_first(tmp_path_factory.mktemp(request.param), request.param)


def context_first(folder: Path, architecture: str) -> str:
    """A random model whose config says that it was trained on the view."""
    save_model(folder, architecture, window=128)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"cert_ray_view": "context_first"}))
    return str(folder)


def greedy(folder: str, prompt: list[int], max_tokens: int) -> list[int]:
    """By one whole forward pass for each token; code holds no special token but the end."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids: list[int] = []
    while len(ids) < max_tokens and cut_at(text := TOKENIZER.decode(ids), (*PAPER_STOPS, "\n\n\n")) == text:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, -1]
        logits[list(prompt_format.marker_ids(TOKENIZER))] = float("-inf")
        token = int(logits.argmax())
        if token == 0:
            break
        ids.append(token)
    return ids


class SketchesDrawn(TransformersEngine):
    """Greedy but for its sketches: a random model's likeliest sketch is always the empty one."""

    def draw(self, work: Work, hooks: Hooks = DEFAULT_HOOKS) -> Drawn:
        return super().draw(work if work.code_only else replace(work, temperature=1.0), hooks)


def test_the_greedy_answer_is_that_of_plain_forward_passes_over_the_whole_text(folder: str) -> None:
    model, filled_in = SketchesDrawn(folder), 0
    for seed, prompt in enumerate(PROMPTS * 3):
        given = run_context_first(prompt, Sampling(max_tokens=8, temperature=0.0, seed=seed), model)
        if given.route is Route.GENERATOR and filled_in < 3:
            filled_in += 1
            assert given.chosen is not None
            context = prompt_format.encode_code(TOKENIZER, prompt)
            whole = prompt_format.code_prompt(TOKENIZER, context, given.chosen.text, given.chosen.placeholders)
            assert list(given.choices[0].ids) == greedy(folder, whole, 8)
    assert filled_in


def test_the_prompt_is_read_once_for_both_stages(tmp_path: Path) -> None:
    folder = context_first(tmp_path, "llama")
    keeping, forgetting = (
        TransformersEngine(folder, EngineConfig(draft_tokens=0, prefix_cache_tokens=tokens)) for tokens in (8192, 0)
    )
    found = 0
    for prompt in PROMPTS:
        before = [engine.counted.forward_rows for engine in (keeping, forgetting)]
        sampling = Sampling(n=4, max_tokens=8, temperature=1.0, seed=3)
        given, again = (run_context_first(prompt, sampling, engine) for engine in (keeping, forgetting))
        assert [choice.ids for choice in given.choices] == [choice.ids for choice in again.choices]
        once, twice = (
            engine.counted.forward_rows - rows for engine, rows in zip((keeping, forgetting), before, strict=True)
        )
        context = prompt_format.encode_code(TOKENIZER, prompt)
        assert given.prompt_tokens == len(context) + 1
        if given.route is Route.GENERATOR and given.prompt_tokens >= 8:  # shorter ones are not worth copying
            found += 1
            assert twice - once == len(context) + 1
    assert found


class Together(TransformersEngine):
    """Of so many requests none begins its second stage before all have ended their first; every one has a second."""

    def wait_for(self, requests: int) -> None:
        self._ready = threading.Barrier(requests, timeout=60)

    def draw(self, work: Work, hooks: Hooks = DEFAULT_HOOKS) -> Drawn:
        drawn = super().draw(work, hooks)
        if work.code_only:
            return drawn
        self._ready.wait()
        ids = prompt_format.encode_sketch(TOKENIZER, " f(number)", [Placeholder(3, 9, "number")])
        return replace(drawn, samples=(Completion(tuple(ids), " f(number)", "stop", -1.0),))


def test_prompts_between_two_stages_are_kept_as_many_as_there_are(tmp_path: Path) -> None:
    """Counted with a cache of 10 tokens: each of sixteen prompts of 82 and more is read once all the same."""
    folder, at_once = context_first(tmp_path, "llama"), ServeConfig.model_fields["max_ongoing_requests"].default
    prompts = [f"{name} = {name} + 1\n" * 9 + f"{name} =" for name in "abcdefghijklmnop"]
    tokens = [len(prompt_format.encode_code(TOKENIZER, prompt)) + 1 for prompt in prompts]
    assert len(prompts) == at_once
    assert min(tokens) > 64
    rows, answers = {}, {}
    for most in (10, 0):
        engine = Together(folder, EngineConfig(draft_tokens=0, prefix_cache_tokens=most))
        engine.wait_for(at_once)
        answerer = Answerer(None, engine, prompts_at_once=at_once, context_first=True)
        answers[most] = answerer.answer(prompts, Sampling(max_tokens=4, temperature=0.0))
        rows[most] = engine.counted.forward_rows
    assert {answer.route for answer in answers[10]} == {Route.GENERATOR}
    kept, read_again = ([[one.ids for one in answer.choices] for answer in answers[most]] for most in (10, 0))
    assert kept == read_again
    assert rows[0] - rows[10] == sum(tokens)


class InStages(TransformersEngine):
    """Says which stage is drawn; there always is a second."""

    stage = 0

    def draw(self, work: Work, hooks: Hooks = DEFAULT_HOOKS) -> Drawn:
        self.stage = 2 if work.code_only else 1
        drawn = super().draw(work, hooks)
        if work.code_only:
            return drawn
        ids = prompt_format.encode_sketch(TOKENIZER, " f(number)", [Placeholder(3, 9, "number")])
        return replace(drawn, samples=(Completion(tuple(ids), " f(number)", "stop", -1.0),) * work.n)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_deadline_leaves_no_prompt_pinned_and_no_error_that_holds_itself(tmp_path: Path, stage: int) -> None:
    """Without the cyclic collector, which a server's large heap runs rarely."""
    engine = InStages(context_first(tmp_path, "llama"), EngineConfig(prefix_cache_tokens=10))
    prompts, ended = engine._batch._prompts, []

    def check() -> None:
        if engine.stage == stage and len(prompts._pins):
            raise DeadlineError(504, "late", None, "timeout")

    def ask() -> None:
        sampling = Sampling(n=8, max_tokens=8, temperature=1.0)
        try:
            run_context_first(PROMPTS[1], sampling, engine, listener=Listener(check))
        except DeadlineError as error:
            assert not len(prompts._pins)  # though the error is held
            ended.append(weakref.ref(error))

    gc.collect()
    gc.disable()
    try:
        ask()
        engine.draw(Work((5, 6, 7)))  # by now the other thread has left the step that ended the request
        assert [error() for error in ended] == [None]
        assert not prompts._kept or sum(map(len, prompts._kept)) <= 10
    finally:
        gc.enable()


def test_an_answer_depends_on_its_request_alone(folder: str) -> None:
    answerer = Answerer.load(ModelConfig(model=folder, answer_cache=0))
    sampling = Sampling(n=5, max_tokens=10, temperature=1.0, seed=11)
    together = answerer.answer(PROMPTS, sampling)
    for prompt, one in zip(PROMPTS, together, strict=True):
        (alone,) = answerer.answer([prompt], sampling)
        assert (alone.route, alone.sketch) == (one.route, one.sketch)
        assert [choice.ids for choice in alone.choices] == [choice.ids for choice in one.choices]
