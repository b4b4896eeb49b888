"""What a model folder says of itself, and what is said where its files are none of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cert_ray import storage
from cert_ray.errors import InputError
from cert_ray.serving.answering import ModelConfig
from cert_ray.serving.model_folders import trained_view


def test_the_view_is_what_the_config_says(tmp_path: Path) -> None:
    assert trained_view(str(tmp_path)) is None
    for text, view in (("[]", None), ("{", None), ("{}", None), (json.dumps({"cert_ray_view": "base"}), "base")):
        (tmp_path / "config.json").write_text(text)
        assert trained_view(str(tmp_path)) == view


def refused(folder: Path) -> str:
    """What is said of the folder where options are validated that depend on the view."""
    with pytest.raises(InputError) as found:
        ModelConfig.from_mapping({"model": str(folder), "cascade": {"mode": "sketch_only"}}, "test")
    return str(found.value)


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.json"
    config.mkdir()
    assert f"{config}: it is a folder. Give" in refused(tmp_path)
    config.rmdir()
    config.write_text("[" * 100_000)
    assert f"{config}: its JSON is nested too deeply. Give" in refused(tmp_path)

    def denied(url: str) -> str:
        raise PermissionError(13, "Permission denied", url)

    monkeypatch.setattr(storage, "read_text", denied)  # root may read everything
    assert f"{config}: this user has no permission to read it. Give" in refused(tmp_path)
