"""The vote, against counting everything."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cert_ray.serving.engines import Completion
from cert_ray.serving.voting import Ballot, Sketch, read_beginning, read_sketch
from cert_ray.sketching import Placeholder, prompt_format
from tests.serving.builders import small_tokenizer


def sketch(name: str, mean_logprob: float = -1.0) -> Sketch:
    return Sketch(name, (), Completion((), name, "stop", mean_logprob))


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_once_decided_nothing_changes_the_winner(names: list[str]) -> None:
    ballot, decided = Ballot(len(names)), None
    for place, name in enumerate(names):
        ballot.add(sketch(name))
        if decided is None and ballot.is_decided_for(()):
            decided = ballot.winner.text
            # It was not decided before: the best other sketch could still have drawn level.
            before = Counter(names[:place])
            rival = max((count for other, count in before.items() if other != decided), default=0)
            assert before[decided] <= rival + len(names) - place
    most = Counter(names).most_common()
    if decided is not None:
        assert most[0] == (decided, Counter(names)[decided])
    else:
        assert len(most) > 1
        assert most[0][1] == most[1][1]


@given(st.lists(st.tuples(st.text("ab", max_size=4), st.integers(0, 4)), min_size=1, max_size=9))
def test_what_samples_begin_with_decides_no_vote_too_soon_and_none_too_late(drawn: list[tuple[str, int]]) -> None:
    """Of each sample so many letters are known; it has ended where that is more than there are."""
    ended = [name for name, known in drawn if known >= len(name)]
    begun = [name[:known] for name, known in drawn if known < len(name)]
    ballot = Ballot(len(drawn))
    for name in ended:
        ballot.add(sketch(name))
    decided = ballot.is_decided_for([(start, 1) for start in begun])
    if not ended:
        assert not decided
        return
    winner, votes = ballot.winner.text, Counter(ended)
    # Brute force: any sketch at all, two letters longer than what is known, may get all that begin as it does.
    names = {start + end for start in begun for end in ("", "a", "b", "aa")} | set(ended)
    rivals = [votes[name] + sum(name.startswith(start) for start in begun) for name in names if name != winner]
    assert decided == (votes[winner] > max(rivals, default=0))
    assert ballot.may_be_decided([1] * len(begun)) or not decided
    if decided:
        everything = Counter(name for name, _ in drawn)
        assert all(everything[winner] > count for name, count in everything.items() if name != winner)


def test_samples_of_which_nothing_is_known_may_become_any_sketch() -> None:
    ballot = Ballot(10)
    ballot.add(sketch("a"), 4)
    assert not ballot.is_decided_for([("b", 3)])
    assert not ballot.is_decided_for([("a", 3), ("b", 2)])
    assert ballot.is_decided_for([("b", 3), ("c", 3)])
    assert ballot.is_decided_for([("aa", 3), ("ab", 3)])
    assert not ballot.is_decided_for([("aa", 3), ("", 3)])


def test_a_sketch_begins_with_what_was_read_of_its_first_tokens() -> None:
    tokenizer = small_tokenizer()
    stops = ("\ndef", "\n#")
    for text in ("  df.head(<|number|>)\n  return <|string|>", "  x = 'é☃'\n#", "  a\n\ndef f", " ", "b \n"):
        tokenizer.encode_special_tokens = False
        ids = tuple(tokenizer.encode(text, add_special_tokens=False).ids)
        whole = read_sketch(
            tokenizer, Completion(ids, prompt_format.decode_code(tokenizer, ids), "stop", -1.0), "  ", stops
        )
        for known in range(len(ids)):
            assert whole.text.startswith(read_beginning(tokenizer, ids[:known], "  ", stops))


def test_a_stop_string_cuts_no_placeholder() -> None:
    """As while a sample is drawn: its word is one token, and neither it nor what it joins is code that stops."""
    tokenizer = small_tokenizer()
    tokenizer.encode_special_tokens = False
    text = "  x = <|string|>+ring(<|number|>)"
    ids = tuple(tokenizer.encode(text, add_special_tokens=False).ids)
    sample = Completion(ids, prompt_format.decode_code(tokenizer, ids), "stop", -1.0)
    whole = "x = string+ring(number)"
    for stops, shown, places in (
        (("tri", "= s", "g+", "(n", "string"), whole, 2),
        (("ring",), "x = string+", 1),
        (("num", ")"), "x = string+ring(number", 2),
    ):
        read = read_sketch(tokenizer, sample, "  ", stops)
        assert (read.text, len(read.placeholders)) == (shown, places)
        assert [read.text[place.start : place.end] for place in read.placeholders] == ["string", "number"][:places]
        for known in range(len(ids) + 1):
            assert shown.startswith(read_beginning(tokenizer, ids[:known], "  ", stops))
    assert (
        read_beginning(tokenizer, ids[: ids.index(tokenizer.token_to_id("<|string|>")) + 1], "  ", ("gx",))
        == "x = string"
    )


def test_equals_go_to_the_likeliest_by_its_best_sample() -> None:
    ballot = Ballot(4)
    for name, mean_logprob in (("a", -0.5), ("b", -0.9), ("a", -0.4), ("b", -0.3)):
        ballot.add(sketch(name, mean_logprob))
    assert not ballot.is_decided_for(())
    assert ballot.winner.text == "b"


def test_samples_that_agree_count_at_once() -> None:
    ballot = Ballot(10)
    ballot.add(sketch("a"), 4)
    ballot.add(sketch("b"), 1)
    assert not ballot.is_decided_for(())
    ballot.add(sketch("a"), 2)
    assert ballot.is_decided_for(())
    told = ballot.result()
    assert (told.votes, told.sketches, told.undecided, told.vote_share) == (6, 10, 3, 6 / 10)
    assert [sample.text for sample in ballot.samples(8)] == ["a"] * 6 + ["b", "a"]


def test_beside_a_winner_that_is_code_only_code_is_given() -> None:
    ballot = Ballot(9)
    for name in ("x", "b", "", "a", "x", "a", "x", "a"):
        ballot.add(replace(sketch(name), placeholders=(Placeholder(0, 1, "number"),) if name == "x" else ()))
    assert ballot.winner.text == "x"
    ballot.add(sketch("a"))
    assert [sample.text for sample in ballot.samples(7, code_only=True)] == ["a"] * 4 + ["b"] + ["a"] * 2
    assert [sample.text for sample in ballot.samples(11)] == [*"aaaaxb", "", *"xxaa"]
