"""Every error that cert-ray raises on purpose. Each survives pickling, since Ray sends errors between processes.

    CertRayError
    |-- ConfigError             an option or recipe that cannot be used (also a ValueError)
    |   `-- TokenizerMismatchError  a tokenizer that does not belong to the model or the packed tokens
    |-- InputError              an input that is missing, unreadable, or not what its name says
    |   |-- MissingColumnsError     a Parquet or JSONL input without the columns it needs
    |   `-- BenchmarkFormatError    a benchmark line without a required field
    |-- SketchError             a source to be sketched that Python 3 cannot parse (also a ValueError)
    |-- SchemaVersionError      a folder written by another schema version or another stage
    |-- NotFinishedError        a folder whose stage never wrote its manifest
    |-- ShardCorruptError       a shard that disagrees with its manifest
    |-- SupersededError         a task of a run whose folder another run has taken over
    |-- StorageFullError        a disk with too little room for what is to be written
    |-- DiskFullError           a disk that filled up while a checkpoint or model was written, or copied for reading
    |-- ConservationError       rows read != rows kept + rows dropped
    |-- CheckpointError         a checkpoint that belongs to another run
    |   |-- DamagedCheckpointError    a checkpoint with a file that is missing or differs from what was written
    |   `-- NoWholeCheckpointError    a run whose checkpoints are all damaged
    |-- TrainingDivergedError   a loss that is not finite, or rose and stayed there
    |-- TrainingMemoryError     a training worker without enough memory, with the estimate
    |-- TrainingFailedError     training workers died more often than the run allows
    |-- ClusterError            a Ray cluster that cannot be joined: dead, with another token, of another version
    |-- SandboxError            generated code could not be run at all: never the fault of that code
    `-- RequestError            an HTTP request that is refused, with its status and OpenAI error fields
        |-- RequestCancelledError   nobody waits for the answer any more
        `-- DeadlineError           the answer was not ready by its deadline

Expected bad data is not an error: it becomes a `schemas.Dropped`, and is counted.
"""

from __future__ import annotations


class CertRayError(Exception):
    """Root of the errors that cert-ray raises on purpose; `str()` says what happened and what to change."""


class ConfigError(CertRayError, ValueError):
    """An option or recipe that cannot be used: names the option, the value, and what is allowed."""


class InputError(CertRayError):
    """An input that is missing, unreadable, or not what its name says."""

    def __init__(self, uri: str, problem: str, cure: str) -> None:
        super().__init__(uri, problem, cure)  # pickle replays these arguments
        self.uri, self.problem, self.cure = uri, problem, cure

    def __str__(self) -> str:
        return f"{self.uri}: {self.problem}. {self.cure}"


class MissingColumnsError(InputError):
    """A Parquet or JSONL input without the columns it needs."""


class BenchmarkFormatError(InputError):
    """A benchmark file with a line that cannot be used; `uri` carries the line number."""


class SketchError(CertRayError, ValueError):
    """The running interpreter cannot parse the source that was to be sketched."""


class SchemaVersionError(CertRayError):
    """A folder was written by another stage or by another version of its schema."""

    def __init__(self, uri: str, expected: str, actual: str, cure: str) -> None:
        super().__init__(uri, expected, actual, cure)
        self.uri, self.expected, self.actual, self.cure = uri, expected, actual, cure

    def __str__(self) -> str:
        return f"{self.uri}: expected {self.expected}, found {self.actual}. {self.cure}"


class NotFinishedError(CertRayError):
    """A folder without `manifest.json`: its stage has not run, or did not finish."""

    def __init__(self, uri: str, verb: str) -> None:
        super().__init__(uri, verb)
        self.uri, self.verb = uri, verb

    def __str__(self) -> str:
        return f"{self.uri} has no manifest.json: run `cert-ray {self.verb}` (again) to finish it."


class ShardCorruptError(CertRayError):
    """A shard disagrees with its manifest."""

    def __init__(self, uri: str, expected: str, actual: str, verb: str) -> None:
        super().__init__(uri, expected, actual, verb)
        self.uri, self.expected, self.actual, self.verb = uri, expected, actual, verb

    def __str__(self) -> str:
        return (
            f"{self.uri}: the manifest says {self.expected}, found {self.actual}. "
            f"Delete that file and run `cert-ray {self.verb}` again: only what is missing is rebuilt."
        )


class SupersededError(CertRayError):
    """Another run has taken over the folder that a task was about to write to; nothing there was changed."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.uri = uri

    def __str__(self) -> str:
        return f"{self.uri}: another run has begun in this folder, so this one ends. Give each run a folder of its own."


class StorageFullError(CertRayError):
    """A disk has too little room for what is to be written; nothing was written."""

    def __init__(self, uri: str, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(uri, needed_bytes, free_bytes)
        self.uri, self.needed_bytes, self.free_bytes = uri, needed_bytes, free_bytes

    def __str__(self) -> str:
        return (
            f"{self.uri}: {self.needed_bytes / 1e6:,.0f} MB are needed (reserve included), but the disk has only "
            f"{self.free_bytes / 1e6:,.0f} MB left. Free some, or give another `run`; what is finished is reused."
        )


class DiskFullError(CertRayError):
    """A disk filled up while a checkpoint or model was written, or copied for reading: says what is left where."""


class ConservationError(CertRayError):
    """Rows were lost or made up: rows read != rows kept + rows dropped."""

    def __init__(self, stage: str, read: int, kept: int, dropped: int) -> None:
        super().__init__(stage, read, kept, dropped)
        self.stage, self.read, self.kept, self.dropped = stage, read, kept, dropped

    def __str__(self) -> str:
        return (
            f"stage {self.stage}: read {self.read} != kept {self.kept} + dropped {self.dropped}. "
            "This is a fault of cert-ray, not of the input: please report it with the manifest's config."
        )


class TokenizerMismatchError(ConfigError):
    """A tokenizer that does not belong to the model or to the packed tokens."""


class CheckpointError(CertRayError):
    """A checkpoint that training cannot continue from: damaged, or another run's."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint has a file that is missing or differs from what was written."""


class NoWholeCheckpointError(CheckpointError):
    """A run has checkpoints, and every one of them is damaged."""


class TrainingDivergedError(CertRayError):
    """The loss stopped being finite, or rose and stayed there."""


class TrainingMemoryError(CertRayError):
    """A training worker ran out of memory: says how much the run was estimated to take, and what to lower."""


class TrainingFailedError(CertRayError):
    """Training workers died more often than the run allows; checkpoints are kept."""


class ClusterError(CertRayError):
    """A Ray cluster cannot be joined: nobody answers there, it has another token, or it runs another Ray or Python."""

    def __init__(self, address: str, problem: str, cure: str) -> None:
        super().__init__(address, problem, cure)
        self.address, self.problem, self.cure = address, problem, cure

    def __str__(self) -> str:
        return f"the Ray cluster at {self.address}: {self.problem}. {self.cure}"


class SandboxError(CertRayError):
    """Generated code could not be run at all. Never the fault of that code, so never a wrong answer."""


class RequestError(CertRayError):
    """An HTTP request that is refused, in the fields of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(status, message, param, code, retry_after_s)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s  # for 429 and 503: how long to wait before asking again

    def __str__(self) -> str:
        return self.message


class RequestCancelledError(RequestError):
    """The client is gone, so the work was stopped. `status` is nginx's 499: nobody is there to read it."""


class DeadlineError(RequestError):
    """The answer was not ready by its deadline, so the work was stopped; 504."""
