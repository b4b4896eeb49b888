"""What a run's digests depend on, and what they do not."""

from __future__ import annotations

import pytest

from cert_ray import manifests
from cert_ray.config import Config
from cert_ray.training import inputs


@pytest.mark.parametrize("noted", [{"machine": "one GPU"}, {"machines": {"one GPU": 3, "two cores": 5}}])
def test_a_base_is_the_same_wherever_it_was_trained(make_config, tmp_path, noted):
    digests = []
    for notes in (noted, {}, {**noted, "last_loss": 1.0}):
        manifests.write_manifest(str(tmp_path), manifests.summarize(inputs.STAGE, Config(), "inputs", [], notes))
        digests.append(inputs.check(make_config(base=str(tmp_path))).run_digest)
    assert digests[0] == digests[1] != digests[2]
