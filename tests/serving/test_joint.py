"""Joint sampling: sample by sample what drawing apart gives, and the model's own distribution."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

from cert_ray.serving import packed_attention
from cert_ray.serving.boundaries import FirstTokens, drop_start
from cert_ray.serving.constraints import Courses, Template
from cert_ray.serving.engines import Completion, Work
from cert_ray.serving.joint import JointSamples, tell_logprobs
from cert_ray.serving.sampling import Streams, log_totals
from cert_ray.serving.transformers_engine import TransformersEngine
from cert_ray.serving.voting import read_sketch
from cert_ray.sketching import prompt_format
from tests.serving.builders import TEXTS, save_model, small_tokenizer

PROMPT = "def head(df, n):\n    return"


@pytest.fixture(scope="module", params=["gpt_neo", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp(request.param), request.param, spread=0.5)


@pytest.fixture(scope="module")
def engine(folder: str) -> TransformersEngine:
    return TransformersEngine(folder)


def samples(engine: TransformersEngine, **options: Any) -> list[Completion]:
    prompt = tuple(prompt_format.encode_code(engine.tokenizer, PROMPT))
    drawn = engine.draw(Work(prompt, **options))
    return [sample for sample in drawn.samples if sample is not None]


def draw_apart(model: Any, prompt: list[int], sample: int, options: dict[str, Any]) -> list[int]:
    """One sample by itself: no cache, no batch, the whole sequence read again for each token, in numpy."""
    stream, ids = Streams(options["seed"], prompt), list(prompt)
    for step in range(options["max_tokens"]):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double().numpy()
        order = np.argsort(-logits, kind="stable")
        weights = np.exp((logits[order] - logits.max()) / options["temperature"])
        cumulative = (weights / weights.sum()).cumsum()
        size = int(np.searchsorted(cumulative, options["top_p"])) + 1 if options["top_p"] < 1 else len(order)
        target = stream.at(step, sample + 1)[sample] * cumulative[size - 1]
        token = int(order[np.searchsorted(cumulative[:size], target, side="right")])
        if token == 0:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize(("temperature", "top_p"), [(0.2, 0.9), (0.8, 0.9), (1.0, 1.0)])
def test_each_sample_is_what_it_would_be_if_drawn_by_itself(
    engine: TransformersEngine, folder: str, temperature: float, top_p: float
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    options: dict[str, Any] = {"max_tokens": 16, "temperature": temperature, "top_p": top_p, "seed": 11}
    prompt = prompt_format.encode_code(engine.tokenizer, PROMPT)
    for number, sample in enumerate(samples(engine, n=12, **options)):
        assert list(sample.ids) == draw_apart(model, prompt, number, options)


@pytest.mark.parametrize("temperature", [0.2, 0.4])
def test_pairs_of_tokens_follow_the_models_own_distribution(
    engine: TransformersEngine, folder: str, temperature: float
) -> None:
    """Chi-square over the first two tokens, whose joint probabilities come from plain forward passes."""
    draws = 4000
    pairs = Counter(
        (*sample.ids, 0, 0)[:2] for sample in samples(engine, n=draws, max_tokens=2, temperature=temperature, seed=5)
    )
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = prompt_format.encode_code(engine.tokenizer, PROMPT)

    def probabilities(ids: list[list[int]]) -> np.ndarray:
        with torch.no_grad():
            return torch.softmax(model(torch.tensor(ids)).logits[:, -1].double() / temperature, dim=-1).numpy()

    first = probabilities([prompt])[0]
    second = probabilities([[*prompt, token] for token in range(len(first))])
    second[0] = np.eye(len(first))[0]  # nothing follows an end of text
    expected = {(a, b): draws * first[a] * second[a][b] for a, b in product(range(len(first)), repeat=2)}
    common = [pair for pair, count in expected.items() if count >= 5]
    seen = [pairs[pair] for pair in common]
    wanted = [expected[pair] for pair in common]
    seen, wanted = [*seen, draws - sum(seen)], [*wanted, draws - sum(wanted)]
    assert len(seen) > 10
    assert chisquare(seen, wanted).pvalue > 0.001


def test_samples_that_begin_alike_share_their_forward_passes(engine: TransformersEngine) -> None:
    def rows(n: int) -> int:
        before = engine.counted.forward_rows
        assert len(samples(engine, n=n, max_tokens=20, temperature=0.0)) == n
        return engine.counted.forward_rows - before

    rows(1)
    assert rows(50) == rows(1) == 20  # one token of the prompt, which is kept, and 19 drawn


def test_branches_that_went_apart_attend_by_groups_and_draw_the_same(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"n": 21, "max_tokens": 24, "temperature": 1.2, "seed": 3, "logprobs": 0}
    together = samples(engine, **options)
    looks: list[int] = []
    apart = packed_attention._apart

    def noted(*given: Any) -> Iterator[packed_attention.Look]:
        found = list(apart(*given))
        looks.append(len(found))
        yield from found

    monkeypatch.setattr(packed_attention, "_MANY_SEEN", 1)
    monkeypatch.setattr(packed_attention, "_TOGETHER", 4)
    monkeypatch.setattr(packed_attention, "_apart", noted)
    found = samples(engine, **options)
    assert max(looks) > 4  # of up to 21 branches
    assert [one.ids for one in found] == [one.ids for one in together]
    for one, other in zip(found, together, strict=True):
        assert one.mean_logprob == pytest.approx(other.mean_logprob, abs=1e-5)


def test_the_first_samples_are_those_of_fewer(engine: TransformersEngine) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0.8, "seed": 3}
    many, few = samples(engine, n=40, **options), samples(engine, n=7, **options)
    assert [sample.ids for sample in many[:7]] == [sample.ids for sample in few]


def test_streams_may_be_used_again_as_the_released_code_does(engine: TransformersEngine) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "seed": 3}
    again, fresh = samples(engine, n=7, streams=3, **options), samples(engine, n=3, **options)
    assert [sample.ids for sample in again] == [fresh[place % 3].ids for place in range(7)]


@pytest.mark.parametrize("start", ["", " "])
def test_logprobs_are_those_of_a_full_forward_pass_and_their_tokens_spell_the_text(
    engine: TransformersEngine, folder: str, start: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = prompt_format.encode_code(engine.tokenizer, PROMPT)
    for sample in samples(engine, n=4, max_tokens=10, temperature=1.0, logprobs=3, start=start):
        told = sample.logprobs
        assert told is not None
        with torch.no_grad():
            rows = torch.log_softmax(model(torch.tensor([[*prompt, *sample.ids]])).logits[0], -1)[len(prompt) - 1 :]
        count = len(told.tokens)
        free = len(start)  # the first token is drawn among those that begin with the blank
        expected = [float(rows[place, token]) for place, token in enumerate(sample.ids[:count])]
        assert list(told.token_logprobs)[free:] == pytest.approx(expected[free:], abs=1e-4)
        spelled = prompt_format.decode_sketch(engine.tokenizer, sample.ids).text
        assert "".join(told.tokens) == drop_start(spelled, start)
        assert list(told.text_offset) == [len("".join(told.tokens[:place])) for place in range(count)]
        for place, top in enumerate(told.top_logprobs[free:], free):
            assert top is not None
            if told.tokens[place] != "\N{REPLACEMENT CHARACTER}":  # any token of no whole character is called so
                assert max(top.values()) == pytest.approx(float(rows[place].max()), abs=1e-4)
            assert len(top) <= 4


def test_code_is_drawn_without_placeholders(engine: TransformersEngine) -> None:
    markers = set(prompt_format.marker_ids(engine.tokenizer))
    options: dict[str, Any] = {"n": 40, "max_tokens": 20, "temperature": 1.0, "seed": 5}
    assert any(markers & set(sample.ids) for sample in samples(engine, **options)), "this model writes them"
    assert not any(markers & set(sample.ids) for sample in samples(engine, code_only=True, **options))


@pytest.mark.parametrize("max_tokens", [1, 6])
def test_blanks_that_an_answer_must_begin_with_are_no_tokens_of_it(engine: TransformersEngine, max_tokens: int) -> None:
    start = "\n" * 9
    work = Work(
        tuple(prompt_format.encode_code(engine.tokenizer, PROMPT)),
        n=8,
        max_tokens=max_tokens,
        logprobs=0,
        start=start,
    )
    drawn = engine.draw(work)
    counted = []
    for sample in drawn.samples:
        assert sample is not None
        assert sample.logprobs is not None
        texts = [engine.tokenizer.decode(list(sample.ids[: place + 1])) for place in range(len(sample.ids))]
        counted.append(sum(not start.startswith(text) for text in texts))
        assert sample.tokens == counted[-1] >= len(sample.logprobs.tokens)
        spelled = prompt_format.decode_sketch(engine.tokenizer, sample.ids).text
        assert "".join(sample.logprobs.tokens) == drop_start(spelled, start)
        if sample.finish_reason == "length":
            assert counted[-1] == max_tokens
    assert any(sample.finish_reason == "length" for sample in drawn.samples if sample)
    assert drawn.tokens == sum(counted)


def test_a_prompt_is_scored(engine: TransformersEngine, folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = prompt_format.encode_code(engine.tokenizer, PROMPT)
    drawn = engine.draw(Work(tuple(prompt), max_tokens=0, logprobs=0, score_prompt=True))
    assert drawn.prompt_logprobs is not None
    assert [sample.text if sample else None for sample in drawn.samples] == [""]
    with torch.no_grad():
        rows = torch.log_softmax(model(torch.tensor([prompt])).logits[0], -1)
    expected = [float(rows[place, token]) for place, token in enumerate(prompt[1:])]
    assert drawn.prompt_logprobs.token_logprobs[0] is None
    assert list(drawn.prompt_logprobs.token_logprobs[1:]) == pytest.approx(expected, abs=1e-4)
    assert "".join(drawn.prompt_logprobs.tokens) == PROMPT


def test_a_templates_share_is_of_what_could_come_without_it() -> None:
    """A model that gives nearly all to a placeholder, which code has none of, wants the sketch nevertheless."""
    tokenizer = small_tokenizer()
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    held = Template(("ab", ")"), ("number",), 0.4)
    asked = Work((1,), max_tokens=9, code_only=True, template=held)
    course = Courses(tokenizer, size, frozenset({0})).begin(held)
    samples = JointSamples(asked, 64, tokenizer, frozenset({0}), FirstTokens(tokenizer, size), course)
    samples.start_drawing()
    logits_BV = torch.full((1, size), -100.0)
    logits_BV[0, prompt_format.marker_ids(tokenizer)[0]] = 20.0
    wanted = int((~course.refused).nonzero()[0, 0])
    other = int(course.refused.nonzero()[-1, 0])
    logits_BV[0, [wanted, other]] = 1.0  # one half each, the placeholder apart
    samples.restrict(logits_BV, log_totals(logits_BV))
    assert samples.drawing[0].branch.course is not None
    assert logits_BV[0, other] == float("-inf")


def test_guesses_that_were_not_drawn_are_made_no_more_than_costs_little() -> None:
    """Rows of many branches for what nobody draws are half of a step."""
    tokenizer = small_tokenizer()
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    asked = Work((1,), max_tokens=30, draft=tuple(range(20, 40)))
    samples = JointSamples(asked, 64, tokenizer, frozenset({0}), FirstTokens(tokenizer, size), draft_tokens=6)
    assert samples.guess(50, idle=0) == 6  # nothing is known of it yet
    samples.drafted, samples.accepted = 10, 5
    assert samples.guess(50, idle=0) == 6
    samples.drafted, samples.accepted = 10, 4
    assert [samples.guess(50, idle) for idle in (0, 4, 9)] == [0, 4, 6]
    assert samples.guess(3, idle=9) == 3
    assert samples.guess(-5, idle=0) == 0  # a request begins as one row, so there may be more rows than a batch has
    assert not any(branch.draft for branch in samples.branches)


def metaspace_tokenizer() -> Tokenizer:
    """One whose decoder drops the first token's leading space, as Llama 2's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "is_sketch"),
    [(small_tokenizer(), False), (small_tokenizer(), True), (metaspace_tokenizer(), False)],
    ids=["bytes", "sketches", "spaces"],
)
@hypothesis.given(data=st.data(), start=st.sampled_from(["", "\n  ", " x"]))
def test_tokens_are_told_as_the_text_grows_by_them(
    tokenizer: Tokenizer, is_sketch: bool, data: st.DataObject, start: str
) -> None:
    """Held against decoding every beginning: halves of characters, bytes that spell none, special tokens."""
    drawn = st.integers(0, tokenizer.get_vocab_size() - 1)
    spelled = st.text("ab é\N{REPLACEMENT CHARACTER}\N{SNAKE}\n").map(lambda text: tokenizer.encode(text).ids)
    ids = sum(data.draw(st.lists(st.lists(drawn, max_size=5) | spelled, max_size=6)), tokenizer.encode(start).ids)[:60]
    told = tell_logprobs(tokenizer, ids, [-0.5] * len(ids), [()] * len(ids), start, 1 << 62, is_sketch=is_sketch)
    texts = []
    for count in range(len(ids) + 1):
        text = prompt_format.decode_code(tokenizer, ids[:count])
        if is_sketch:
            text = prompt_format.decode_sketch(tokenizer, ids[:count]).text
        texts.append(drop_start(text if count == len(ids) else text.rstrip("\N{REPLACEMENT CHARACTER}"), start))
    if text.startswith(start):
        assert told.text_offset == tuple(map(len, texts[:-1]))
        assert told.tokens == tuple(after[len(before) :] for before, after in itertools.pairwise(texts))
    assert "".join(told.tokens) == texts[-1]


