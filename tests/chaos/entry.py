"""A job of `jobs/`, or a verb of the command line, in a process of its own that joins a cluster: what a fault can hit.

python -m tests.chaos.entry --address ADDRESS [--evaluation] jobs/pack.py RECIPE
python -m tests.chaos.entry --address ADDRESS --evaluation cert-ray evaluate ...
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys

from tests.chaos import events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True)
    parser.add_argument("--evaluation", action="store_true", help="log what an evaluation does, not preprocessing")
    parser.add_argument("what", help="a path in jobs/, or cert-ray")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args()

    import ray

    hook = events.EVALUATION_HOOK if given.evaluation else events.HOOK
    (events.install_evaluation if given.evaluation else events.install)()
    given_on = ("CHAOS_", "PYTHONPATH", "XDG_CACHE_HOME")  # to workers, which inherit from their node
    variables = {name: value for name, value in os.environ.items() if name.startswith(given_on)}
    ray.init(
        address=given.address,
        namespace=f"chaos-{os.getpid()}",
        runtime_env={"worker_process_setup_hook": hook, "env_vars": variables},
    )
    sys.argv = [given.what, *given.arguments]
    try:
        if given.what == "cert-ray":
            from cert_ray.cli import main as verb

            verb()
        else:
            runpy.run_path(given.what, run_name="__main__")
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
