"""DeepSpeed; no other module of the project imports it. In: a model and a `TrainConfig`. Out: an engine that steps.

One path for CPU (gloo) and GPU (NCCL), ZeRO stages 0 to 3. The process group must exist, with RANK, LOCAL_RANK,
WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. The engine saves and loads its own state, and after conversion that of
another number of workers. The fp32 weights of a saved state can be read without a process group.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

with warnings.catch_warnings():  # deepspeed and its imports warn of their own future changes
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.checkpoint import ds_to_universal
    from deepspeed.runtime.zero import stage_1_and_2
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from cert_ray.training.attention import leave_out_masks, tabulate_rotations
from cert_ray.training.config import TrainConfig
from cert_ray.training.memory import BUCKET_ELEMENTS
from cert_ray.training.sampling import micro_batches
from cert_ray.training.step import Learner, plain_names, predicted_tokens

_TAG = "engine"
# Whether the norm shows gradients that are not finite. Older versions add the -1 of such a group to the other norms,
# which gives a finite sum.
_NORM_TELLS = hasattr(stage_1_and_2, "combine_grad_norm_groups")
_QUIET_STEPS = 1 << 62  # between DeepSpeed's own progress lines: never


def avoid_op_compilation() -> None:
    """Keep DeepSpeed from compiling its shared-memory reduction when the engine starts.

    Compiling takes about 100 s without a cache, needs a compiler, and changes no result: gloo can reduce, too. The
    table is a private name of DeepSpeed 0.18 and 0.19; a test fails when setting it no longer has this effect.
    """
    deepspeed.ops.__compatible_ops__ = {}


def engine_options(config: TrainConfig, parameters: int, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for `config`, a model with `parameters`, and `world_size` workers."""
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": micro_batches(config.rows_per_step, config.micro_batch, world_size),
        "gradient_clipping": config.max_gradient_norm or 0.0,
        # The bucket is allocated whole: by default it would take 1 or 2 GB, even for a small model.
        "zero_optimization": {"stage": config.zero_stage, "reduce_bucket_size": min(parameters, BUCKET_ELEMENTS)},
        "zero_allow_untested_optimizer": True,  # DeepSpeed's term for torch's own AdamW
        # Checking every gradient for non-finite values costs a launch each; if the norm is computed, it shows them.
        "bf16": {
            "enabled": config.precision == "bf16",
            "check_grad_overflow": config.max_gradient_norm is None or not _NORM_TELLS,
        },
        "fp16": {"enabled": config.precision == "fp16"},
        "steps_per_print": _QUIET_STEPS,
    }


