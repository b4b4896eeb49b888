"""Several tokens of a branch in one forward pass: drafts and templates change how a model is run, not what it says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cert_ray.serving import packed_attention
from cert_ray.serving.constraints import Courses, Template
from cert_ray.serving.engines import Completion, EngineConfig, Hooks, Work
from cert_ray.serving.sampling import Streams
from cert_ray.serving.transformers_engine import TransformersEngine
from cert_ray.sketching import prompt_format, sketch_spans
from tests.serving.builders import save_model

TEXTS = ["import pandas as pd\nimport numpy as np\n\n\ndef head(df, n):\n", "df", "x = df['a'].astype(float)\nreturn"]
SKETCHED = sketch_spans("x = df.head(1)\ny = pd.DataFrame([1.5])")
LEAST = 1e-30  # a model of random weights finds no sketch likely


@pytest.fixture(scope="module", params=["gpt_neo", "llama", "gpt2", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp(request.param), request.param, window=128)


@pytest.fixture(scope="module")
def plain(folder: str) -> TransformersEngine:
    return TransformersEngine(folder)


@pytest.fixture(scope="module")
def drafting(folder: str) -> TransformersEngine:
    engine = TransformersEngine(folder, EngineConfig(draft_tokens=5))
    assert engine.is_packed
    return engine


def work(engine: TransformersEngine, text: str, **changed: Any) -> Work:
    options: dict[str, Any] = {"n": 6, "max_tokens": 30, "temperature": 0.7, "top_p": 0.95, "seed": 7}
    return Work(tuple(prompt_format.encode_code(engine.tokenizer, text)), **{**options, **changed})


def draw(engine: TransformersEngine, asked: Work) -> list[Completion]:
    return [sample for sample in engine.draw(asked).samples if sample is not None]


def ids(samples: list[Completion]) -> list[tuple[int, ...]]:
    return [sample.ids for sample in samples]


def template(start: str = "", least_share: float = LEAST) -> Template:
    return Template.of(start, SKETCHED.text, SKETCHED.placeholders, least_share)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_samples_are_those_drawn_without_drafts_token_for_token(
    plain: TransformersEngine, drafting: TransformersEngine, temperature: float
) -> None:
    """Drafts that are right for one sample, half right, and wrong, for branches that split inside of them."""
    asked = [work(plain, text, temperature=temperature) for text in TEXTS]
    expected = [draw(plain, one) for one in asked]
    before = drafting.counted.accepted_tokens
    for one, samples in zip(asked, expected, strict=True):
        first, other = samples[0].ids, samples[-1].ids
        for draft in (first, (*first[:9], *other[9:]), other[::-1]):
            drawn = draw(drafting, replace(one, draft=draft))
            assert ids(drawn) == ids(samples)
            assert [s.mean_logprob for s in drawn] == pytest.approx([s.mean_logprob for s in samples], abs=1e-4)
    assert drafting.counted.accepted_tokens > before


def test_drafts_in_company_and_in_a_full_batch_change_nothing(folder: str, plain: TransformersEngine) -> None:
    expected = [draw(plain, work(plain, text)) for text in TEXTS]
    for config in (EngineConfig(draft_tokens=7, prefill_tokens=3), EngineConfig(draft_tokens=3, max_rows=4)):
        engine = TransformersEngine(folder, config)
        asked = [
            work(engine, text, draft=samples[at].ids)
            for at in (0, 3)
            for text, samples in zip(TEXTS, expected, strict=True)
        ]
        with ThreadPoolExecutor(6) as pool:
            drawn = list(pool.map(lambda one: draw(engine, one), asked))  # noqa: B023 - done before the next
        assert [ids(one) for one in drawn] == [ids(samples) for samples in expected] * 2


def test_a_right_draft_saves_forward_passes(plain: TransformersEngine, drafting: TransformersEngine) -> None:
    expected = draw(plain, work(plain, TEXTS[1], n=1))
    before = drafting.counted.forward_passes
    assert ids(draw(drafting, work(drafting, TEXTS[1], n=1, draft=(*expected[0].ids, -2)))) == ids(expected)
    assert drafting.counted.forward_passes - before <= len(expected[0].ids) // 3


def test_stops_and_the_window_end_samples_inside_a_draft(
    plain: TransformersEngine, drafting: TransformersEngine
) -> None:
    for changed in ({"stop": ("a", "e", "(", "7")}, {"max_tokens": 200}, {"max_tokens": 3}):
        expected = draw(plain, work(plain, TEXTS[0], **changed))
        drawn = draw(drafting, work(drafting, TEXTS[0], draft=expected[2].ids, **changed))
        assert [(one.ids, one.text, one.finish_reason) for one in drawn] == [
            (one.ids, one.text, one.finish_reason) for one in expected
        ]


def test_drafts_are_streamed_whole(plain: TransformersEngine, drafting: TransformersEngine) -> None:
    told = [""] * 6
    expected = draw(plain, work(plain, TEXTS[0]))

    def on_text(index: int, text: str, reason: str | None) -> None:
        told[index] += text

    asked = work(drafting, TEXTS[0], draft=expected[1].ids)
    drafting.draw(asked, Hooks(on_text=on_text, streams_text=True))
    assert told == [sample.text for sample in expected]


@pytest.mark.parametrize("start", ["", "  "])
def test_every_answer_is_the_sketch_with_its_holes_filled(plain: TransformersEngine, start: str) -> None:
    asked = work(
        plain, TEXTS[0], n=12, max_tokens=100, temperature=2.0, top_p=1.0, start=start, template=template(start)
    )
    samples = draw(plain, asked)
    whole = [sample for sample in samples if sample.finish_reason == "stop"]
    assert whole
    for sample in whole:
        assert sample.keeps_to_template
        pieces = template().fixed
        assert sample.text.startswith(pieces[0])
        assert sample.text.endswith(pieces[-1])
        assert template().end_in(sample.text, is_over=True) == len(sample.text)
    for sample in samples:  # a hole may be longer than what is left of the window
        assert sample.text.startswith("x = df.head(")
        assert sample.keeps_to_template == (sample.finish_reason == "stop")


def test_fixed_text_is_read_at_once(plain: TransformersEngine) -> None:
    before = plain.counted.forward_passes
    sample = draw(plain, work(plain, TEXTS[1], n=1, max_tokens=100, temperature=0.0, template=template()))[0]
    assert plain.counted.forward_passes - before < len(sample.ids)
    assert plain.counted.accepted_tokens > 0


def draw_apart(
    folder: str, engine: TransformersEngine, asked: Work, sample: int, template: Template
) -> tuple[int, ...]:
    """One sample by itself: no cache, no batch, no draft, in numpy; at each token those that the template allows."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    size = model.get_input_embeddings().num_embeddings
    course = Courses(engine.tokenizer, size, frozenset({0})).begin(template)
    stream, ids = Streams(asked.seed, asked.prompt), list(asked.prompt)
    for step in range(asked.max_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double().numpy()
        logits = np.where(course.refused.numpy(), -np.inf, logits)
        order = np.argsort(-logits, kind="stable")
        cumulative = np.exp((logits[order] - logits.max()) / asked.temperature).cumsum()
        cumulative /= cumulative[-1]
        nucleus = int(np.searchsorted(cumulative, asked.top_p)) + 1
        target = stream.at(step, sample + 1)[sample] * cumulative[nucleus - 1]
        token = int(order[np.searchsorted(cumulative[:nucleus], target, side="right")])
        following = course.after(token)
        assert following is not None
        course = following
        ids.append(token)
        text = prompt_format.decode_code(engine.tokenizer, ids[len(asked.prompt) :])
        if template.end_in(text, is_over=False) is not None:
            break
    return tuple(ids[len(asked.prompt) :])


def test_a_constrained_sample_is_what_it_would_be_if_drawn_by_itself(folder: str, plain: TransformersEngine) -> None:
    asked = work(plain, TEXTS[1], n=3, max_tokens=25, template=template())
    drawn = draw(plain, asked)
    for number in (0, 2):
        assert drawn[number].ids == draw_apart(folder, plain, asked, number, template())


def test_constrained_answers_are_the_same_in_company_and_without_packed_attention(
    folder: str, plain: TransformersEngine, drafting: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [work(plain, text, max_tokens=25, template=template()) for text in TEXTS]
    alone = [ids(draw(plain, one)) for one in asked]
    others = [work(drafting, text, draft=alone[0][0]) for text in TEXTS]
    with ThreadPoolExecutor(6) as pool:
        assert [ids(one) for one in pool.map(lambda one: draw(drafting, one), [*asked, *others])][:3] == alone
    with monkeypatch.context() as patched:
        patched.setattr(packed_attention, "enable", lambda _: False)
        one_by_one = TransformersEngine(folder)
    assert not one_by_one.is_packed
    assert [ids(draw(one_by_one, one)) for one in asked] == alone


def test_a_sample_is_let_go_where_the_model_does_not_want_the_sketch(plain: TransformersEngine) -> None:
    free = work(plain, TEXTS[0])
    held = work(plain, TEXTS[0], template=template(least_share=1.0))
    samples = draw(plain, held)
    assert ids(samples) == ids(draw(plain, free))  # at once, so these are the free samples
    assert [sample.keeps_to_template for sample in samples] == [False] * 6


def test_behind_a_sketch_that_was_cut_an_answer_is_drawn_freely(plain: TransformersEngine) -> None:
    """It goes on, and ends as free answers do: at the most tokens, or at a stop string."""
    cut = Template.of("", SKETCHED.text, SKETCHED.placeholders, LEAST, is_cut=True)
    options: dict[str, Any] = {"n": 12, "temperature": 2.0, "top_p": 1.0, "max_tokens": 100}
    held = draw(plain, work(plain, TEXTS[0], **options, template=template()))
    samples = draw(plain, work(plain, TEXTS[0], **options, template=cut))
    ended = [(one, other) for one, other in zip(held, samples, strict=True) if one.finish_reason == "stop"]
    assert ended
    for one, other in ended:
        assert other.keeps_to_template
        assert len(other.ids) > len(one.ids)
        assert cut.end_in(other.text, is_over=True) is not None
    stopped = draw(plain, work(plain, TEXTS[0], **options, template=cut, stop=tuple("abcdefghij")))
    assert not any(sample.keeps_to_template for sample in stopped)  # inside what the sketch fixes
    for one, other in zip(held, samples, strict=True):
        if one.finish_reason == "length":  # a hole was longer than what may be drawn
            assert not other.keeps_to_template
