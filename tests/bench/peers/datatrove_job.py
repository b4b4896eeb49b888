"""datatrove's side: optional line filters, then its four MinHash stages (14 bands of 8, 5-grams), local or on Ray.

Runs in the peers' environment and imports nothing of cert-ray. In: a folder of Parquet tables with `content`. Out:
`OUTPUT/kept/*.parquet`, and with `--clusters` also `OUTPUT/removed/*.parquet`, both with cluster ids.
`shingles` writes its own view of every document instead: the set of hashed 5-grams, as `OUTPUT/shingles.parquet`.
"""

import argparse
import json
import time
from pathlib import Path

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import ParquetWriter
from datatrove.utils.typeshelper import Languages

CONFIG = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)


def is_worth_keeping(document):
    """The line rules of cleaning, for which datatrove has no filter of its own: it lends the frame, this the rule."""
    lines = document.text.split("\n")
    longest = max(map(len, lines))
    return len(lines) >= 5 and longest <= 1000 and len(document.text) / len(lines) <= 100


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=("minhash", "shingles"))
    parser.add_argument("--tables", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--clean", action="store_true", help="filter by lines before")
    parser.add_argument("--clusters", action="store_true", help="keep cluster ids, and what was removed")
    parser.add_argument("--executor", choices=("local", "ray"), default="local")
    given = parser.parse_args()
    if given.job == "shingles":
        shingles(given.tables, given.output)
        return
    if given.executor == "ray":
        import ray

        ray.init(address="local", num_cpus=given.workers, include_dashboard=False, log_to_driver=False)
    started = time.perf_counter()
    run(given)
    print(json.dumps({"seconds": time.perf_counter() - started}))


def reader(tables):
    return ParquetReader(tables, text_key="content", glob_pattern="*.parquet", read_metadata=False)


def run(given):
    tables, output = given.tables, given.output
    files = len(list(Path(tables).glob("*.parquet")))
    read = [reader(tables)]
    if given.clean:
        # As datatrove's own examples do: what later stages read is what the filters wrote.
        tables = f"{output}/clean"
        execute(
            [*read, LambdaFilter(is_worth_keeping), ParquetWriter(tables, "${rank}.parquet")], "clean", given, files
        )
        read = [ParquetReader(tables, glob_pattern="*.parquet", read_metadata=False)]
        files = len(list(Path(tables).glob("*.parquet")))
    signature = MinhashDedupSignature(f"{output}/signatures", config=CONFIG, language=Languages.english)
    execute([*read, signature], "signatures", given, files)
    buckets = MinhashDedupBuckets(f"{output}/signatures", f"{output}/buckets", config=CONFIG)
    execute([buckets], "buckets", given, CONFIG.num_buckets)
    cluster = MinhashDedupCluster(
        f"{output}/buckets", f"{output}/remove", config=CONFIG, save_cluster_id=given.clusters
    )
    execute([cluster], "cluster", given, 1)
    removed = ParquetWriter(f"{output}/removed") if given.clusters else None
    keep = MinhashDedupFilter(f"{output}/remove", exclusion_writer=removed, load_cluster_ids=given.clusters)
    execute([*read, keep, ParquetWriter(f"{output}/kept")], "filter", given, files)


def execute(steps, name, given, tasks):
    logs = f"{given.output}/logs/{name}"
    if given.executor == "local":
        LocalPipelineExecutor(steps, tasks=tasks, workers=given.workers, logging_dir=logs).run()
        return
    from datatrove.executor.ray import RayPipelineExecutor

    RayPipelineExecutor(
        steps, tasks=tasks, workers=given.workers, logging_dir=logs, cpus_per_task=1, mem_per_cpu_gb=1
    ).run()


def shingles(tables, output):
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    step = MinhashDedupSignature(output, config=CONFIG, language=Languages.english)
    rows = []
    for path in sorted(Path(tables).glob("*.parquet")):
        for text in pq.read_table(path, columns=["content"]).column("content").to_pylist():
            rows.append(np.unique(step.get_shingles(text)))  # noqa: PERF401
    Path(output).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"shingles": pa.array(rows, pa.list_(pa.uint64()))}), f"{output}/shingles.parquet")
    print(json.dumps({"documents": len(rows)}))


if __name__ == "__main__":
    main()
