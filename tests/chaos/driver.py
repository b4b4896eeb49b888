"""One attempt at preprocessing, as a process of its own that joins a cluster by address: what a kill can hit."""

from __future__ import annotations

import argparse
import logging
import os

from tests.chaos import events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--unit-bytes", type=int, required=True)
    parser.add_argument("--workers", type=int)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")

    import ray

    from cert_ray import storage
    from cert_ray.dataset.on_ray import preprocess
    from cert_ray.dataset.options import PreprocessConfig

    events.install()
    given_on = ("CHAOS_", "AWS_", "PYTHONPATH")  # to workers, which inherit from their node
    variables = {name: value for name, value in os.environ.items() if name.startswith(given_on)}
    ray.init(
        address=given.address,
        namespace=f"chaos-{os.getpid()}",
        log_to_driver=False,
        runtime_env={"worker_process_setup_hook": events.HOOK, "env_vars": variables},
    )
    sources = {"inputs": [given.corpus], "unit_bytes": given.unit_bytes}
    manifest = preprocess(PreprocessConfig.model_validate({"sources": sources}), given.output, given.workers)
    storage.write_text(storage.join(given.output, "done"), f"{manifest.rows_kept}\n")
    ray.shutdown()


if __name__ == "__main__":
    main()
