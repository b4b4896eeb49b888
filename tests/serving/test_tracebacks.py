"""The reason in what Serve says of replicas that do not start."""

from __future__ import annotations

import pytest

from cert_ray.serving.tracebacks import reason_in

# As Serve 2.60 gave it for weights of another shape, its middle left out.
FAILED = """The deployment failed to start 3 times in a row. See controller logs for details. Error:
\x1b[36mray::ServeReplica:cert-ray:engine.initialize_and_get_metadata()\x1b[39m (pid=1, ip=192.0.2.2)
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "auto_factory.py", line 406, in from_pretrained
RuntimeError: You set `ignore_mismatched_sizes` to `False`, thus raising an error.

The above exception was the direct cause of the following exception:

\x1b[36mray::ServeReplica:cert-ray:engine.initialize_and_get_metadata()\x1b[39m (pid=1, ip=192.0.2.2)
  File "model_folders.py", line 94, in load_model
    raise InputError(folder, f"transformers cannot load it: {error}", cure) from error
"""


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (
            "cert_ray.errors.InputError: /m: transformers\n  cannot load it. Give",
            "/m: transformers cannot load it. Give",
        ),
        ("torch.OutOfMemoryError: no room", "torch.OutOfMemoryError: no room"),
        ("MemoryError", "MemoryError"),
    ],
)
def test_the_reason_of_a_replica_that_does_not_start_is_its_last_error(last: str, reason: str) -> None:
    assert reason_in(FAILED + last) == reason


def test_without_an_error_the_message_is_the_reason() -> None:
    assert reason_in("No node has\n2 GPUs.") == "No node has 2 GPUs."
