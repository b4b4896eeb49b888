from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cert_ray import python_source, schemas
from cert_ray.retrieval.library_docs import ApiDoc
from cert_ray.retrieval.retriever import Retriever
from cert_ray.sketching.prompt_format import END_OF_TEXT, SEPARATOR
from cert_ray.tokens.encoding import EncodedShard, PackConfig, View, encode_shard, unigram_entropy_nats
from cert_ray.tokens.pack import pack_in_process
from cert_ray.tokens.packing import plan_rows
from cert_ray.tokens.shards import PackedTokens
from cert_ray.tokens.vocabulary import TokenizerConfig, train_vocabulary
from tests.tokens.datasets import Row, document, example, real_code, sketched_document, table_of, write_dataset

UNICODE = document(
    'import os\n\n\nname = "é日本"  # ключ\n\n\nüber = 12\n',
    "import os\n\n\nname = string  # ключ\n\n\nüber = number\n",
    [("string", "string"), ("number", "number")],
    [
        ("import os", "import os", False),
        ('name = "é日本"  # ключ', "name = string  # ключ", True),
        ("über = 12\n", "über = number\n", True),
    ],
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_vocabulary(real_code(12), TokenizerConfig(vocab_size=1_000))


def encode(tokenizer: Tokenizer, rows: Sequence[Row], view: View, **options: object) -> EncodedShard:
    return encode_shard(table_of(rows), tokenizer, PackConfig.from_mapping({"view": view, **options}, "test"))


def texts(tokenizer: Tokenizer, encoded: EncodedShard) -> list[list[str]]:
    """Per document the text of each piece, special tokens spelled out."""
    found: dict[int, list[str]] = {}
    for piece in encoded.pieces.to_pylist():
        ids = encoded.tokens[piece["start"] : piece["start"] + piece["tokens"]]
        found.setdefault(piece["document"], []).append(tokenizer.decode(ids.tolist(), skip_special_tokens=False))
    return list(found.values())


@pytest.mark.parametrize("view", [View.BASE, View.XL])
def test_base_and_xl_are_code_and_its_end(tokenizer: Tokenizer, view: View) -> None:
    rows = [UNICODE, example(0), document("")]
    assert texts(tokenizer, encode(tokenizer, rows, view)) == [[row["content"] + END_OF_TEXT] for row in rows]


def test_the_sketcher_reads_placeholders_as_special_tokens(tokenizer: Tokenizer) -> None:
    encoded = encode(tokenizer, [UNICODE], View.SKETCHER)
    spelled = "import os\n\n\nname = <|string|>  # ключ\n\n\nüber = <|number|>\n<|endoftext|>"
    assert texts(tokenizer, encoded) == [[spelled]]
    assert encoded.tokens.tolist().count(tokenizer.token_to_id("<|string|>")) == 1


def test_the_generator_reads_pairs_joined_by_three_line_breaks(tokenizer: Tokenizer) -> None:
    encoded = encode(tokenizer, [UNICODE], View.GENERATOR)
    assert texts(tokenizer, encoded) == [
        [
            "import os\n\n\n",
            f'name = <|string|>  # ключ\n{SEPARATOR}\nname = "é日本"  # ключ\n\n\n',
            f"über = <|number|>\n\n{SEPARATOR}\nüber = 12\n{END_OF_TEXT}",
        ]
    ]
    assert encoded.pieces["atomic"].to_pylist() == [False, True, True]
    assert (encoded.counts["pairs"], encoded.counts["pairs_too_long"]) == (2, 0)


def test_real_files_keep_all_their_code_in_the_generators_view(tokenizer: Tokenizer) -> None:
    rows = [sketched_document(source) for source in real_code(12)]
    encoded = encode(tokenizer, rows, View.GENERATOR, context_tokens=1_000_000)
    for row, pieces in zip(rows, texts(tokenizer, encoded), strict=True):
        assert pieces[-1].endswith(END_OF_TEXT)
        pieces[-1] = pieces[-1].removesuffix(END_OF_TEXT)
        blocks = [piece.split(f"{SEPARATOR}\n")[-1].removesuffix("\n\n\n") for piece in pieces]
        payload = row["content"].encode()
        expected = [payload[block["code_start"] : block["code_end"]].decode() for block in row["segments"]]
        assert [block.rstrip("\n") for block in blocks] == [block.rstrip("\n") for block in expected]
        assert Counter("\n".join(blocks).split()) == Counter(row["content"].split())


def test_the_context_comes_first_and_the_sketch_stands_between_separators(tokenizer: Tokenizer) -> None:
    """Where a part begins is drawn: both blocks as pairs, or the first as context of the second."""
    encoded = encode(tokenizer, [UNICODE], View.CONTEXT_FIRST)
    (pieces,) = texts(tokenizer, encoded)
    shape = re.compile(f"(.*){re.escape(SEPARATOR)}(.*){re.escape(SEPARATOR)}(.*)", re.DOTALL)
    found = [shape.fullmatch(piece) for piece in pieces]
    runs = [match.groups() for match in found if match is not None]
    assert len(runs) == len(pieces) == encoded.counts["pairs"]
    code = [context + part for context, _, part in runs]
    assert code[-1].endswith(END_OF_TEXT)
    assert all(part.endswith("\n\n\n") for part in code[:-1])
    assert "".join(code).removesuffix(END_OF_TEXT) == UNICODE["content"]  # whose blocks are three line breaks apart
    for context, sketch, part in runs:
        assert context == context.rstrip()
        bare = part.removesuffix(END_OF_TEXT)
        assert sketch.rstrip() == re.sub("12", "<|number|>", re.sub('"é日本"', "<|string|>", bare)).rstrip()
    assert encoded.pieces["atomic"].to_pylist() == [True] * len(pieces)


def test_a_context_that_is_too_long_leaves_its_end_with_the_pair(tokenizer: Tokenizer) -> None:
    code = "import a\n" * 60
    row = document(f"{code}\nx = 1", f"{code}\nx = number", [("number", "number")],
                   [(code, code, False), ("x = 1", "x = number", True)])  # fmt: skip
    whole = encode(tokenizer, [row], View.CONTEXT_FIRST)
    (tokens,) = whole.pieces["tokens"].to_pylist()
    short = encode(tokenizer, [row], View.CONTEXT_FIRST, context_tokens=49)
    assert short.tokens.tolist() == whole.tokens.tolist()
    assert short.pieces["tokens"].to_pylist() == [tokens - 50, 50]
    assert short.pieces["atomic"].to_pylist() == [False, True]
    pair = len(whole.tokens) - whole.tokens.tolist().index(tokenizer.token_to_id(SEPARATOR))
    alone = encode(tokenizer, [row], View.CONTEXT_FIRST, context_tokens=pair - 2)
    assert texts(tokenizer, alone) == [[row["content"] + END_OF_TEXT]]
    assert (alone.counts["pairs"], alone.counts["pairs_too_long"]) == (1, 1)
    assert encode(tokenizer, [row], View.CONTEXT_FIRST, context_tokens=pair - 1).pieces["tokens"].to_pylist()[1] == pair


def test_real_files_with_the_context_first_fill_their_rows_and_cut_no_pair(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [sketched_document(source) for source in real_code(30)]
    write_dataset(str(tmp_path / "dataset"), [rows])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = PackConfig(view=View.CONTEXT_FIRST, context_tokens=512)
    pack_in_process(str(tmp_path / "dataset"), str(tmp_path), str(tmp_path / "tokens"), config)
    packed = PackedTokens.open(str(tmp_path / "tokens"))
    plan = plan_rows(packed, np.arange(len(packed)), 512)
    assert plan.stats.cut_pairs == 0
    assert plan.stats.used_share > 0.98
    separator = tokenizer.token_to_id(SEPARATOR)
    in_rows = [int((plan.row(number)[0] == separator).sum()) for number in range(len(plan))]
    assert all(count % 2 == 0 for count in in_rows)
    assert sum(in_rows) == 2 * (packed.manifest.counts["pairs"] - packed.manifest.counts["pairs_too_long"])


def test_a_pair_that_does_not_fit_a_row_becomes_code_alone(tokenizer: Tokenizer) -> None:
    whole = encode(tokenizer, [UNICODE], View.GENERATOR)
    longest = max(whole.pieces["tokens"].to_pylist())
    fitting = encode(tokenizer, [UNICODE], View.GENERATOR, context_tokens=longest - 1)
    assert fitting.pieces.equals(whole.pieces)
    short = encode(tokenizer, [UNICODE], View.GENERATOR, context_tokens=longest - 2)
    assert texts(tokenizer, short)[0][1] == 'name = "é日本"  # ключ\n\n\n'
    assert short.pieces["atomic"].to_pylist() == [False, False, True]
    assert (short.counts["pairs"], short.counts["pairs_too_long"]) == (2, 1)


DOCUMENTED = document(
    'import monkey\n\n\nx = monkey.peek("é")\n',
    "import monkey\n\n\nx = monkey.peek(string)\n",
    [("string", "string")],
    [("import monkey", "import monkey", False), ('x = monkey.peek("é")\n', "x = monkey.peek(string)\n", True)],
    libraries=["monkey"],
)


@pytest.mark.parametrize("view", [View.XL, View.SKETCHER, View.GENERATOR, View.CONTEXT_FIRST])
def test_documentation_stands_ahead_of_a_files_text_as_ahead_of_a_prompt(tokenizer: Tokenizer, view: View) -> None:
    retriever = Retriever([ApiDoc("monkey.peek", "(path)", "Ein Blick: é.")])
    table, config = table_of([DOCUMENTED, UNICODE]), PackConfig(view=view)
    plain, encoded = encode_shard(table, tokenizer, config), encode_shard(table, tokenizer, config, retriever)
    header = retriever.header(DOCUMENTED["content"])
    assert header == "# Documentation:\n# monkey.peek(path): Ein Blick: é.\n\n"
    (first, *others), unicode = texts(tokenizer, plain)
    assert texts(tokenizer, encoded) == [[header + first, *others], unicode]
    assert encoded.pieces["atomic"].equals(plain.pieces["atomic"])
    assert encoded.counts["documented"] == 1


def test_documentation_stands_with_the_code_of_a_first_pair(tokenizer: Tokenizer) -> None:
    code, sketch = "import monkey\nx = monkey.peek(1)\n", "import monkey\nx = monkey.peek(number)\n"
    row = document(code, sketch, [("number", "number")], [(code, sketch, True)])
    retriever = Retriever([ApiDoc("monkey.peek", "()", "")])
    encoded = encode_shard(table_of([row]), tokenizer, PackConfig(view=View.GENERATOR), retriever)
    spelled = sketch.replace("number", "<|number|>")
    header = "# Documentation:\n# monkey.peek()\n\n"
    assert texts(tokenizer, encoded) == [[f"{spelled}\n{SEPARATOR}\n{header}{code}{END_OF_TEXT}"]]


@pytest.mark.parametrize("view", [View.GENERATOR, View.CONTEXT_FIRST])
def test_a_file_without_segments_is_its_code(tokenizer: Tokenizer, view: View) -> None:
    rows = [document("# only a comment\n", "# only a comment\n"), document("", "")]
    assert texts(tokenizer, encode(tokenizer, rows, view)) == [["# only a comment\n" + END_OF_TEXT], [END_OF_TEXT]]


def test_rows_of_other_libraries_and_without_sketches_are_counted_drops(tokenizer: Tokenizer) -> None:
    rows = [example(0), example(1), document("import numpy\n", libraries=["numpy"]), document("x = 1\n")]
    encoded = encode(tokenizer, rows, View.GENERATOR, libraries=("numpy", "pandas"))
    assert encoded.dropped == {"other_library": 2, "unsketchable": 1}
    assert encoded.rows_read == encoded.documents + sum(encoded.dropped.values()) == 4
    assert texts(tokenizer, encoded)[0][0].startswith("import numpy as np")


def test_a_shard_without_rows_gives_an_empty_one(tokenizer: Tokenizer) -> None:
    encoded = encode(tokenizer, [], View.GENERATOR, libraries=("numpy",))
    assert (encoded.documents, len(encoded.tokens), encoded.pieces.num_rows) == (0, 0, 0)
    assert encoded.pieces.schema == schemas.PIECES


def test_the_held_out_files_are_the_same_in_every_view(tokenizer: Tokenizer) -> None:
    rows = [example(number) for number in range(400)]
    splits = []
    for view in View:
        encoded = encode(tokenizer, rows, view, held_out_fraction=0.25)
        pieces = encoded.pieces.to_pylist()
        splits.append({piece["document"] for piece in pieces if piece["held_out"]})
        assert encoded.counts["held_out_documents"] == len(splits[-1])
        assert encoded.counts["held_out_tokens"] == sum(piece["tokens"] for piece in pieces if piece["held_out"])
        assert encoded.counts["held_out_tokens"] == sum(encoded.unigrams["count"].to_pylist())
    assert all(split == splits[0] for split in splits)
    assert 0.15 < len(splits[0]) / 400 < 0.35
    moved = encode(tokenizer, rows, View.BASE, held_out_fraction=0.25, seed=1).pieces.to_pylist()
    assert {piece["document"] for piece in moved if piece["held_out"]} != splits[0]


def test_weights_stand_beside_their_documents(tokenizer: Tokenizer) -> None:
    rows = [UNICODE | {"weight": 0.25}, example(0) | {"weight": 1.75}]
    pieces = encode(tokenizer, rows, View.GENERATOR).pieces.to_pylist()
    assert [(piece["document"], piece["weight"]) for piece in pieces] == [(0, 0.25)] * 3 + [(1, 1.75)] * 2


def test_unigram_entropy_is_that_of_the_distribution() -> None:
    assert unigram_entropy_nats(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4))
    assert unigram_entropy_nats(np.array([1, 3])) == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert unigram_entropy_nats(np.zeros(4, np.int64)) is None


@given(st.text(max_size=40), st.data())
def test_code_points_invert_byte_offsets(text: str, data: st.DataObject) -> None:
    offsets = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    assert list(python_source.code_points(text, python_source.byte_offsets(text, offsets))) == offsets
