"""A server on a private Ray, as `cert-ray serve` starts one, over two paced engines: the module's test asks it.

In: a folder for the models `fast` and `slow`, 1 and 20 ms a token. Out, on standard output: its URL. It stops with its
input.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path


def main() -> None:
    warnings.simplefilter("ignore")  # Serve's own, of pydantic
    from cert_ray.operations.on_ray import ray_session
    from cert_ray.serving.deployment import ServerConfig
    from cert_ray.serving.on_ray import start_server
    from tests.serving.paced import PacedEngines

    models = {}
    for name, token_s in (("fast", "0.001"), ("slow", "0.02")):
        folder = Path(sys.argv[1]) / token_s
        folder.mkdir()
        models[name] = {"model": str(folder)}
    options = {"models": models, "replicas": 2, "num_cpus": 0.1, "max_ongoing_requests": 2, "health_check_period_s": 1}
    config = ServerConfig.from_mapping({**options, "request_timeout_s": 60, "limits": {"max_n": 400}}, "test")
    with ray_session(), start_server(config, PacedEngines) as app:
        print(app.base_url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
