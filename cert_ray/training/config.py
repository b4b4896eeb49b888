"""The options of a training run. In: a recipe. Out: a checked `TrainConfig`, and the digest that tells runs apart.

Combinations that cannot work fail here, naming the option to change. Defaults are the paper's for PyCodeGPT: learning
rate 5e-4, weight decay 0.1, Adam beta2 0.95, cosine with 1,000 steps of warm-up, 10 rows x 4 accumulations per worker.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import pydantic

from cert_ray.config import Config
from cert_ray.training.schedule import Schedule, decay_start
from cert_ray.training.stability import SpikePolicy

Precision = Literal["fp32", "bf16", "fp16"]
LoggerName = Literal["tensorboard", "wandb", "mlflow"]
# Options that do not change the trained weights beyond rounding, or that the digest of the inputs covers. Of micro
# batch, accumulation and workers, only the product counts, so that a run may continue with others.
_NOT_OF_THE_RESULT = {
    "base",
    "tokenizer",
    "tokens",
    "output",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "keep_best_checkpoint",
    "on_spike",
    "micro_batch",
    "gradient_accumulation",
    "workers",
    "min_workers",
    "resize_check_s",
    "activation_checkpointing",
    "log_every_steps",
    "loggers",
    "max_failures",
}


class TrainConfig(Config):
    """One training run: which model, on which packed tokens, how, and into which folder.

    A step reads `micro_batch * gradient_accumulation * workers` rows. Runs with the same product read the same rows,
    and may continue from each other's checkpoints.
    """

    base: str  # a preset to train from scratch, or the folder or hub id of a causal language model to start from
    tokenizer: str | None = None  # None: the one in the base's folder
    tokens: str  # a packed view
    output: str  # the exported model's folder; checkpoints are below it
    steps: int = pydantic.Field(gt=0)
    micro_batch: int = pydantic.Field(default=10, gt=0)  # rows per worker and forward pass
    gradient_accumulation: int = pydantic.Field(default=4, gt=0)
    learning_rate: float = pydantic.Field(default=5e-4, gt=0)
    final_learning_rate_share: float = pydantic.Field(default=0.0, ge=0, le=1)  # of learning_rate, at the last step
    weight_decay: float = pydantic.Field(default=0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    max_gradient_norm: float | None = pydantic.Field(default=1.0, gt=0)  # assumed: the paper does not say
    warmup_steps: int = pydantic.Field(default=1_000, ge=0)
    schedule: Schedule = "cosine"
    decay_share: float = pydantic.Field(default=0.2, gt=0, le=1)  # of the steps, with schedule wsd
    precision: Precision = "fp32"
    compile: bool = False  # with torch.compile: faster steps, but a minute to start; on CPUs needs a C++ compiler
    deterministic: bool = False  # equal runs end in equal bits on GPUs, too; slower: docs/training.md
    activation_checkpointing: bool = False  # keep only each layer's input: less memory, a second forward pass
    zero_stage: Literal[0, 1, 2, 3] = 1
    workers: int = pydantic.Field(default=1, gt=0)  # with min_workers: at most
    min_workers: int | None = pydantic.Field(default=None, gt=0)  # continue with so few if nodes are lost; None: all
    resize_check_s: float = pydantic.Field(default=60.0, gt=0)  # with min_workers: between checks for more nodes
    use_gpu: bool = False  # one GPU per worker and NCCL; else gloo
    cpus_per_worker: int = pydantic.Field(default=1, gt=0)  # reserved in Ray; also PyTorch's threads
    checkpoint_every_steps: int | None = pydantic.Field(default=1_000, gt=0)  # None: only after the last step
    keep_checkpoints: int = pydantic.Field(default=2, gt=0)  # the newest
    keep_best_checkpoint: bool = True  # in addition, the one with the lowest held-out loss, if measured
    eval_every_steps: int | None = pydantic.Field(default=None, gt=0)  # None: only after the last step
    eval_rows: int | None = pydantic.Field(default=None, gt=0)  # None: every held-out row
    log_every_steps: int = pydantic.Field(default=10, gt=0)
    loggers: tuple[LoggerName, ...] = ()  # besides loss.jsonl and loss.png: docs/models.md
    resampling: Literal["weighted", "uniform"] = "weighted"
    seed: int = pydantic.Field(default=0, ge=0, lt=1 << 24)  # torch's seeds have 64 bits, of which steps need 40
    on_spike: SpikePolicy | None = SpikePolicy()  # None: only a non-finite loss ends the run
    max_failures: int = pydantic.Field(default=2, ge=0)  # worker deaths that one call recovers from

    @pydantic.model_validator(mode="after")
    def _refuse_what_cannot_work(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} leaves none of the {self.steps} steps; lower it or raise steps"
            )
        if self.schedule == "wsd" and decay_start(self.steps, self.decay_share) < self.warmup_steps:
            raise ValueError(
                f"decay_share {self.decay_share} of {self.steps} steps begins before warmup_steps {self.warmup_steps} "
                "end; lower one of them"
            )
        if self.precision != "fp32" and self.zero_stage == 0:
            raise ValueError(
                f"precision {self.precision} needs zero_stage 1, 2 or 3, where an fp32 copy of the weights is kept"
            )
        if self.precision == "fp16" and not self.use_gpu:
            raise ValueError("precision fp16 needs use_gpu: true; on a CPU use fp32 or bf16")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}; lower it")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must both be in [0, 1)")
        return self

    @property
    def rows_per_step(self) -> int:
        """Rows that one step reads over all workers, independent of how many are present."""
        return self.micro_batch * self.gradient_accumulation * self.workers

    def result_options(self) -> dict[str, Any]:
        """The options that the trained weights depend on: not where inputs are, nor how a step's rows are divided."""
        kept = set(type(self).model_fields) - _NOT_OF_THE_RESULT
        if not self.deterministic:
            kept.remove("deterministic")  # so that runs of versions without it continue
        return self.model_dump(mode="json", include=kept, warnings=False) | {"rows_per_step": self.rows_per_step}

    def result_digest(self) -> str:
        """Digest of the options that the trained weights depend on; contents of inputs have their own digest."""
        return Config.digest(_Subset(options=self.result_options()))


class _Subset(Config):
    options: dict[str, pydantic.JsonValue]
