r"""From inputs to the annotated dataset, as a Ray job.

    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --runtime-env cluster/runtime-env.yaml -- \
        python jobs/preprocess.py jobs/numpy.yaml [KEY=VALUE ...]

Submitting twice gives one result: what is finished is reused. The last line is the outcome, as JSON.
"""

from cert_ray.operations import pipeline
from cert_ray.operations.job import run_job

if __name__ == "__main__":
    run_job(lambda recipe: pipeline.run_preprocess(recipe))
