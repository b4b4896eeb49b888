from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cert_ray.errors import ConfigError
from cert_ray.tokens import packing
from cert_ray.tokens.packing import RowPlan, plan_rows
from tests.tokens.packs import PAD, Piece, open_pack

DocumentsStrategy = st.lists(
    st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=4), min_size=1, max_size=12
)


def numbered(shape: list[list[tuple[int, bool]]], row_tokens: int) -> list[list[Piece]]:
    """Documents whose tokens are all different, from 2 on; pieces longer than a row are not atomic."""
    documents, token = [], 2
    for pieces in shape:
        document: list[Piece] = []
        for count, atomic in pieces:
            document.append((range(token, token + count), atomic and count <= row_tokens))
            token += count
        documents.append(document)
    return documents


def real_tokens(plan: RowPlan) -> list[list[int]]:
    rows = []
    for index in range(len(plan)):
        ids, mask = plan.row(index)
        assert ids.dtype == np.int64
        assert mask.dtype == np.bool_
        assert len(ids) == len(mask) == plan.context_tokens + 1
        assert (ids[~mask] == PAD).all()
        rows.append(ids[mask].tolist())
    return rows


def test_a_stream_is_cut_at_row_borders_in_epoch_order(tmp_path: Path) -> None:
    documents = [[(range(10, 13), False)], [(range(20, 27), False)], [(range(30, 31), False)]]
    plan = plan_rows(open_pack(tmp_path, documents), np.array([2, 1, 0, 1]), context_tokens=3)
    assert real_tokens(plan) == [
        [30, 20, 21, 22],
        [23, 24, 25, 26],
        [10, 11, 12, 20],
        [21, 22, 23, 24],
        [25, 26],
    ]
    assert (plan.stats.rows, plan.stats.tokens, plan.stats.padding) == (5, 18, 2)


def test_the_next_pair_that_fits_fills_the_rest_of_a_row(tmp_path: Path) -> None:
    documents = [[(range(10, 13), True)], [(range(20, 23), True)], [(range(30, 31), True), (range(40, 42), True)]]
    plan = plan_rows(open_pack(tmp_path, documents), np.arange(3), context_tokens=4)
    assert real_tokens(plan) == [[10, 11, 12, 40, 41], [20, 21, 22, 30]]


@settings(max_examples=200, deadline=None)
@given(shape=DocumentsStrategy, seed=st.integers(0, 99), look_ahead=st.sampled_from([1, 2, 5, 2048]))
def test_every_token_stands_in_one_row_and_pairs_stay_whole(
    tmp_path_factory: pytest.TempPathFactory, shape: list[list[tuple[int, bool]]], seed: int, look_ahead: int
) -> None:
    documents = numbered(shape, row_tokens=9)
    packed = open_pack(tmp_path_factory.mktemp("pack"), documents)
    epoch = np.random.default_rng(seed).integers(0, len(documents), size=2 * len(documents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "LOOK_AHEAD_PIECES", look_ahead)
        plan = plan_rows(packed, epoch, context_tokens=8)
        again = plan_rows(packed, epoch, context_tokens=8)
    rows = real_tokens(plan)
    assert rows == real_tokens(again)
    expected = [token for document in epoch for piece, _ in documents[document] for token in piece]
    assert Counter(token for row in rows for token in row) == Counter(expected)
    assert all(rows)
    assert plan.stats.cut_pairs == 0
    atomic = [list(piece) for document in documents for piece, is_atomic in document if is_atomic]
    for piece in atomic:
        for row in rows:
            positions = [position for position, token in enumerate(row) if token == piece[0]]
            assert all(row[position : position + len(piece)] == piece for position in positions)
        assert sum(row.count(token) for row in rows for token in piece) == len(piece) * expected.count(piece[0])


@given(shape=DocumentsStrategy)
@settings(max_examples=100, deadline=None)
def test_without_pairs_only_the_last_row_is_padded(
    tmp_path_factory: pytest.TempPathFactory, shape: list[list[tuple[int, bool]]]
) -> None:
    documents = numbered([[(count, False) for count, _ in pieces] for pieces in shape], row_tokens=9)
    plan = plan_rows(open_pack(tmp_path_factory.mktemp("pack"), documents), np.arange(len(documents)), 8)
    stream = [token for document in documents for piece, _ in document for token in piece]
    assert real_tokens(plan) == [stream[start : start + 9] for start in range(0, len(stream), 9)]


def test_realistic_pairs_use_98_percent_of_the_positions(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    documents: list[list[Piece]] = []
    for _ in range(1_500):  # an import block, then pairs of log-normal length (median 120, as pairs of real files)
        lengths = np.clip(rng.lognormal(np.log(120), 1.0, rng.integers(1, 12)), 8, 1_025).astype(int)
        imports: list[Piece] = [(range(5, 5 + int(rng.integers(5, 60))), False)]
        documents.append(imports + [(np.full(count, 7), True) for count in lengths])
    packed = open_pack(tmp_path, documents, context_tokens=1_024)
    plan = plan_rows(packed, np.arange(len(documents)), 1_024)
    assert plan.stats.used_share > 0.98
    assert plan.stats.cut_pairs == 0


def test_rows_gives_what_row_gives(tmp_path: Path) -> None:
    plan = plan_rows(open_pack(tmp_path, [[(range(10, 30), False)]]), np.arange(1), context_tokens=6)
    ids, mask = plan.rows(np.array([2, 0]))
    for position, index in enumerate((2, 0)):
        assert np.array_equal(ids[position], plan.row(index)[0])
        assert np.array_equal(mask[position], plan.row(index)[1])


def test_an_epoch_without_documents_has_no_rows(tmp_path: Path) -> None:
    plan = plan_rows(open_pack(tmp_path, [[(range(5), False)]]), np.zeros(0, np.int64), context_tokens=8)
    assert len(plan) == 0
    assert plan.stats.used_share == 1.0
    with pytest.raises(IndexError, match="row 0 of a plan of 0 rows"):
        plan.row(0)


def test_a_window_smaller_than_a_pair_is_refused_with_the_cure(tmp_path: Path) -> None:
    packed = open_pack(tmp_path, [[(range(9), True)]], context_tokens=8)
    assert len(plan_rows(packed, np.arange(1), context_tokens=8)) == 1
    with pytest.raises(ConfigError, match="pack the view again with --context-tokens 7"):
        plan_rows(packed, np.arange(1), context_tokens=7)
    with pytest.raises(ConfigError, match="context_tokens: 0"):
        plan_rows(packed, np.arange(1), context_tokens=0)