class Engine:
    """A model, its optimizer and its gradients, partitioned over the workers according to the ZeRO stage."""

    def __init__(self, model: torch.nn.Module, config: TrainConfig, *, universal: bool = False) -> None:
        """Every worker calls this with the same model; rank 0's weights are used.

        `universal`: the state that will be loaded was made by `universal_state`.
        """
        avoid_op_compilation()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if config.compile:
            leave_out_masks(model)
            tabulate_rotations(model)
        optimizer = torch.optim.AdamW(
            _parameter_groups(model, config.weight_decay), lr=config.learning_rate, betas=config.betas, fused=True
        )
        self._universal = universal
        self.world_size: int = torch.distributed.get_world_size()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        options = engine_options(config, parameters, self.world_size) | {"checkpoint": {"load_universal": universal}}
        with warnings.catch_warnings():  # it imports torch's compiler, which uses deprecated parts of torch
            warnings.simplefilter("ignore", DeprecationWarning)
            self._engine, *_ = deepspeed.initialize(model=Learner(model), optimizer=optimizer, config=options)
            if config.compile:
                self._engine.compile(compile_kwargs={"dynamic": False})  # every micro batch has one shape
        self.device: torch.device = self._engine.device

    def train_step(
        self, batches: Sequence[tuple[torch.Tensor, torch.Tensor]], learning_rate: float
    ) -> tuple[float, int, float | None]:
        """One update from pairs of ids and mask [micro_batch, context + 1]; every worker must give the same number.

        Returns the mean loss in nats per token and the number of tokens predicted, over all workers, and the gradient's
        norm before clipping.
        """
        self._engine.train()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        # Everything that the device must wait for comes before or after the passes; in between, it would leave it idle.
        placed = [(ids.to(self.device), mask.to(self.device)) for ids, mask in batches]
        sums = torch.tensor([sum(predicted_tokens(mask) for _, mask in batches), 0.0], dtype=torch.float64)
        sums = sums.to(self.device)
        torch.distributed.all_reduce(sums[0])
        # DeepSpeed averages over accumulations and workers. Divided by this, every token of the step weighs the same.
        mean_tokens = (sums[0].clamp(min=1) / (len(batches) * self.world_size)).float()
        norm: Any = None
        for number, (ids, mask) in enumerate(placed, 1):
            loss = self._engine(ids, mask)
            self._engine.backward(loss / mean_tokens)
            if number == len(placed):
                norm = self._plain_norm()
            self._engine.step()
            sums[1] += loss.detach()
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        torch.distributed.all_reduce(sums[1])
        tokens, nats = sums.tolist()
        if norm is not None:
            norm = float(norm) if norm >= 0 else math.inf  # to DeepSpeed, negative means not finite
        return nats / max(tokens, 1), int(tokens), norm

    def _plain_norm(self) -> torch.Tensor | None:
        """The gradients' norm of a whole step without ZeRO, where DeepSpeed does not report it."""
        if self._engine.zero_optimization():
            return None
        gradients = [parameter.grad for parameter in self._engine.module.parameters() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    @torch.no_grad()
    def summed_eval_loss(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, int]:
        """Summed loss in nats and number of tokens predicted, over all workers; each must give as many batches."""
        self._engine.eval()
        nats, tokens = torch.zeros((), device=self.device, dtype=torch.float64), 0
        for ids, mask in batches:
            nats += self._engine(ids.to(self.device), mask.to(self.device)).double()
            tokens += predicted_tokens(mask)
        return self._sum(nats), round(self._sum(torch.tensor(float(tokens))))

    def save(self, folder: Path) -> None:
        """Write this worker's part of the state below `folder`; every worker calls this."""
        folder.mkdir(parents=True, exist_ok=True)
        self._engine.save_checkpoint(str(folder), tag=_TAG)
        (folder / "zero_to_fp32.py").unlink(missing_ok=True)  # DeepSpeed's script; `fp32_weights` does its work

    def load(self, folder: Path) -> None:
        """Load the state below `folder`: the parts of the same number of workers, or a universal state.

        Corrects two faults of DeepSpeed 0.19 with a universal state of ZeRO 3: all groups get the first one's settings
        (so vectors would decay), and share one step counter (which each of them would increase).
        """
        settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self._engine.optimizer.param_groups
        ]
        self._engine.load_checkpoint(str(folder), tag=_TAG)
        for group, kept in zip(self._engine.optimizer.param_groups, settings, strict=True):
            group.update(kept)
        if self._universal:
            for state in self._engine.optimizer.optimizer.state.values():
                state["step"] = state["step"].clone()

    def _sum(self, value: torch.Tensor) -> float:
        total = value.detach().to(self.device, torch.float64)
        torch.distributed.all_reduce(total)
        return float(total)


def fp32_weights(folder: Path, zero_stage: int) -> dict[str, torch.Tensor]:
    """The fp32 weights of the state that `Engine.save` wrote below `folder`, combined from all parts.

    Unpickles: use it only for checkpoints that this project wrote and whose checksums match.
    """
    if zero_stage == 0:
        state = torch.load(folder / _TAG / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        return plain_names(state["module"])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it prints its progress
        return plain_names(get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=_TAG))


def universal_state(folder: Path, target: Path) -> None:
    """Convert what `Engine.save` wrote below `folder`, on any number of workers, to a state that any number can load.

    Needs disk space for twice the optimizer's whole state. Unpickles: see `fp32_weights`.
    """
    target.mkdir(parents=True)
    options = argparse.Namespace(
        input_folder=str(folder / _TAG),
        output_folder=str(target / _TAG),
        num_extract_workers=1,  # in this process
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it prints its progress
        ds_to_universal.main(options)


def _parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms, which are vectors, do not (assumed: the paper does not say)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
