"""The cascade of the paper, over engines that say what they are told."""

from __future__ import annotations

import gzip
import io
import json
import tokenize
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cert_ray.errors import RequestError
from cert_ray.schemas import Dropped
from cert_ray.serving import drafts
from cert_ray.serving.answers import CascadeAnswer, Listener, Route
from cert_ray.serving.cascade import run_cascade
from cert_ray.serving.cascade_config import CascadeConfig
from cert_ray.serving.constraints import Template
from cert_ray.serving.contexts import sketch_context
from cert_ray.serving.engines import DEFAULT_HOOKS, Completion, Drawn, Hooks, Work
from cert_ray.serving.events import Event, SketchChosen, TextDrawn
from cert_ray.serving.sampling import Mode, Sampling
from cert_ray.serving.single import run_single
from cert_ray.sketching import Sketched, SketchKind, prompt_format, sketch_source
from tests.serving.builders import ScriptedEngine, small_tokenizer

TOKENIZER = small_tokenizer()
CONTEXT = "import pandas as pd\ndf = pd.DataFrame([1])\nx ="

Script = Sequence[tuple[str, float] | str]


def engine(script: Script, **options: Any) -> ScriptedEngine:
    samples = [entry if isinstance(entry, tuple) else (entry, -1.0) for entry in script]
    return ScriptedEngine(TOKENIZER, lambda _: samples, **options)


def asking(n: int = 1, **options: Any) -> Sampling:
    return Sampling(n=n, max_tokens=20, **options)


def cascade(
    drawn: Script, answers: Script = (" df.head(5)",), context: str = CONTEXT, n: int | None = None, **config: Any
) -> tuple[CascadeAnswer, ScriptedEngine, ScriptedEngine]:
    sketcher, generator = engine(drawn), engine(answers)
    answer = run_cascade(context, asking(n or len(drawn)), sketcher, generator, CascadeConfig(**config))
    return answer, sketcher, generator


def texts(answer: CascadeAnswer) -> list[str]:
    return [choice.text for choice in answer.choices]


def test_the_most_frequent_sketch_wins() -> None:
    answer, _, generator = cascade([" a(<|number|>)", " b(<|number|>)", " b(<|number|>)", " c(<|string|>)"])
    assert (answer.sketch, answer.sketch_votes, answer.vote_share) == (" b(number)", 2, 0.5)
    assert answer.route is Route.GENERATOR
    assert texts(answer) == [" df.head(5)"] * 4
    assert generator.prompts == [f" b(<|number|>)\n<|segmentation|>\n{CONTEXT}"]


def test_ties_go_to_the_likelier_sketch() -> None:
    for order in (1, -1):
        script = [
            (" a(<|number|>)", -0.5),
            (" b(<|number|>)", -0.2),
            (" a(<|number|>)", -0.4),
            (" b(<|number|>)", -0.9),
        ]
        assert cascade(script[::order])[0].sketch == " b(number)"


def test_a_placeholder_and_the_word_that_spells_it_are_different_sketches() -> None:
    answer, _, generator = cascade([" f(number)", " f(<|number|>)", " f(<|number|>)"])
    assert answer.sketch_votes == 2
    assert generator.prompts[0].startswith(" f(<|number|>)\n")


@pytest.mark.parametrize(
    "code",
    [" df.astype(float)", " df.to_string()", " number + string", " x.AnClass.func(floatexponant)", " '<|number|>'"],
)
def test_words_of_code_never_route_to_the_generator(code: str) -> None:
    """The released code looked for `float` and `string` as substrings."""
    plain = code.replace("<|number|>", "<number>")
    answer, _, generator = cascade([plain])
    assert answer.route is Route.SKETCHER
    assert texts(answer) == [plain]
    assert generator.prompts == []


def test_a_sketch_without_placeholders_returns_the_samples_the_winners_first() -> None:
    answer, _, generator = cascade([" df.tail()", " df.head()", " df.head()"])
    assert answer.route is Route.SKETCHER
    assert texts(answer) == [" df.head()", " df.head()", " df.tail()"]
    assert generator.prompts == []


