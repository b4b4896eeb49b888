"""The pipeline on an object store: preprocessed, packed, trained under kills and gone on with, exported, scored.

    python -m tests.chaos.stores gcs --output stores
    python -m tests.chaos.stores azure --azurite node_modules/.bin/azurite-blob --output stores
    python -m tests.chaos.stores s3 --output stores

Two workers train; killed behind a checkpoint, they go on, to the end. Then the last checkpoint and the model are taken
away, and one worker goes on from the checkpoint before.

In: the kind of store, whose emulator is started on this machine: moto (`s3`, of the test extra), gcp-storage-emulator
(`gcs`; `pip install gcsfs gcp-storage-emulator`) or Azurite (`azure`; `pip install adlfs`, `npm install azurite`). Out:
what each command said, below `--output`; exit status 0 when the dataset, the pack, the losses and the models are those
of a run on local files that nobody disturbed. `--output` keeps the local run for the next kind.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy
import yaml

from cert_ray import manifests, storage
from tests.chaos.run import ROOT, ChaosError
from tests.chaos.s3 import BUCKET, started_s3
from tests.evaluation.builders import write_problems
from tests.ray_heads import free_port

# Azurite's only account and its key, which its documentation gives.
_AZURITE = "devstoreaccount1"
_AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
STEPS, INTERVAL = 40, 10
REFUSE_EVERY = 50  # of so many requests one is refused with 503, but by Azurite none


@contextmanager
def store(kind: str, azurite: str) -> Iterator[tuple[str, Mapping[str, str]]]:
    """A running store of that kind: the URL of a bucket in it, and the environment of its clients."""
    if kind == "s3":
        with started_s3() as s3:
            s3.refuse_every = REFUSE_EVERY
            yield f"s3://{BUCKET}", s3.variables
        return
    if kind == "gcs":
        from tests.chaos.gcs import started_gcs

        with started_gcs(REFUSE_EVERY) as variables:
            yield f"gs://{BUCKET}", variables
        return
    with started_azurite(azurite) as variables:
        yield f"az://{BUCKET}", variables


@contextmanager
def started_azurite(program: str) -> Iterator[Mapping[str, str]]:
    """An Azurite with the container `BUCKET`, which keeps nothing."""
    from azure.storage.blob import ContainerClient

    port = free_port()
    options = ["--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    server = subprocess.Popen([program, "--blobPort", str(port), *options])
    try:
        text = (
            f"DefaultEndpointsProtocol=http;AccountName={_AZURITE};AccountKey={_AZURITE_KEY};"
            f"BlobEndpoint=http://127.0.0.1:{port}/{_AZURITE};"
        )
        ContainerClient.from_connection_string(text, BUCKET).create_container()  # it asks again until somebody answers
        yield {"AZURE_STORAGE_CONNECTION_STRING": text}
    finally:
        server.terminate()
        server.wait()


class Commands:
    """`cert-ray`, run again and again with one environment; what it says is kept below `output`."""

    def __init__(self, output: Path, variables: Mapping[str, str]) -> None:
        self._output = output
        own = {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(output / "tmp"),
            "RAY_worker_niceness": "0",
        }
        self._environment = {**os.environ, **own, **variables}
        (output / "tmp").mkdir(parents=True, exist_ok=True)
        self._number = 0
        self.last = output  # the file of what the last one said

    def start(self, *arguments: str) -> tuple[subprocess.Popen[bytes], Path]:
        """The command, in a process group of its own, and the file of what it says."""
        self._number += 1
        self.last = told = self._output / f"{self._number:02d}-{arguments[0]}.log"
        with told.open("wb") as sink:
            command = [sys.executable, "-m", "cert_ray", *arguments]
            environment, folder = self._environment, self._output
            process = subprocess.Popen(
                command, stdout=sink, stderr=sink, env=environment, cwd=folder, start_new_session=True
            )
        return process, told

    def run(self, *arguments: str) -> str:
        """What the command said; it must end well."""
        began = time.monotonic()
        process, told = self.start(*arguments)
        if process.wait() != 0:
            raise ChaosError(f"cert-ray {' '.join(arguments)}: status {process.returncode}; see {told}")
        print(f"{time.monotonic() - began:5.0f} s  cert-ray {' '.join(arguments)}", flush=True)
        return told.read_text()


def recipe(run: str, workers: int) -> dict[str, object]:
    """NumPy's own files, a tokenizer of 1,000 entries, and two models of a few steps."""
    sources = {"inputs": [str(Path(numpy.__file__).parent)], "exclude": ["*/tests/*"], "max_input_bytes": 1_500_000}
    train = {"steps": STEPS, "warmup_steps": 2, "micro_batch": 2, "gradient_accumulation": 1, "learning_rate": 1e-3}
    base = {**train, "workers": workers, "gradient_accumulation": 2 // workers, "zero_stage": 1}
    sketcher = {**train, "steps": 4, "workers": 1}
    return {
        "run": run,
        "libraries": ["numpy"],
        "preprocess": {"sources": sources},
        "tokenizer": {"vocab_size": 1_000, "sample_bytes": 500_000},
        "context_tokens": 64,
        "models": {
            "base": {"start": "tiny", "view": "base", "train": {**base, "checkpoint_every_steps": INTERVAL}},
            "sketcher": {"start": "base", "view": "sketcher", "train": sketcher},
        },
    }


@dataclass(frozen=True)
class Run:
    """One run of the recipe, and the folder for what its commands say."""

    url: str
    commands: Commands
    folder: Path

    def recipe(self, workers: int = 2) -> str:
        """The file of it."""
        path = self.folder / f"workers-{workers}.yaml"
        path.write_text(yaml.safe_dump(recipe(self.url, workers)))
        return str(path)

    def checkpoint(self, step: int) -> str:
        return f"{self.url}/models/base/checkpoints/step-{step:06d}"

    def prepare(self) -> None:
        for verb in ("preprocess", "tokenizer", "pack"):
            self.commands.run(verb, self.recipe())

    def train_under_a_kill(self) -> None:
        """The driver with all its workers ends behind the first checkpoint."""
        process, told = self.commands.start("train", self.recipe(), "--model", "base")
        while not storage.exists(f"{self.checkpoint(INTERVAL)}/complete.json"):
            if process.poll() is not None:
                raise ChaosError(f"training ended before it was killed; see {told}")
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"        killed behind step {INTERVAL}", flush=True)

    def train(self) -> None:
        self.commands.run("train", self.recipe())

    def train_the_end_again(self) -> None:
        """By one worker, from the last checkpoint but one of the two workers."""
        for lost in (f"{self.url}/models/base/{manifests.MANIFEST_NAME}", self.checkpoint(STEPS)):
            storage.remove(lost)
        self.commands.run("train", self.recipe(workers=1), "--model", "base")
        said = self.commands.last.read_text()
        if f"step {STEPS - INTERVAL} of {STEPS}, written by 2 workers, with 1" not in said:
            raise ChaosError(f"it did not go on from step {STEPS - INTERVAL} of two workers: {self.commands.last}")

    def checksums(self, stages: Mapping[str, tuple[str, str]]) -> dict[str, str]:
        """Of the files of `stages` by their manifests, and of the losses."""
        found = {
            f"{folder}/{file.name}": file.checksum
            for folder, (stage, verb) in stages.items()
            for file in manifests.read_manifest(f"{self.url}/{folder}", stage, verb).files
        }
        for folder in (folder for folder in stages if folder.startswith("models/")):
            lines = storage.read_text(f"{self.url}/{folder}/loss.jsonl").splitlines()
            found[f"{folder}/loss.jsonl"] = " ".join(str(json.loads(line)["loss"]) for line in lines)
        return found


