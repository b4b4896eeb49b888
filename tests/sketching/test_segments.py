"""Segments: each block of code beside exactly its own sketch."""

from __future__ import annotations

import pytest

from cert_ray.python_source import SourceFacts, read_source
from cert_ray.sketching import Sketched, SketchKind, sketch_source, sketch_spans
from cert_ray.sketching.segments import align_segments
from tests.sketching.corpus import standard_library


def pairs(source: str, kind: str = "constants") -> list[tuple[str, str, bool]]:
    facts = read_source(source)
    assert isinstance(facts, SourceFacts)
    sketched = sketch_spans(source, kind)
    return [
        (
            source[segment.code_start : segment.code_end],
            sketched.text[segment.sketch_start : segment.sketch_end],
            segment.with_sketch,
        )
        for segment in align_segments(source, sketched, facts.statements)
    ]


def test_each_block_stands_beside_its_sketch_and_imports_and_main_stand_alone() -> None:
    source = (
        "'''Doc.'''\n\nimport os\n\n\nx = f('a'\n\n  'b')or 1if y else.5\n\n# c 1\ndef f(): pass\n\n"
        "if __name__ == 'a':\n    f()\n"
    )
    assert pairs(source) == [
        ("'''Doc.'''", "'''Doc.'''", True),
        ("import os", "import os", False),
        ("x = f('a'\n\n  'b')or 1if y else.5", "x = f(string)or number if y else float", True),
        ("# c 1\ndef f(): pass", "# c 1\ndef func(): pass", True),
        ("if __name__ == 'a':\n    f()", "if __name__ == string:\n    f()", False),
    ]


def test_a_source_without_blocks_has_no_segments() -> None:
    assert pairs("") == pairs("# only words\n") == []


def test_form_feeds_that_the_released_kind_loses_shift_nothing() -> None:
    source = "x\f= 'a'\f\n\f\n'''\f'''  # \f\n\n\fy = f(1) \f # é\n"
    assert pairs(source, "released") == [
        ("x\f= 'a'\f", "x= string", True),
        ("'''\f'''  # \f", "'''\f'''  # \f", True),
        ("\fy = f(1) \f # é", "y = f(number)  # é", True),
    ]


@pytest.mark.parametrize("kind", SketchKind)
def test_segments_of_real_files_are_whole_lines_that_hold_their_own_placeholders(kind: SketchKind) -> None:
    for path, source in standard_library(300)[list(SketchKind).index(kind) :: 8]:
        facts, sketched = read_source(source), sketch_source(source, kind)
        assert isinstance(facts, SourceFacts)
        assert isinstance(sketched, Sketched)
        spans = list(zip(sketched.replaced, sketched.placeholders, strict=True))
        inside = 0
        for segment in align_segments(source, sketched, facts.statements):
            own = [pair for pair in spans if segment.code_start <= pair[0][0] < segment.code_end]
            inside += len(own)
            assert all(segment.sketch_start <= placeholder.start for _, placeholder in own), path
            assert all(placeholder.end <= segment.sketch_end for _, placeholder in own), path
            assert sketched.text[segment.sketch_end : segment.sketch_end + 1] in ("", "\n"), path
            assert sketched.text[: segment.sketch_start][-1:] in ("", "\n"), path
        assert inside == len(spans), path
