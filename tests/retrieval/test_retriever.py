"""What stands ahead of a prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from cert_ray.errors import InputError
from cert_ray.retrieval.library_docs import ApiDoc, write_docs
from cert_ray.retrieval.retriever import RetrieveConfig, Retriever
from tests.retrieval.builders import ASKS_FOR_SORTING, DOCS


@pytest.fixture(scope="module")
def retriever() -> Retriever:
    return Retriever(DOCS)


def test_what_suits_best_comes_first_as_comments(retriever: Retriever) -> None:
    assert retriever.header(ASKS_FOR_SORTING).splitlines()[:2] == [
        "# Documentation:",
        "# monkey.Frame.order_by(column, descending=False): Sort the frame by a column.",
    ]
    assert retriever.header(ASKS_FOR_SORTING).endswith("\n\n")
    gaps = "import monkey\n'''Remove the rows with missing values'''\n"
    assert retriever.header(gaps).splitlines()[1] == (
        "# monkey.Frame.drop_gaps(subset=None): Remove rows with missing values."  # the first sentence only
    )


def test_only_libraries_that_are_imported_are_documented(retriever: Retriever) -> None:
    names = {doc.library for doc in retriever.find("import donkey\nimport os\n# sort the values of a frame\n")}
    assert names == {"donkey"}
    assert retriever.header("import pandas as pd\n# sort the values of a frame\n") == ""
    assert retriever.header("# monkey: sort the values of a frame\n") == ""


def test_nothing_is_found_for_words_that_no_doc_has(retriever: Retriever) -> None:
    assert retriever.header("import monkey\n# zebras\n") == ""
    assert retriever.header("import monkey\n") == ""
    assert retriever.header("") == ""


def test_prose_decides_and_code_where_there_is_none(retriever: Retriever) -> None:
    assert retriever.find("import monkey\nframe.orderBy(  # missing values\n")[0].name == "monkey.Frame.drop_gaps"
    assert retriever.find("import monkey\nframe.orderBy(\n")[0].name == "monkey.Frame.order_by"


def test_documentation_never_leaves_its_comment() -> None:
    header = Retriever([ApiDoc("monkey.peek", "(sep='\n')", "Rows\r\nimport os\x0bos")]).header(
        "import monkey\n# rows\n"
    )
    assert all(line.startswith("# ") for line in header.splitlines()[:-1])
    assert len(header.splitlines()) == 3


def test_an_inherited_method_is_shown_once_and_equals_come_in_the_files_order(retriever: Retriever) -> None:
    found = retriever.find("import monkey\n# peek at the first rows\n")
    assert [doc.name for doc in found] == ["monkey.Frame.peek", "monkey.Frame.drop_gaps"]


def test_of_a_long_prompt_the_end_decides_and_of_a_file_the_beginning() -> None:
    short = Retriever(DOCS, top=1, query_chars=60)
    early, late = "import monkey\n# remove missing values\n", "# sort by a column\n"
    text = early + "x = 1\n" * 50 + late
    assert "order_by" in short.header(text)
    assert "drop_gaps" in short.header_of_file(text)
    assert short.header_of_file(text) == short.header(text[:60])


def test_options_that_mean_a_certain_file_refuse_another_one(tmp_path: Path) -> None:
    url = str(tmp_path / "docs.jsonl")
    write_docs(url, DOCS)
    pinned = RetrieveConfig(docs=url).pinned()
    assert Retriever.load(pinned).find(ASKS_FOR_SORTING)
    write_docs(url, DOCS[1:])
    assert RetrieveConfig(docs=url).pinned().checksum != pinned.checksum
    with pytest.raises(InputError, match="that the models were trained with"):
        Retriever.load(pinned)