_FIRST = {
    "dataset": ("dataset", "preprocess"),
    "tokens/base": ("tokens", "pack"),
    "models/base": ("model", "train"),
    "models/sketcher": ("model", "train"),
}
_AGAIN = {"models/base": ("model", "train")}


def undisturbed(output: Path) -> tuple[dict[str, str], dict[str, str]]:
    """What `checksums` finds of a run on local files, before and after its end was trained again."""
    kept = output / "local.json"
    if not kept.exists():
        folder = output / "local"
        shutil.rmtree(folder, ignore_errors=True)
        run = Run(str(folder / "run"), Commands(folder, {}), folder)
        run.prepare()
        run.train()
        first = run.checksums(_FIRST)
        run.train_the_end_again()
        kept.write_text(json.dumps([first, run.checksums(_AGAIN)]))
    first, again = json.loads(kept.read_text())
    return first, again


def export_and_score(run: Run, bucket: str) -> None:
    """What is asked of a finished run."""
    commands = run.commands
    commands.run("export", run.checkpoint(STEPS), f"{bucket}/exported")
    commands.run("summary", run.recipe())
    if "everything is finished" not in commands.run("status", run.recipe()):
        raise ChaosError(f"not finished: {commands.last}")
    with tempfile.TemporaryDirectory() as folder:
        problems = Path(write_problems(Path(folder) / "problems.jsonl", 2)).read_text()
    storage.write_text(f"{bucket}/problems.jsonl", problems)
    what = ("--problems", f"{bucket}/problems.jsonl", "--output", f"{bucket}/scores", "--max-tokens", "10")
    commands.run("evaluate", "--model", f"{run.url}/models/base", *what)
    if not storage.exists(f"{bucket}/scores/results.jsonl"):
        raise ChaosError(f"no results: {commands.last}")


def compare(expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise `ChaosError` where they differ."""
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ChaosError(f"not as on local files: {', '.join(wrong)}")
    print(f"        {len(expected)} files as on local files", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", choices=("s3", "gcs", "azure"))
    parser.add_argument("--azurite", default="azurite-blob", help="the program, for azure")
    parser.add_argument("--output", type=Path, default=Path("stores"))
    options = parser.parse_args()
    output = options.output.absolute()
    first, again = undisturbed(output)
    with store(options.store, options.azurite) as (bucket, variables):
        os.environ.update(variables)
        folder = output / options.store
        shutil.rmtree(folder, ignore_errors=True)
        run = Run(f"{bucket}/run", Commands(folder, variables), folder)
        run.prepare()
        run.train_under_a_kill()
        run.train()
        compare(first, run.checksums(_FIRST))
        export_and_score(run, bucket)
        model = storage.checksum(f"{run.url}/models/base/model.safetensors")
        if storage.checksum(f"{bucket}/exported/model.safetensors") != model:
            raise ChaosError("the exported checkpoint is not the model")
        run.train_the_end_again()
        compare(again, run.checksums(_AGAIN))


if __name__ == "__main__":
    main()