def test_tokens_of_a_long_text_are_told_at_the_price_of_reading_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding every beginning of 8,000 tokens took 13 s, in which nobody else's tokens were drawn."""
    tokenizer, decoded, decode = small_tokenizer(), [], prompt_format.decode_code
    monkeypatch.setattr(prompt_format, "decode_code", lambda one, ids: decoded.append(len(ids)) or decode(one, ids))
    for text in ("x = df['a']\n" * 200, "\N{REPLACEMENT CHARACTER}" * 700):
        ids, before = tokenizer.encode(text).ids, sum(decoded)
        told = tell_logprobs(tokenizer, ids, [-0.5] * len(ids), [()] * len(ids), "", 1 << 62)
        assert sum(decoded) - before <= 200 * len(ids)
        assert "".join(told.tokens) == text


def test_tokens_of_a_sketch_spell_it_with_the_words_of_its_placeholders() -> None:
    tokenizer = small_tokenizer()
    number, ends = tokenizer.token_to_id("<|number|>"), tokenizer.encode(" )").ids
    ids = [*tokenizer.encode(" f(").ids, number, *ends, number]
    work = Work((1,), max_tokens=99, start=" ", stop=("STOP",), logprobs=1)
    drawn = JointSamples(work, 512, tokenizer, frozenset({0}), FirstTokens(tokenizer, tokenizer.get_vocab_size()))
    branch = drawn.branches.pop()
    for token in ids:
        branch = drawn.grow(branch, token, branch.samples, -0.5, ((number, -0.25),))
    drawn.end(branch, ended=True)
    ((sample, _),) = drawn.ended
    read = read_sketch(tokenizer, sample, " ", ("STOP",))
    assert sample.logprobs is not None
    assert "".join(sample.logprobs.tokens) == read.completion.text == "f(number )number"
    told = zip(ids[sample.blank_tokens :], sample.logprobs.text_offset, strict=True)
    assert [offset for token, offset in told if token == number] == [2, 10]
    assert sample.logprobs.top_logprobs[0] == {sample.logprobs.tokens[0]: -0.5, "number": -0.25}
