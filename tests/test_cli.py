"""The command line: help that fits, dry runs that start nothing, errors in one line with a status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml
from botocore.exceptions import NoCredentialsError
from typer.testing import CliRunner

import cert_ray
from cert_ray import cli
from cert_ray.errors import TokenizerMismatchError
from tests.retrieval.builders import write_library

STAGES = [
    "preprocess",
    "library-docs",
    "tokenizer",
    "pack",
    "train",
    "export",
    "serve",
    "generate",
    "sketch",
    "evaluate",
]
VERBS = [
    *STAGES,
    "fetch-base",
    "inspect",
    "remove",
    "reproduce",
    "compare",
    "export-tasks",
    "demo",
    "status",
    "summary",
    "doctor",
    "drain",
]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["cert-ray", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_screen_and_shows_an_example(verb: str) -> None:
    result = CliRunner().invoke(cli.app, [verb, "--help"])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) <= 50
    assert f"Example: cert-ray {verb}" in " ".join(result.output.split()) or verb == "sketch"


def test_every_verb_is_there_and_no_other() -> None:
    assert {command.name or command.callback.__name__ for command in cli.app.registered_commands} == set(VERBS)  # type: ignore[union-attr]


def test_sketch_prints_the_sketch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.py").write_text('df = pd.read_csv("a.csv", nrows=10)\n')
    assert run(monkeypatch, "sketch", str(tmp_path / "a.py")) == 0
    assert capsys.readouterr().out == "df = pd.read_csv(string, nrows=number)\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sketch", "none.py"], "none.py: no such file"),
        (["preprocess", "none.yaml"], "no such recipe"),
        (["remove", "none"], "give --repo, --source or --path-prefix"),
        (["serve", "--model", "a", "--sketcher", "b"], "give either --model, or --sketcher and --generator"),
        (["evaluate", "--problems", "none.jsonl", "--samples", "none"], "none.jsonl"),
    ],
)
def test_unusable_options_end_with_status_2_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        ("mark.py", b"\xef\xbb\xbfx = 'caf\xc3\xa9'\n"),
        ("lines.py", b"x = 'cafe'\r\n"),
        ("coded.py", b"# coding: latin-1\nx = 'caf\xe9'\n"),
    ],
)
def test_a_file_is_decoded_as_python_decodes_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, payload: bytes
) -> None:
    (tmp_path / name).write_bytes(payload)
    assert run(monkeypatch, "sketch", str(tmp_path / name)) == 0
    assert capsys.readouterr().out.endswith("x = string\n")


def test_a_pipe_is_sketched_as_a_file_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    os.write(write, b"x = 1\n")
    os.close(write)
    assert run(monkeypatch, "sketch", f"/dev/fd/{read}") == 0
    os.close(read)
    assert capsys.readouterr().out == "x = number\n"


def test_what_is_no_file_to_be_sketched_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wide.py").write_bytes("x = 1\n".encode("utf-16"))
    with (tmp_path / "long.py").open("wb") as stream:
        stream.truncate(10_000_001)  # sparse
    for name, told in (("", "a folder"), ("wide.py", "not text that Python reads"), ("long.py", "longer than")):
        assert run(monkeypatch, "sketch", str(tmp_path / name)) == 2
        assert told in capsys.readouterr().err


def test_what_a_disk_refuses_ends_in_one_line_that_names_the_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop.py").symlink_to("loop.py")
    assert run(monkeypatch, "sketch", str(tmp_path / "loop.py")) == 1
    assert capsys.readouterr().err.startswith(f"cert-ray: {tmp_path}/loop.py: Too many levels of symbolic links. Check")
    docs = ["library-docs", str(write_library(tmp_path)), "--output"]
    assert run(monkeypatch, *docs, str(tmp_path)) == 1
    assert capsys.readouterr().err.startswith(f"cert-ray: {tmp_path}: Is a directory. Check")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (NoCredentialsError(), "Unable to locate credentials. Check"),
        (ConnectionRefusedError(111, "refused"), "[Errno 111] refused. Check"),
        (TimeoutError(), "TimeoutError. Check"),
        (FileNotFoundError("bucket/x.py"), "FileNotFoundError: bucket/x.py. Check"),
    ],
)
def test_what_a_store_refuses_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, told: str
) -> None:
    monkeypatch.setattr("cert_ray.storage.is_folder", mock.Mock(side_effect=error))
    assert run(monkeypatch, "sketch", "s3://bucket/x.py") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cert-ray: {told}")


def test_any_other_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cert_ray.storage.is_folder", mock.Mock(side_effect=RuntimeError("a fault of ours")))
    monkeypatch.setattr(sys, "argv", ["cert-ray", "sketch", "x.py"])
    with pytest.raises(RuntimeError, match="a fault of ours"):
        cli.main()


def test_who_interrupts_is_told_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cert_ray.storage.is_folder", mock.Mock(side_effect=KeyboardInterrupt))
    assert run(monkeypatch, "sketch", "x.py") == 130
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["pack", "train"])
def test_a_recipe_without_models_gives_nothing_to_pack_or_train(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    recipe = {"run": str(tmp_path), "libraries": None, "preprocess": {"sources": {"inputs": [str(tmp_path)]}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert run(monkeypatch, verb, str(tmp_path / "r.yaml")) == 2
    assert "models: this recipe has none" in capsys.readouterr().err


def test_a_value_as_jobs_take_it_is_told_to_want_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(tmp_path / "r.yaml")
    assert run(monkeypatch, "train", recipe, "--set", "workers=2", "run=runs/mine") == 2
    assert capsys.readouterr().err.endswith("to set a value of the recipe, write --set run=runs/mine\n")
    assert run(monkeypatch, "train", recipe, "more") == 2
    assert "--set" not in capsys.readouterr().err


def test_a_tokenizer_that_does_not_belong_is_an_input_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = {"run": str(tmp_path), "libraries": ["x"], "preprocess": {"sources": {"inputs": [str(tmp_path)]}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    refused = TokenizerMismatchError("start: a, b have different tokenizers, and a run has one.")
    monkeypatch.setattr("cert_ray.cli.training.perform", mock.Mock(side_effect=refused))
    assert run(monkeypatch, "tokenizer", str(tmp_path / "r.yaml")) == 2


def test_pack_tells_how_many_tokens_there_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {"run": str(tmp_path), "libraries": ["x"], "preprocess": {"sources": {"inputs": [str(tmp_path)]}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    packed = mock.Mock(counts={"tokens": 90, "held_out_tokens": 9}, dropped={"other_library": 3}, notes={"pad_id": 1})
    monkeypatch.setattr("cert_ray.cli.training.perform", lambda *_: {"xl": packed})
    assert run(monkeypatch, "pack", str(tmp_path / "r.yaml"), "--view", "xl") == 0
    told = json.loads(capsys.readouterr().out)["xl"]
    assert told == {"tokens": 90, "held_out_tokens": 9, "dropped": {"other_library": 3}, "pad_id": 1}


def test_a_folder_that_is_no_checkpoint_is_not_called_a_damaged_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "export", str(tmp_path), str(tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert "no checkpoint" in said
    assert "Delete" not in said


def test_the_package_runs_as_the_command_does() -> None:
    done = subprocess.run([sys.executable, "-m", "cert_ray", "--version"], timeout=60, capture_output=True, check=True)
    assert done.stdout.decode().strip() == cert_ray.__version__


def test_source_that_is_not_python_3_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.py").write_text("print 'x'\n")
    assert run(monkeypatch, "sketch", str(tmp_path / "old.py")) == 1
    assert "cert-ray:" in capsys.readouterr().err


def test_a_model_that_cannot_be_served_is_refused_before_ray_is_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cert_ray.operations.on_ray.ray_session", lambda _: pytest.fail("Ray was started"))
    (tmp_path / "config.json").write_text("{}")
    assert run(monkeypatch, "serve", "--sketcher", str(tmp_path), "--generator", str(tmp_path)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"cert-ray: {tmp_path}: it cannot be the sketcher: no tokenizer.json in it. Give the folder")


def test_serve_may_hold_every_answer_to_its_sketch() -> None:
    stages = ["--sketcher", "s", "--generator", "g"]
    result = CliRunner().invoke(cli.app, ["serve", *stages, "--mode", "constrained", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["models"]["cert"]["cascade"]["mode"] == "constrained"


def test_generate_says_what_it_would_ask_and_loads_no_model(tmp_path: Path) -> None:
    arguments = ["generate", "x = ", "--model", str(tmp_path / "absent"), "--n", "3", "--dry-run"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["n"] == 3


def test_dry_run_prints_every_option_and_writes_nothing(tmp_path: Path) -> None:
    recipe = {"run": str(tmp_path / "run"), "libraries": ["x"], "preprocess": {"sources": {"inputs": [str(tmp_path)]}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    arguments = [
        "preprocess",
        str(tmp_path / "r.yaml"),
        "--limit",
        "7",
        "--set",
        "tokenizer.vocab_size=999",
        "--dry-run",
    ]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    printed = yaml.safe_load(result.output)
    assert printed["libraries"] == ["x"]
    assert printed["preprocess"]["sources"]["limit"] == 7
    assert printed["tokenizer"]["vocab_size"] == 999
    assert printed["preprocess"]["minhash"]["bands"] == 25
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.yaml"]


@pytest.mark.parametrize("verb", ["preprocess", "tokenizer", "pack", "train"])
@pytest.mark.parametrize("given", [None, ["x"]])
def test_libraries_of_the_recipe_can_be_named_on_the_command_line(
    tmp_path: Path, verb: str, given: list[str] | None
) -> None:
    recipe = {"run": str(tmp_path / "run"), "preprocess": {"sources": {"inputs": [str(tmp_path)]}}}
    recipe["models"] = {"base": {"start": "tiny", "view": "base", "train": {"steps": 2_000}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**recipe, **({"libraries": given} if given else {})}))
    arguments = [verb, str(tmp_path / "r.yaml"), "--library", "polars", "--library", "duckdb", "--dry-run"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.output)["libraries"] == ["polars", "duckdb"]


def test_a_librarys_documentation_is_written_for_retrieve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "docs.jsonl"
    assert run(monkeypatch, "library-docs", str(write_library(tmp_path)), "--as", "mk", "--output", str(output)) == 0
    assert "mk.Frame.peek" in output.read_text()
    said = capsys.readouterr()
    assert "6 functions, classes and methods" in said.out
    assert "monkey.fast_sum" in said.err
    options = ["--endpoint", "http://x", "--retrieve", str(output), "--dry-run"]
    assert run(monkeypatch, "evaluate", "--problems", "p.jsonl", *options) == 0
    assert json.loads(capsys.readouterr().out)["source"] == {"endpoint": "http://x", "retrieve": str(output)}


def test_verbs_that_need_no_model_do_not_wait_for_torch() -> None:
    needed = "cert_ray.cli", "cert_ray.operations.evaluating", "cert_ray.evaluation.harness", "cert_ray.retrieval"
    code = f"import sys, {', '.join(needed)}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
