"""A corpus that wants to break its reader. `build_hostile_corpus` writes it and says which drops it must give."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

GOOD = '''import numpy as np


def mean_of_squares(values):
    """The mean of the squares of `values`."""
    if not values:
        return 0.0
    return np.mean([value * value for value in values])
'''
GOOD_FILES = 5  # `good_source`s that are to be kept: two loose, one of each archive and table
MAX_FILE_BYTES = 1_000_000


def good_source(number: int) -> str:
    """A file that is kept; each `number` gives another one, too different to be a near duplicate."""
    lines = [f"    result_{number}_{line} = values[{line}] * {number * 1_000 + line}" for line in range(12)]
    return (
        GOOD.replace("mean_of_squares", f"mean_{number}")
        + f"\n\ndef more_{number}(values):\n"
        + "\n".join(lines)
        + "\n"
    )


def hostile_inputs(folder: Path) -> tuple[str, ...]:
    """The inputs that `build_hostile_corpus` wrote below `folder`."""
    return (str(folder / "tree"), str(folder / "archives"))


def build_hostile_corpus(folder: Path) -> dict[str, int]:
    """Write the corpus below `folder`; returns the drops by reason that reading and cleaning it must count."""
    tree = folder / "tree"
    tree.mkdir(parents=True)
    expected = _write_tree(tree)
    archives = folder / "archives"
    archives.mkdir()
    for reason, count in _write_archives(archives).items():
        expected[reason] = expected.get(reason, 0) + count
    return expected


def build_table_without_columns(folder: Path) -> Path:
    """A Parquet file that has nothing to read: not a drop, but one clear error."""
    path = folder / "other.parquet"
    pq.write_table(pa.table({"body": [GOOD], "label": [1]}), path)
    return path


def _write_tree(tree: Path) -> dict[str, int]:
    (tree / "good_a.py").write_text(good_source(1))
    (tree / "good_b.py").write_bytes(b"\xef\xbb\xbf" + good_source(2).replace("\n", "\r\n").encode())
    (tree / "notes.txt").write_text("not Python, so not read")
    (tree / "empty.py").write_bytes(b"")
    (tree / "blank.py").write_bytes(b" \n\t\n\x0c\n")
    (tree / "binary.py").write_bytes(b"\x7fELF\x02\x01\x01\x00\x00" + bytes(range(256)) * 20)
    (tree / "nul.py").write_text(GOOD + "\x00")
    (tree / "latin.py").write_bytes("# déjà vu\n".encode("latin-1") + GOOD.encode())
    (tree / "codec.py").write_text("# -*- coding: rot13 -*-\n" + GOOD)
    (tree / "unknown_codec.py").write_text("# -*- coding: klingon -*-\n" + GOOD)
    (tree / "one_line.py").write_text("x = [" + "1, " * ((MAX_FILE_BYTES - 10) // 3) + "]\n")
    (tree / "too_large.py").write_text("x = 1\n" * (MAX_FILE_BYTES // 6 + 1))
    # Deep nesting, on lines and among words that no rule about text minds: these reach the parser.
    words = "# the quick brown fox jumps over the lazy dog\n" * 3_000
    for name, deep in {
        "nested.py": "(" * 10_000 + "1" + ")" * 10_000,
        "unary.py": "-" * 50_000 + "1",
        "negations.py": "not " * 50_000 + "x",
        "attributes.py": "a" + ".b" * 50_000,
    }.items():
        (tree / name).write_text(f"{GOOD}{words}x = {_wrapped(deep)}\n")
    (tree / "nested_on_one_line.py").write_text(f"{GOOD}x = {'(' * 10_000}1{')' * 10_000}\n")
    (tree / "python2.py").write_text(GOOD + 'print "no"\n')
    (tree / "unclosed.py").write_text(GOOD + 'text = """never ends\n' * 2)
    (tree / "dangling.py").symlink_to(tree / "nowhere.py")
    (tree / "loop.py").symlink_to(tree / "loop.py")
    (tree / "loop_folder").symlink_to(tree, target_is_directory=True)
    (tree / "folder.py").mkdir()
    os.mkfifo(tree / "fifo.py")
    (tree / "device.py").symlink_to("/dev/zero")
    (tree / os.fsdecode(b"name-\xff.py")).write_text("value = 1\n")
    return {
        "empty": 2,
        "binary": 2,
        "undecodable": 3,
        "lines_too_long": 2,
        "too_large": 1,
        "too_deeply_nested": 4,
        "not_python_3": 2,
        "unreadable": 4,
        "too_few_lines": 1,
    }


def _wrapped(text: str, width: int = 88) -> str:
    """`text` on lines of at most `width`, continued by backslashes, so that no rule about lines drops it first."""
    return "\\\n".join(text[start : start + width] for start in range(0, len(text), width))


def _write_archives(archives: Path) -> dict[str, int]:
    whole = tar_bytes([("pkg/good.py", good_source(3)), ("../../escape.py", GOOD), ("/etc/absolute.py", GOOD)])
    (archives / "members.tar").write_bytes(whole)
    cut = gzip.compress(
        tar_bytes([(f"pkg/{index}.py", "value = 1\n") for index in range(3)] + [("pkg/last.py", _noise())])
    )
    (archives / "cut.tar.gz").write_bytes(cut[: len(cut) // 2])
    (archives / "not_an_archive.tar.gz").write_text("hello\n")
    with zipfile.ZipFile(archives / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("good.py", good_source(4))
        archive.writestr("bomb.py", b"#" * (20 * MAX_FILE_BYTES))
        archive.writestr("..\\escape.py", GOOD)
    (archives / "cut.zip").write_bytes((archives / "bomb.zip").read_bytes()[:500])
    rows = [
        json.dumps({"content": good_source(5), "max_stars_repo_path": "a.py", "max_stars_count": 7}),
        "{not json",
        json.dumps({"content": None, "max_stars_repo_path": "b.py"}),
        json.dumps(["a list"]),
        json.dumps({"content": GOOD + "\ud800", "max_stars_repo_path": "c.py"}),
    ]
    (archives / "rows.jsonl").write_text("\n".join(rows) + "\n\n")
    (archives / "cut.parquet").write_bytes(b"PAR1 and no more")
    return {
        "unsafe_member_path": 3,
        "damaged_archive": 4,
        "too_few_lines": 3,
        "too_large": 1,
        "bad_record": 3,
        "undecodable": 1,
    }


def _noise() -> str:
    """Text that does not compress, so that half of the archive is half of it."""
    return "\n".join(f"# {os.urandom(30).hex()}" for _ in range(2_000))


def tar_bytes(members: list[tuple[str, str]]) -> bytes:
    """A tar of regular files."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content.encode())
            archive.addfile(header, io.BytesIO(content.encode()))
    return sink.getvalue()
