"""Combinations that cannot work are refused by name; the digest follows what the weights depend on."""

from __future__ import annotations

import math

import pytest

from cert_ray.errors import ConfigError
from cert_ray.training.config import TrainConfig

REQUIRED = {"base": "tiny", "tokens": "tokens", "output": "model", "steps": 2_000}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"warmup_steps": 2_000}, "lower it or raise steps"),
        ({"precision": "bf16", "zero_stage": 0}, "needs zero_stage 1, 2 or 3"),
        ({"precision": "fp16"}, "needs use_gpu"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"schedule": "wsd", "decay_share": 0.6}, "before warmup_steps 1000 end; lower one of them"),
        ({"steps": 0}, "steps"),
        ({"learning_rate": math.inf}, "learning_rate: Input should be a finite number"),
        ({"max_gradient_norm": math.inf}, "max_gradient_norm"),
        ({"on_spike": {"minimum_rise_nats": math.inf}}, r"on_spike\.minimum_rise_nats"),
        ({"zero_stage": 4}, "zero_stage"),
        ({"workers": 2, "min_workers": 3}, "more than workers 2; lower it"),
        (
            {"learning_rte": 1e-3},
            "learning_rte: unknown option; perhaps learning_rate is meant; known are activation_checkpointing",
        ),
    ],
)
def test_refuses_what_cannot_work(options, named):
    with pytest.raises(ConfigError, match=named):
        TrainConfig.from_mapping(REQUIRED | options, "recipe.yaml")


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"output": "elsewhere"}, True),
        ({"keep_checkpoints": 9, "checkpoint_every_steps": 5, "max_failures": 0}, True),
        ({"tokens": "moved"}, True),
        ({"seed": 1}, False),
        ({"workers": 2}, False),
        ({"workers": 2, "gradient_accumulation": 2}, True),  # as many rows per step
        ({"workers": 4, "min_workers": 2, "micro_batch": 5, "gradient_accumulation": 2}, True),
        ({"compile": True}, False),
        ({"deterministic": True}, False),
        ({"learning_rate": 1e-3}, False),
        ({"schedule": "wsd"}, False),
    ],
)
def test_the_digest_follows_what_the_weights_depend_on(options, same):
    one = TrainConfig.from_mapping(REQUIRED, "recipe.yaml").result_digest()
    other = TrainConfig.from_mapping(REQUIRED | options, "recipe.yaml").result_digest()
    assert (one == other) is same


def test_runs_of_earlier_versions_go_on_where_a_new_option_is_not_used():
    """Digest of commit cc24adf, which did not know `deterministic`."""
    digest = TrainConfig.from_mapping(REQUIRED, "recipe.yaml").result_digest()
    assert digest == "97eb27b7473706b45f5b0b7b1512112f"
