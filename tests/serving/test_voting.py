"""The vote, against counting everything."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cert_ray.serving.engines import Completion
from cert_ray.serving.voting import Ballot, Sketch


def sketch(name: str, mean_logprob: float = -1.0) -> Sketch:
    return Sketch(name, (), Completion((), name, "stop", mean_logprob))


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_once_decided_nothing_changes_the_winner(names: list[str]) -> None:
    ballot, decided = Ballot(len(names)), None
    for place, name in enumerate(names):
        ballot.add(sketch(name))
        if decided is None and ballot.is_decided:
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


def test_equals_go_to_the_likeliest_by_its_best_sample() -> None:
    ballot = Ballot(4)
    for name, mean_logprob in (("a", -0.5), ("b", -0.9), ("a", -0.4), ("b", -0.3)):
        ballot.add(sketch(name, mean_logprob))
    assert not ballot.is_decided
    assert ballot.winner.text == "b"


def test_samples_that_agree_count_at_once() -> None:
    ballot = Ballot(10)
    ballot.add(sketch("a"), 4)
    ballot.add(sketch("b"), 1)
    assert not ballot.is_decided
    ballot.add(sketch("a"), 2)
    assert ballot.is_decided
    told = ballot.result()
    assert (told.votes, told.sketches, told.undecided, told.vote_share) == (6, 10, 3, 6 / 7)
    assert [sample.text for sample in ballot.samples(8)] == ["a"] * 6 + ["b", "a"]