UNLIKE = [" df.head()", " df.head(<|number|>)", " df.head()", " df.tail()", " df.head()", "\n# <|number|>"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_unfilled_placeholder_is_no_answer(stream: bool) -> None:
    told: list[Event] = []
    sketcher = engine(UNLIKE)
    listener = Listener(tell=told.append if stream else None)
    answer = run_cascade(CONTEXT, asking(6), sketcher, engine([]), listener=listener)
    assert answer.route is Route.SKETCHER
    assert texts(answer) == [" df.head()"] * 3 + [" df.tail()"] + [" df.head()"] * 2
    assert len(sketcher.prompts) == 1  # nothing is drawn again
    drawn = [event.text for event in told if isinstance(event, TextDrawn)]
    assert drawn == (texts(answer) if stream else [])


def test_the_released_way_and_sketch_only_give_all_samples() -> None:
    given = [" df.head()"] * 3 + [" df.head(number)", " df.tail()", ""]
    assert texts(cascade(UNLIKE, routing="released")[0]) == given
    assert texts(cascade(UNLIKE, mode=Mode.SKETCH_ONLY)[0]) == given


def test_the_sketcher_sees_the_sketch_of_the_context_and_the_generator_the_context() -> None:
    _, sketcher, generator = cascade([" df + <|number|>"])
    assert sketcher.prompts == ["import pandas as pd\ndf = pd.DataFrame([<|number|>])\nx ="]
    assert generator.prompts == [f" df + <|number|>\n<|segmentation|>\n{CONTEXT}"]


def test_the_sketch_of_the_context_may_stand_before_the_predicted_one() -> None:
    _, sketcher, generator = cascade(["df + <|number|>"], context=CONTEXT + " ", sketch_scope="file")
    assert generator.prompts == [f"{sketcher.prompts[0]} df + <|number|>\n<|segmentation|>\n{CONTEXT}"]


@pytest.mark.parametrize("empty", ["", "\n", "\ndef f(): pass", "\n# <|number|>"])
def test_an_empty_sketch_gives_the_generator_the_context_alone(empty: str) -> None:
    answer, _, generator = cascade([empty])
    assert answer.route is Route.GENERATOR_EMPTY_SKETCH
    assert answer.sketch == ""
    assert generator.prompts == [CONTEXT]
    assert texts(answer) == [" df.head(5)"]


def test_empty_completions_of_the_generator_give_way_to_the_sketches() -> None:
    answer, _, generator = cascade([" df.head(<|number|>)\n# more"] * 2, ["", "\nprint(x)"])
    assert answer.route is Route.SKETCHER_EMPTY_GENERATOR
    assert texts(answer) == [" df.head(number)"] * 2
    assert len(generator.prompts) == 1


def test_sketches_that_give_way_to_nothing_are_then_all_drawn() -> None:
    answer, sketcher, _ = cascade([" a(<|number|>)"] * 3 + [" b(<|number|>)", " c(<|number|>)"], [""])
    assert answer.route is Route.SKETCHER_EMPTY_GENERATOR
    assert sketcher.left_undrawn == 2  # of the vote
    assert texts(answer) == [" a(number)"] * 3 + [" b(number)", " c(number)"]
    answer, sketcher, _ = cascade([" a(<|number|>)"] * 3 + [" b(<|number|>)"] * 2, [""], n=3, sketches=5)
    assert len(sketcher.prompts) == 1  # the winner's own are enough
    assert texts(answer) == [" a(number)"] * 3


def test_one_completion_that_is_not_empty_is_enough() -> None:
    answer, *_ = cascade([" df.head(<|number|>)"] * 2, ["", " df"])
    assert answer.route is Route.GENERATOR


def test_both_stages_are_cut_at_the_papers_stops_and_at_the_requests() -> None:
    sketcher, generator = engine([" a(<|number|>)\nclass B"]), engine([" a(1)"])
    answer = run_cascade(CONTEXT, Sampling(stop=("STOP",)), sketcher, generator)
    assert answer.sketch == " a(number)"
    for request in (sketcher.requests[0], generator.requests[0]):
        assert {"\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "STOP"} <= set(request.stop)


def test_placeholders_behind_the_cut_do_not_count() -> None:
    answer, _, generator = cascade([" df.head()\n# x = <|number|>"])
    assert answer.route is Route.SKETCHER
    assert generator.prompts == []


def test_blanks_at_the_end_of_the_context_are_asked_for_and_taken_off() -> None:
    context = "def f(df):\n    "
    answer, sketcher, generator = cascade(["\n    return df[<|string|>]"], ["return df['a']"], context=context)
    assert sketcher.prompts == ["def <|func|>(df):"]
    assert sketcher.requests[0].start == "\n    "
    assert answer.sketch == "return df[string]"
    assert generator.prompts[0].endswith("def f(df):")
    assert generator.requests[0].start == "\n    "


def test_documentation_that_the_sketchers_window_cannot_hold_is_left_out() -> None:
    sketcher, generator = engine([" f()"], context_tokens=64), engine([" f()"], context_tokens=512)
    ahead = "# documentation words\n" * 12
    answer = run_cascade("x = df", Sampling(max_tokens=8), sketcher, generator, ahead=ahead)
    assert sketcher.prompts == ["x = df"]
    assert texts(answer) == [" f()"]


def test_a_sketch_too_long_for_the_window_leaves_the_context_alone() -> None:
    sketcher, generator = engine([" f(<|number|>)" * 8]), engine([" f(1)"], context_tokens=60)
    answer = run_cascade(CONTEXT, Sampling(max_tokens=8), sketcher, generator)
    assert answer.route is Route.GENERATOR_LONG_SKETCH
    assert generator.prompts == [CONTEXT]


def test_a_context_too_long_for_the_window_is_refused_before_sketching() -> None:
    sketcher = engine([" f()"])
    with pytest.raises(RequestError, match="60 tokens"):
        run_cascade("x = " + "1 + " * 100, Sampling(), sketcher, engine([""], context_tokens=60))
    assert sketcher.prompts == []


def test_fewer_or_more_sketches_than_answers() -> None:
    answer, sketcher, _ = cascade([" a()", " b()", " b()"], n=2, sketches=3)
    assert sketcher.requests[0].n == 3
    assert texts(answer) == [" b()", " b()"]
    answer, *_ = cascade([" a()"], n=3, sketches=1)
    assert texts(answer) == [" a()"] * 3


def test_an_empty_context_is_answered() -> None:
    answer, *_ = cascade([" a(<|number|>)"], context="")
    assert answer.route is Route.GENERATOR


def test_a_single_model_is_given_the_context_as_it_is() -> None:
    model = engine([" df\nprint(df)"])
    answer = run_single(CONTEXT, Sampling(stop=("\n#",)), model)
    assert answer.route is Route.MODEL
    assert answer.sketch is None
    assert model.prompts == [CONTEXT]
    assert texts(answer) == [" df\nprint(df)"]
    assert model.requests[0].stop == ("\n#",)


def test_text_that_spells_a_special_token_is_text() -> None:
    """A user who writes `<|endoftext|>` in a prompt does not end the text."""
    model = engine([" x"])
    run_single("x = '<|endoftext|>'", Sampling(), model)
    ids = TOKENIZER.encode(model.prompts[0], add_special_tokens=False).ids
    assert TOKENIZER.token_to_id("<|endoftext|>") in ids  # so the text was shown whole, and below it was not one token
    TOKENIZER.encode_special_tokens = True
    assert len(TOKENIZER.encode(model.prompts[0], add_special_tokens=False).ids) > len(ids)


def test_the_vote_ends_when_no_other_sketch_can_win() -> None:
    answer, sketcher, _ = cascade([" a(<|number|>)"] * 3 + [" b(<|number|>)"] * 2)
    assert answer.route is Route.GENERATOR
    assert answer.chosen is not None
    assert sketcher.left_undrawn == answer.chosen.undecided == 2
    assert (answer.sketch_votes, answer.vote_share, answer.chosen.sketches) == (3, 3 / 5, 5)
    assert len(answer.choices) == 5


class Asking(ScriptedEngine):
    """Draws a sketch for two samples, says how three others begin, and whether that was enough."""

    told: tuple[str, ...] = ()
    was_enough: bool | None = None

    def draw(self, work: Work, hooks: Hooks = DEFAULT_HOOKS) -> Drawn:
        ended = self._completion(" a(<|number|>)", -1.0, work)
        begun = [(tuple(prompt_format.encode_code(self.tokenizer, text)), 1) for text in self.told]
        assert hooks.enough is not None
        self.was_enough = hooks.enough([(ended, 2)], begun)
        return Drawn((ended, ended, None, None, None), 0)


@pytest.mark.parametrize(
    ("begun", "enough"),
    [((" b", " c", " d"), True), ((" b", " a", " ab"), False), ((" b", " b", " c"), False), ((" b", " c"), False)],
)
def test_the_vote_ends_when_the_others_cannot_agree_any_more(begun: tuple[str, ...], enough: bool) -> None:
    sketcher = Asking(TOKENIZER, lambda _: [])
    sketcher.told = begun
    answer = run_cascade(CONTEXT, asking(5), sketcher, engine([" df.head(5)"]))
    assert sketcher.was_enough == enough
    assert answer.chosen is not None
    assert (answer.sketch_votes, answer.chosen.undecided) == (2, 3)


def test_sketches_that_are_the_answers_are_all_drawn() -> None:
    answer, sketcher, _ = cascade([" a()"] * 3 + [" b()"] * 2)
    assert sketcher.left_undrawn == 0
    assert texts(answer) == [" a()"] * 3 + [" b()"] * 2
    answer, sketcher, _ = cascade([" a()"] * 3 + [" b()"] * 2, n=2, sketches=5)  # here two of the winner's are enough
    assert sketcher.left_undrawn == 2
    assert texts(answer) == [" a()"] * 2


def test_the_whole_vote_is_told() -> None:
    answer, *_ = cascade([(" a(<|number|>)", -0.5), (" b()", -0.1), (" a(<|number|>)", -0.2), (" c()", -0.3)])
    assert answer.chosen is not None
    told = [(candidate.text, candidate.votes, candidate.mean_logprob) for candidate in answer.chosen.candidates]
    assert told == [(" a(number)", 2, -0.2), (" b()", 1, -0.1), (" c()", 1, -0.3)]
    assert [(span.start, span.end, span.kind) for span in answer.chosen.placeholders] == [(3, 9, "number")]


def events(mode: Mode | None, drawn: Script, answers: Script, **options: Any) -> tuple[CascadeAnswer, list[Event]]:
    told: list[Event] = []
    config = CascadeConfig(**{name: options.pop(name) for name in ("rank",) if name in options})
    sampling = asking(len(drawn), mode=mode, **options)
    listener = Listener(tell=told.append)
    return run_cascade(CONTEXT, sampling, engine(drawn), engine(answers), config, listener), told


@pytest.mark.parametrize(
    ("drawn", "answers"),
    [
        ([" a(<|number|>)"] * 2, [" df.head(5)", " df.head(6)"]),
        ([" a()", " b()"], ["never"]),
        ([" a(<|number|>)"] * 2, ["  ", "\n"]),  # empty answers: what was said of them must not be told
    ],
)
@pytest.mark.parametrize("rank", ["drawn", "likelihood"])
@pytest.mark.parametrize("mode", [None, Mode.SKETCH_ONLY, Mode.GENERATOR_ONLY])
def test_what_is_told_of_each_choice_is_its_text(drawn: Script, answers: Script, rank: str, mode: Mode | None) -> None:
    answer, told = events(mode, drawn, answers, rank=rank)
    sketches = [event for event in told if isinstance(event, SketchChosen)]
    assert sketches == ([] if mode is Mode.GENERATOR_ONLY else [answer.chosen])
    assert not sketches or told[0] is sketches[0]
    for index, choice in enumerate(answer.choices):
        pieces = [event for event in told if isinstance(event, TextDrawn) and event.index == index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert [piece.finish_reason for piece in pieces][-1] == choice.finish_reason
        assert sum(piece.finish_reason is not None for piece in pieces) == 1


def test_the_likeliest_of_best_of_are_given() -> None:
    script = [(" a", -0.9), (" b", -0.1), (" c", -0.5)]
    answer, told = events(Mode.GENERATOR_ONLY, [" x"], script, best_of=3)
    assert texts(answer) == [" b"]
    assert [event.text for event in told if isinstance(event, TextDrawn)] == [" b"]
    answer, *_ = cascade([" x(<|number|>)"] * 3, script, rank="likelihood")
    assert texts(answer) == [" b", " c", " a"]


def test_behind_the_sketch_that_won_the_likeliest_come_first() -> None:
    voted = [(" c()", -3.0), (" a()", -2.0), (" b()", -0.1), (" a()", -2.0)]
    assert texts(cascade(voted)[0]) == [" a()", " a()", " c()", " b()"]
    assert texts(cascade(voted, rank="likelihood")[0]) == [" a()", " a()", " b()", " c()"]
    for n, given in ((1, [" a()"]), (3, [" a()", " a()", " b()"])):
        answer = run_cascade(CONTEXT, asking(n, best_of=4), engine(voted), engine([]))
        assert (answer.route, texts(answer)) == (Route.SKETCHER, given)


def test_the_generator_alone_sees_the_context_and_the_sketcher_nothing() -> None:
    sketcher, generator = engine([" a()"]), engine([" df\n\n\nx"])
    answer = run_cascade(CONTEXT, asking(mode=Mode.GENERATOR_ONLY), sketcher, generator)
    assert (answer.route, answer.sketch, texts(answer)) == (Route.GENERATOR_ONLY, None, [" df"])
    assert (sketcher.prompts, generator.prompts) == ([], [CONTEXT])


@pytest.mark.parametrize("by", ["request", "operator"])
def test_the_generator_may_be_held_to_the_sketch(by: str) -> None:
    sketcher, generator = engine([" a(<|number|>, b)"] * 3), engine([" a(5, b)", " a(7, b)", " c()"])
    config = CascadeConfig(mode=Mode.CONSTRAINED if by == "operator" else Mode.CASCADE, least_share=0.25)
    asked = asking(3, mode=Mode.CONSTRAINED if by == "request" else None)
    answer = run_cascade(CONTEXT + " ", asked, sketcher, generator, config)
    assert (answer.route, answer.off_sketch) == (Route.CONSTRAINED, 1)
    assert generator.requests[0].template == Template((" a(", ", b)"), ("number",), 0.25)
    assert sketcher.left_undrawn == 1  # the vote ends early, as in a cascade


def test_a_cascade_holds_the_generator_to_nothing() -> None:
    answer, _, generator = cascade([" a(<|number|>)"])
    assert (answer.off_sketch, generator.requests[0].template) == (None, None)
    assert generator.requests[0].draft  # but expects it to go the sketch's way


class CutEngine(ScriptedEngine):
    """Its samples reach the most tokens that they may have."""

    def _completion(self, text: str, mean_logprob: float, work: Work) -> Completion:
        return replace(super()._completion(text, mean_logprob, work), finish_reason="length")


def test_a_sketch_that_was_cut_ends_no_answer() -> None:
    sketcher = CutEngine(TOKENIZER, lambda _: [(" a(<|number|>)\nb.as", -1.0)])
    generator = engine([" a(5)\nb.astype(float)", " a(5)\nb.as", " a(5)\nb"])
    answer = run_cascade(CONTEXT, asking(3, mode=Mode.CONSTRAINED), sketcher, generator)
    assert generator.requests[0].template == Template((" a(", ")\nb.as"), ("number",), 0.001, is_cut=True)
    assert answer.off_sketch == 1


def test_an_answer_is_held_to_no_more_than_the_generators_own_stops_let_it_be() -> None:
    generator = engine([" a(5)\n\n\nb(5)"])
    answer = run_cascade(
        CONTEXT, asking(mode=Mode.CONSTRAINED), engine([" a(<|number|>)\n\n\nb(<|number|>)"]), generator
    )
    assert generator.requests[0].template == Template((" a(", ")"), ("number",), 0.001)
    assert (texts(answer), answer.route, answer.off_sketch) == ([" a(5)"], Route.CONSTRAINED, 0)
    generator = engine([" b()"])
    answer = run_cascade(CONTEXT, asking(mode=Mode.CONSTRAINED), engine(["\n\n\nb(<|number|>)"]), generator)
    assert generator.requests[0].template is None  # nothing is left of it
    assert (answer.route, answer.off_sketch) == (Route.GENERATOR, None)


def test_no_draft_is_made_for_an_engine_that_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "source", None)
    generator = ScriptedEngine(TOKENIZER, lambda _: [(" a(5)", -1.0)], takes_drafts=False)
    run_cascade(CONTEXT, asking(), engine([" a(<|number|>)"]), generator)
    assert generator.requests[0].draft == ()


def test_words_of_the_released_format_hold_nothing() -> None:
    with pytest.raises(ValueError, match="released"):
        CascadeConfig(mode=Mode.CONSTRAINED, routing="released")
    with pytest.raises(RequestError, match="released"):
        run_cascade(CONTEXT, asking(mode=Mode.CONSTRAINED), engine([]), engine([]), CascadeConfig(routing="released"))


def test_sketches_alone_may_be_asked_for() -> None:
    sketcher, generator = engine([" b()", " a(<|number|>)", " a(<|number|>)"]), engine([])
    answer = run_cascade(CONTEXT, asking(3, mode=Mode.SKETCH_ONLY), sketcher, generator)
    assert (answer.route, texts(answer)) == (Route.SKETCH_ONLY, [" a(number)", " a(number)", " b()"])


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"mode": Mode.SINGLE}, "mode"),
        ({"suffix": "x"}, "suffix"),
        ({"suffix": "x", "mode": Mode.GENERATOR_ONLY}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo"),
    ],
)
def test_what_a_cascade_cannot_do_is_refused(options: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        run_cascade(CONTEXT, asking(**options), engine([" a()"]), engine([" a()"]))
    assert (refused.value.status, refused.value.param) == (400, param)


def test_a_single_model_has_no_sketcher() -> None:
    with pytest.raises(RequestError, match="sketch_only"):
        run_single(CONTEXT, asking(mode=Mode.SKETCH_ONLY), engine([" a"]))


def test_a_model_trained_for_it_fills_in_the_middle() -> None:
    names = ("string", "number", "float")  # any three special tokens will do here
    marks = tuple(TOKENIZER.token_to_id(f"<|{name}|>") for name in names)
    model = engine([" n"], infill_tokens=marks)
    run_single("def f(", asking(suffix="):\n    pass"), model)
    assert model.prompts == ["<|string|>def f(<|number|>):\n    pass<|float|>"]


def gold(folder: Path) -> list[tuple[str, str]]:
    """(prompt, gold answer) of all 202 problems."""
    problems = []
    for name in ("PandasEval", "NumpyEval"):
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            problems += [(one["prompt"], one["canonical_solution"][0]) for one in map(json.loads, lines)]
    assert len(problems) == 202
    return problems


def has_literal(prompt: str, answer: str) -> bool:
    """Whether the answer holds a literal that a sketch leaves out, by Python's own tokenizer."""
    tokens = tokenize.generate_tokens(io.StringIO(prompt + answer).readline)
    first = prompt.count("\n") + 1, len(prompt) - prompt.rfind("\n") - 1
    return any(
        token.type == tokenize.NUMBER or (token.type == tokenize.STRING and token.string[:3] not in ('"""', "'''"))
        for token in tokens
        if token.start >= first
    )


def marked(sketched: Sketched, after: int) -> str:
    """The sketch from `after` on, placeholders as their special tokens."""
    text, last = "", after
    for start, end, kind in sketched.placeholders:
        if start >= after:
            text += sketched.text[last:start] + prompt_format.special_token(kind)
            last = end
    return text + sketched.text[last:]


def test_the_gold_answers_of_both_benchmarks_are_routed_right(shared: Path) -> None:
    """The authors' way sends four wrong: `to_string`, `astype(np.float)`, `fromstring`, `dtype=float`."""
    wrong = {"special_tokens": 0, "released": 0}
    for prompt, answer in gold(shared / "benchmarks"):
        sketched = sketch_source(prompt + answer, SketchKind.CONSTANTS)
        assert not isinstance(sketched, Dropped)
        before = sketch_context(prompt)
        assert sketched.text.startswith(before.text)
        for routing in ("special_tokens", "released"):
            sketcher = engine([marked(sketched, len(before.text))], context_tokens=4096)
            config = CascadeConfig(stop=(), routing=routing)
            route = run_cascade(prompt, asking(), sketcher, engine([" x"], context_tokens=4096), config).route
            wrong[routing] += (route is not Route.SKETCHER) != has_literal(prompt, answer)
    assert wrong == {"special_tokens": 0, "released": 4}
