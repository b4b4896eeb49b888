"""What is compiled is kept for later starts, whole files only; what cannot be kept costs nothing but time."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import pytest

from cert_ray.training.compiled import FOLDER_VARIABLE, compiled_code


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)


def _own() -> Path:
    return Path(os.environ[FOLDER_VARIABLE])


def _compile(name: str, content: bytes = b"library") -> None:
    (_own() / name).parent.mkdir(exist_ok=True)
    (_own() / name).write_bytes(content)


def _there() -> dict[str, bytes]:
    return {str(path.relative_to(_own())): path.read_bytes() for path in _own().rglob("*") if path.is_file()}


def test_a_later_start_begins_with_what_was_kept_and_nothing_else_stays() -> None:
    with compiled_code("one") as keep:
        assert _there() == {}
        _compile("ab/step.so")
        _compile("ab/step.lock", b"")
        keep()
        _compile("cd/evaluation.so")
        keep()
        _compile("ef/cut-short.so", b"libr")
        first = _own()
    assert not first.exists()
    assert FOLDER_VARIABLE not in os.environ
    with compiled_code("one"):
        assert _own() != first
        assert _there() == {"ab/step.so": b"library", "cd/evaluation.so": b"library"}
    with compiled_code("two"):
        assert _there() == {}


@pytest.mark.parametrize("damaged", [b"", b"libr", b"librarz"])
def test_what_was_damaged_is_kept_anew(tmp_path: Path, damaged: bytes) -> None:
    for _ in range(2):
        with compiled_code("one") as keep:
            assert _there() == {}
            _compile("ab/step.so")
            keep()
        (kept,) = (tmp_path / "cache").rglob("step.so*")
        assert kept.read_bytes() == b"library"
        kept.write_bytes(damaged)


def test_processes_at_once_do_not_see_what_the_other_compiles() -> None:
    with compiled_code("one") as keep:
        _compile("ab/step.so")
        here = os.environ.pop(FOLDER_VARIABLE)
        with compiled_code("one") as keep_too:
            assert _there() == {}
            _compile("ab/step.so")
            keep_too()
        os.environ[FOLDER_VARIABLE] = here
        _compile("ab/step.so", b"half of")
        keep()  # the other's is there, and stays
    with compiled_code("one"):
        assert _there() == {"ab/step.so": b"library"}


def test_a_folder_that_the_user_set_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "theirs"))
    with compiled_code("one") as keep:
        assert _own() == tmp_path / "theirs"
        keep()
    assert _own() == tmp_path / "theirs"
    assert not (tmp_path / "cache").exists()


def test_torchs_shared_folder_is_not_used_though_torch_sets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "torchinductor_me"
    monkeypatch.setenv(FOLDER_VARIABLE, str(shared))
    with compiled_code("one"):
        assert _own() != shared
    assert _own() == shared


def test_kinds_that_were_not_used_for_long_make_room(tmp_path: Path) -> None:
    kept = tmp_path / "cache" / "cert-ray" / "compiled"
    for number in range(18):
        (kept / str(number)).mkdir(parents=True)
        os.utime(kept / str(number), (number, number))
    with compiled_code("0"):
        pass
    assert {int(folder.name) for folder in kept.iterdir()} == {0, *range(3, 18)}


def test_where_nothing_can_be_kept_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file, where the folder should be")
    with caplog.at_level(logging.WARNING), compiled_code("one") as keep:
        _compile("ab/step.so")
        keep()
        assert set(_there()) == {"ab/step.so"}
    assert "could not be kept" in caplog.text


def test_without_a_home_training_goes_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def lost() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lost)
    with caplog.at_level(logging.WARNING), compiled_code("one") as keep:
        keep()
    assert "home directory" in caplog.text
