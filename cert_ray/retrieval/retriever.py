"""From the text of a prompt to the documentation that stands ahead of it, as comments.

In: docs (`library_docs`) and a text. Out: a header, which is empty or like

    # Documentation:
    # monkey.DataFrame.groupby(by=None, axis=0): Group a frame by a mapper or columns.
    # monkey.Series.unique(): Distinct values of the series.

and an empty line. It depends on the text and the docs alone: nothing else about a problem is known here, least of all
its answer. Only docs of libraries that the text imports are found; a text that imports none of them stays as it is. The
query is the words of the text's comments and docstrings or, if there are none, of all its code. Names are split at
underscores and capitals, and words are stemmed (Snowball). The ranking is BM25 (Lucene's form, by bm25s). Of a long
prompt the last `query_chars` count; of a training file the first ones, since its beginning stands for a prompt.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pydantic

from cert_ray import storage
from cert_ray.config import Config
from cert_ray.errors import InputError
from cert_ray.libraries import imported_libraries
from cert_ray.retrieval.library_docs import ApiDoc, read_docs

HEADING = "# Documentation:"
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_PROSE = re.compile(r"#([^\n]*)|\"{3}(.*?)(?:\"{3}|\Z)|'{3}(.*?)(?:'{3}|\Z)", re.DOTALL)
_IMPORT_LINE = re.compile(r"^[ \t]*(?:from|import)[ \t].*$", re.MULTILINE)


class RetrieveConfig(Config):
    """Which documentation, and how much of it."""

    docs: str  # the file that `cert-ray library-docs` wrote
    top: int = pydantic.Field(default=2, ge=1)
    query_chars: int = pydantic.Field(default=2_000, ge=1)
    checksum: str | None = None  # of the right file, as manifests of token files record it; None: any file

    @classmethod
    def from_text(cls, text: str) -> RetrieveConfig:
        """From `text`: the file's URL, or a JSON object of options.

        Raises:
            ConfigError: when an option cannot be used.
        """
        return cls.from_mapping(json.loads(text) if text.startswith("{") else {"docs": text}, "retrieve")

    @property
    def text(self) -> str:
        """The file's URL; if other options are set, a JSON object."""
        given = self.model_dump(exclude_defaults=True)
        return self.docs if given.keys() == {"docs"} else json.dumps(given)

    def absolute(self) -> RetrieveConfig:
        """The same configuration, for a process in another folder."""
        return self.model_copy(update={"docs": storage.absolute(self.docs)})

    def pinned(self) -> RetrieveConfig:
        """The same configuration, tied to the file as it is now, for a process in another folder.

        Raises:
            InputError: when there is no such file, or its checksum is not the one given.
        """
        if not storage.exists(self.docs) or storage.is_folder(self.docs):
            read_docs(self.docs)  # raises what is wrong with it
        found = storage.checksum(self.docs).checksum
        if self.checksum not in (None, found):
            problem = f"its checksum is {found}, but {self.checksum} is expected"
            raise InputError(self.docs, problem, "Give the file that the models were trained with.")
        return self.absolute().model_copy(update={"checksum": found})


class Retriever:
    """Finds docs for texts. Thread-safe."""

    def __init__(self, docs: Sequence[ApiDoc], top: int = 2, query_chars: int = 2_000) -> None:
        import bm25s  # here, since most processes never retrieve

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG itself
        self._docs, self._top, self._query_chars = docs, top, query_chars
        self._index: Any = bm25s.BM25(method="lucene")
        # The empty word keeps a library without any words from making an empty index.
        self._index.index([_words(_text_of(doc)) or [""] for doc in docs], show_progress=False)
        libraries = [doc.library for doc in docs]
        self._of_library = {library: np.array([one == library for one in libraries]) for library in set(libraries)}

    @classmethod
    def load(cls, config: RetrieveConfig) -> Retriever:
        """The retriever of `config`.

        Raises:
            InputError: when its file cannot be used.
        """
        return cls(read_docs(config.pinned().docs), config.top, config.query_chars)

    def find(self, text: str) -> list[ApiDoc]:
        """The docs that suit `text` best, best first; on a tie, in the file's order. At most `top`, maybe none."""
        chosen = self._imported(text)
        known = [word for word in _asked_for(text) if word in self._index.vocab_dict]
        if chosen is None or not known:
            return []
        scores = np.where(chosen, self._index.get_scores(known), 0.0)
        ranked = (self._docs[place] for place in np.argsort(-scores, kind="stable") if scores[place] > 0)
        found: dict[tuple[str, str], ApiDoc] = {}  # a method that several classes inherit, only once
        for doc in ranked:
            found.setdefault((doc.name.rpartition(".")[2], doc.summary), doc)
            if len(found) == self._top:
                break
        return list(found.values())

    def header(self, prompt: str) -> str:
        """What goes ahead of `prompt`: comments and an empty line, or nothing."""
        return _header(self.find(prompt if self._fits(prompt) else _imports(prompt) + prompt[-self._query_chars :]))

    def header_of_file(self, content: str) -> str:
        """What goes ahead of a file in training: what a prompt that is its beginning would get."""
        return _header(self.find(content[: self._query_chars]))

    def _fits(self, text: str) -> bool:
        return len(text) <= self._query_chars

    def _imported(self, text: str) -> Any:
        """Which docs belong to a library that `text` imports; None if none does."""
        masks = [self._of_library[name] for name in imported_libraries(text) if name in self._of_library]
        return np.logical_or.reduce(masks) if masks else None


@lru_cache(maxsize=4)
def load_retriever(config: RetrieveConfig) -> Retriever:
    """`Retriever.load`, once per process for equal options, which must be pinned."""
    assert config.checksum is not None
    return Retriever.load(config)


def _header(docs: Sequence[ApiDoc]) -> str:
    if not docs:
        return ""
    lines = [f"# {doc.name}{doc.signature}{f': {doc.summary}' if doc.summary else ''}" for doc in docs]
    # A line break inside would let documentation escape its comment.
    return "\n".join([HEADING, *(" ".join(line.splitlines()) for line in lines)]) + "\n\n"


def _imports(text: str) -> str:
    return "".join(f"{line}\n" for line in _IMPORT_LINE.findall(text))


def _text_of(doc: ApiDoc) -> str:
    """The text a doc is found by. Its own name counts twice: `groupby` finds the method before docs that mention it."""
    name = doc.name.partition(".")[2]
    return f"{name} {name.rpartition('.')[2]} {doc.signature} {doc.description}"


def _asked_for(text: str) -> list[str]:
    """The words of comments and docstrings or, if these have none, of all of `text`; each once."""
    prose = " ".join(part for parts in _PROSE.findall(text) for part in parts if part)
    return list(dict.fromkeys(_words(prose) or _words(_IMPORT_LINE.sub("", text))))


def _words(text: str) -> list[str]:
    import Stemmer
    from bm25s.stopwords import STOPWORDS_EN

    found = [word.lower() for word in _WORD.findall(text)]
    kept = [word for word in found if len(word) > 1 and word not in STOPWORDS_EN]
    stemmed: list[str] = Stemmer.Stemmer("english").stemWords(kept)  # a new one per call: it is not thread-safe
    return stemmed
