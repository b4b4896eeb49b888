r"""From trained models to pass@k, as a Ray job; the recipe's `evaluation` says on what and how.

    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --runtime-env cluster/runtime-env.yaml -- \
        python jobs/evaluate.py jobs/numpy.yaml [KEY=VALUE ...]

Generated code runs in bubblewrap on the nodes, which must allow it. In Kubernetes, use
cluster/kubernetes/jobs/evaluate; if bubblewrap cannot start, cluster/kubernetes/evaluation scores the answers drawn.
Submitting twice gives one result: what is finished is reused. The last line is the outcome, as JSON.
"""

from cert_ray.operations import pipeline
from cert_ray.operations.job import run_job

if __name__ == "__main__":
    run_job(lambda recipe: pipeline.run_evaluate(recipe))
