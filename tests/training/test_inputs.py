"""What a run's digests depend on, and what they do not."""

from __future__ import annotations

import os

import pytest

from cert_ray import manifests
from cert_ray.config import Config
from cert_ray.errors import ConfigError
from cert_ray.training import inputs
from cert_ray.training.bases import Origin
from cert_ray.training.on_ray import _notes
from cert_ray.training.records import StepRecord


@pytest.mark.parametrize("noted", [{"machine": "one GPU"}, {"machines": {"one GPU": 3, "two cores": 5}}])
def test_a_base_is_the_same_wherever_it_was_trained(make_config, tmp_path, noted):
    digests = []
    for notes in (noted, {}, {**noted, "last_loss": 1.0}):
        manifests.write_manifest(str(tmp_path), manifests.summarize(inputs.STAGE, Config(), "inputs", [], notes))
        digests.append(inputs.check(make_config(base=str(tmp_path))).run_digest)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_base_without_a_manifest_is_known_by_what_its_files_hold(make_config, tmp_path, name):
    """Of files of one size; a README is nobody's input."""
    base = tmp_path / "base"
    base.mkdir()
    digests = []
    for content in ("one", "two"):
        (base / name).write_text(content)
        (base / "README.md").write_text(content * 2)
        digests.append(inputs.check(make_config(base=str(base))).run_digest)
    (base / "README.md").write_text("other")
    assert digests[0] != digests[1] == inputs.check(make_config(base=str(base))).run_digest


@pytest.mark.parametrize(
    ("options", "cluster", "told"),
    [
        ({"workers": 2}, {"CPU": 2}, None),
        ({"workers": 3}, {"CPU": 2}, "3 workers want 3 CPUs, and the cluster has 2. If none will join"),
        ({"workers": 3, "min_workers": 2}, {"CPU": 2}, None),
        ({"workers": 2, "cpus_per_worker": 2}, {"CPU": 3}, "2 workers want 4 CPUs, and the cluster has 3"),
        ({"use_gpu": True}, {"CPU": 8}, "1 workers want 1 GPUs, and the cluster has 0"),
        ({"use_gpu": True}, {"CPU": 8, "GPU": 1}, None),
    ],
)
def test_a_run_that_waits_for_nodes_says_for_what(make_config, options, cluster, told):
    found = inputs.waits_for(make_config(**options), cluster)
    assert found is None if told is None else told in found


def test_a_base_may_hold_a_file_whose_name_is_no_text(make_config, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"")
    assert inputs.check(make_config(base=str(base))).inputs_digest


def test_a_model_takes_over_what_is_known_of_its_base(make_config, tmp_path):
    base = Origin(base="a", model="A", quantisation="Q4_1", licence="mit", file_sha256="")
    manifest = manifests.summarize(inputs.STAGE, base, "inputs", [], {"base": "a", "dequantised_from": "Q4_1"})
    manifests.write_manifest(str(tmp_path), manifest)
    step = StepRecord(**{name: 1 for name, field in StepRecord.model_fields.items() if field.is_required()})
    notes = _notes(inputs.check(make_config(base=str(tmp_path))), [step], "base", {})
    assert (notes["dequantised_from"], notes["licence"]) == ("Q4_1", "mit")


@pytest.mark.parametrize("option", ["output", "tokens", "base", "tokenizer"])
def test_memory_of_this_process_is_refused_whoever_asks(option, make_config):
    config = make_config().model_copy(update={option: "memory://run/model"})
    with pytest.raises(ConfigError, match="memory://run/model: that is this process' own memory"):
        inputs.check(config)


def test_a_finished_model_of_another_run_is_told_with_what_made_the_difference(make_config, tmp_path):
    """Not with what never does, nor with an option that the earlier version did not know."""
    output = str(tmp_path / "model")
    before = inputs.check(make_config(output=output, workers=2, gradient_accumulation=1))
    options = {name: value for name, value in before.config.model_dump().items() if name != "deterministic"}
    manifest = manifests.summarize(inputs.STAGE, Config(), before.inputs_digest, [], {"run_digest": before.run_digest})
    manifests.write_manifest(output, manifest.model_copy(update={"config": options}))
    shared_out = {"output": output, "workers": 1, "gradient_accumulation": 2, "checkpoint_every_steps": 7}
    assert inputs.finished(inputs.check(make_config(**shared_out))) is not None
    with pytest.raises(ConfigError, match=r"another run \(differs in learning_rate, steps\)\."):
        inputs.finished(inputs.check(make_config(**shared_out | {"steps": 77, "learning_rate": 0.5})))
    with pytest.raises(ConfigError, match=r"another run \(differs in deterministic\)\."):
        inputs.finished(inputs.check(make_config(**shared_out | {"deterministic": True})))


def test_a_fetched_base_is_not_trained_over(make_config, tmp_path):
    """It is the same stage's folder, but no run's."""
    base = Origin(base="a", model="A", quantisation=None, file_sha256="")
    manifests.write_manifest(str(tmp_path), manifests.summarize(inputs.STAGE, base, "inputs", [], {"base": "a"}))
    with pytest.raises(ConfigError, match=r"holds a fetched base\. Choose another output"):
        inputs.finished(inputs.check(make_config(output=str(tmp_path))))
