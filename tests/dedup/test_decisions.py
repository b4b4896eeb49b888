"""Who stays, against plain Python over the same edges."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cert_ray.dedup import decisions
from cert_ray.dedup.buckets import joined
from cert_ray.dedup.decisions import Documents, Ranking, best_of_equal, choose_survivors, clusters_of, rank_documents
from cert_ray.dedup.minhash import U64

STARS = st.sampled_from([0, 1, 7, 2_000_000])


def edges_of(pairs: list[tuple[int, int]]) -> U64:
    ends = np.array(pairs, np.uint32).reshape(-1, 2)
    return joined(ends[:, 0], ends[:, 1])


def survivors_by_hand(documents: int, edges: set[tuple[int, int]]) -> list[int]:
    """One document after the other, the best first: it falls to the best survivor that an edge ties it to."""
    survivor: list[int] = []
    for rank in range(documents):
        better = [one for one in range(rank) if (one, rank) in edges and survivor[one] == one]
        survivor.append(min(better, default=rank))
    return survivor


batches = st.integers(1, 30).flatmap(
    lambda documents: st.tuples(
        st.just(documents),
        st.lists(
            st.lists(
                st.tuples(*[st.integers(0, documents - 1)] * 2).filter(lambda pair: pair[0] < pair[1]), max_size=30
            )
            if documents > 1
            else st.just([]),
            max_size=4,
        ),
    )
)


@given(batches)
def test_a_document_falls_to_the_best_survivor_it_is_tied_to(case: tuple[int, list[list[tuple[int, int]]]]) -> None:
    documents, drawn = case
    expected = survivors_by_hand(documents, {edge for batch in drawn for edge in batch})
    for order in (drawn, drawn[::-1], [*drawn, *drawn]):
        assert choose_survivors([edges_of(batch) for batch in order], documents).tolist() == expected


def test_a_chain_is_split_so_that_each_link_has_its_own_survivor() -> None:
    """Each is like the next only: components would keep one of all."""
    chain = [(rank, rank + 1) for rank in range(6)]
    assert choose_survivors([edges_of(chain)], 7).tolist() == [0, 0, 2, 2, 4, 4, 6]


def test_a_long_chain_is_decided_to_its_end() -> None:
    documents = 4_000
    edges = joined(np.arange(documents - 1, dtype=np.uint32), np.arange(1, documents, dtype=np.uint32))
    ranks = np.arange(documents)
    assert choose_survivors([edges], documents).tolist() == (ranks - ranks % 2).tolist()


rows = st.lists(st.tuples(st.integers(0, 3), STARS, st.integers(1, 3), st.booleans()), min_size=1, max_size=25)


def documents_of(drawn: list[tuple[int, int, int, bool]], ends: list[int]) -> Documents:
    """Of rows (content, stars, size, shingle); a content has one size and shingles or none."""
    content, stars = [row[0] for row in drawn], np.array([row[1] for row in drawn])
    size = np.array([drawn[content.index(value)][2] for value in content])
    shingle = np.array([drawn[content.index(value)][3] for value in content])
    hashes = np.array([[value * 7919 % 5, value] for value in content], np.uint64)
    return Documents(hashes, decisions.precedence(stars, size, ends), shingle)


@given(rows, st.data())
def test_ranks_go_by_generation_stars_bytes_and_content(
    drawn: list[tuple[int, int, int, bool]], data: st.DataObject
) -> None:
    end = data.draw(st.integers(0, len(drawn)))
    documents = documents_of(drawn, [end, len(drawn)])
    content = [row[0] for row in drawn]

    def order(number: int) -> tuple[int, int, int, int, int]:
        first = drawn[content.index(content[number])]
        return (number >= end, -min(drawn[number][1], (1 << 20) - 1), -first[2], content[number] * 7919 % 5, number)

    first = [min((other for other, value in enumerate(content) if value == mine), key=order) for mine in content]
    ranking = rank_documents(documents, best_of_equal(documents))
    assert ranking.first_D.tolist() == first
    ranked = sorted((number for number in set(first) if documents.has_shingle_D[number]), key=order)
    assert ranking.number_R.tolist() == ranked
    assert ranking.rank_D[ranking.number_R].tolist() == list(range(len(ranked)))
    assert (ranking.rank_D == decisions.UNRANKED).sum() == len(drawn) - len(ranked)
    alone = decisions.in_one_generation(documents).precedence_D
    assert alone.tolist() == documents_of(drawn, [len(drawn)]).precedence_D.tolist()


def test_sizes_of_a_generation_count_what_had_come_by_its_end() -> None:
    first_D = np.array([0, 0, 2, 2, 0])
    rank_D = np.array([0, decisions.UNRANKED, 1, decisions.UNRANKED, decisions.UNRANKED], np.uint32)
    clusters = clusters_of(Ranking(first_D, rank_D, np.array([0, 2], np.uint32)), np.zeros(2, np.uint32), [2, 5])
    assert clusters.survivor_D.tolist() == [0, 0, 0, 0, 0]
    assert clusters.size_D.tolist() == [2, 2, 5, 5, 5]
    assert clusters.keep.tolist() == [True, False, False, False, False]


def test_no_documents_give_no_clusters() -> None:
    nothing = Documents(np.zeros((0, 2), np.uint64), np.zeros(0, np.uint64), np.zeros(0, bool))
    ranking = rank_documents(nothing, best_of_equal(nothing))
    assert len(clusters_of(ranking, choose_survivors([], 0), [0]).keep) == 0
