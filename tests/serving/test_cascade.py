"""The cascade of PAPER.md, over engines that say what they are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from cert_ray.errors import RequestError
from cert_ray.serving.cascade import CascadeAnswer, CascadeConfig, Route, run_cascade, run_single
from cert_ray.serving.sampling import Sampling
from tests.serving.builders import ScriptedEngine, small_tokenizer

TOKENIZER = small_tokenizer()
CONTEXT = "import pandas as pd\ndf = pd.DataFrame([1])\nx ="

Script = Sequence[tuple[str, float] | str]


def engine(script: Script, **options: Any) -> ScriptedEngine:
    samples = [entry if isinstance(entry, tuple) else (entry, -1.0) for entry in script]
    return ScriptedEngine(TOKENIZER, lambda _: samples, **options)


def cascade(
    drawn: Script, answers: Script = (" df.head(5)",), context: str = CONTEXT, n: int | None = None, **config: Any
) -> tuple[CascadeAnswer, ScriptedEngine, ScriptedEngine]:
    sketcher, generator = engine(drawn), engine(answers)
    sampling = Sampling(n=n or len(drawn), max_tokens=20)
    answer = run_cascade(context, sampling, sketcher, generator, CascadeConfig(**config))
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
    """The released code looked for `float` and `string` as substrings (PAPER.md)."""
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
    answer, sketcher, generator = cascade(["    return df[<|string|>]"], ["return df['a']"], context=context)
    assert sketcher.prompts == ["def <|func|>(df):\n"]
    assert sketcher.requests[0].start == "    "
    assert answer.sketch == "return df[string]"
    assert generator.prompts[0].endswith("def f(df):\n")
    assert generator.requests[0].start == "    "


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
