"""Predicts what a training run takes. In: a `TrainConfig`, a model's config, a GPU. Out: bytes and seconds.

State follows ZeRO's accounting (Rajbhandari et al. 2020, arXiv:1910.02054): per parameter, mixed precision keeps 2
bytes of weights, 2 of gradients and 12 of optimizer (an fp32 copy and Adam's two moments), split over the workers as
the stage says. But the weights that stage 3 gathers in a forward pass, DeepSpeed keeps for the backward pass.
Activations are counted, not guessed: the model runs once on tensors without storage, and what autograd would keep is
summed; a compiled model keeps part of that (docs/training.md, "What it takes"). Work is counted as in `utilization`.
Communication time between workers is not. Nothing is allocated, and no GPU is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from cert_ray.errors import ConfigError
from cert_ray.gpt_neo import fuse_attention
from cert_ray.training.config import TrainConfig
from cert_ray.training.utilization import GPUS, Gpu, flops_per_token

_GB = 1e9
# For kernels, workspaces, NCCL and what the allocator cannot use; assumed.
_RESERVED_BYTES = 2 * _GB
BUCKET_ELEMENTS = 500_000_000  # gradients that ZeRO reduces at once, at most: DeepSpeed's default
# ZeRO 3 keeps at most this many parameters gathered: DeepSpeed's default (`stage3_max_live_parameters`).
_MOST_GATHERED = 1_000_000_000
# The share of activations that `torch.compile` keeps (it recomputes the rest), and bytes per logit: the logit and its
# gradient, without an fp32 copy. Measured on an H100 in bf16: 0.45 to 0.54 with three models.
_COMPILED_SHARE = 0.55
_COMPILED_LOGIT_BYTES = 4
# The lowest and highest share of the peak that training reached on an H100 in bf16, compiled, one model at a time. The
# causes (width, depth, rows per pass, passes per step) were not measured separately, so no share is predicted.
_MEASURED_SHARES = (0.18, 0.44)
_SHARES_SOURCE = (
    "measured on one H100 in bf16, compiled: 18% with SmolLM2-135M (30\n"
    "  layers, 576 wide, 32 rows of 512 a pass), 44% with modern-110m (12 layers, 768 wide, 64 rows of 1,024). Other\n"
    "  devices were not tried"
)


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a model takes, per parameter and per row of `context_tokens`, in one precision."""

    context_tokens: int
    parameters: int
    flops_per_token: float  # forward and backward
    activation_bytes: int  # per row, kept between forward and backward, without logits
    checkpointed_bytes: int  # the same if each layer keeps only its input, and layers are recomputed one at a time
    logits: int  # number per row


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of one worker at its peak, and the work of one step over all workers."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    logits: float
    tokens_per_step: int
    flops_per_step: float

    @property
    def state(self) -> float:
        """Bytes that do not depend on the micro batch."""
        return self.weights + self.gradients + self.optimizer + self.buffers + _RESERVED_BYTES

    @property
    def total(self) -> float:
        """All bytes."""
        return self.state + self.activations + self.logits


def gpu_named(name: str) -> Gpu:
    """The device of that name in the table.

    Raises:
        ConfigError: for a name that is not in the table.
    """
    if name not in GPUS:
        raise ConfigError(f"--gpu {name}: unknown; known are {', '.join(GPUS)}")
    return GPUS[name]


def measure(shape: Any, precision: str, context_tokens: int) -> ModelSize:
    """The size of the causal language model with the Hugging Face config `shape`; takes about a second.

    Activations include a causal mask per layer, which real runs do not have: up to 3% too much.
    """
    shape = type(shape).from_dict(shape.to_dict())  # drops the choice of attention that a loaded model left in it
    dtype = torch.float32 if precision == "fp32" else getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[precision])
    with FakeTensorMode():
        model = fuse_attention(AutoModelForCausalLM.from_config(shape, dtype=dtype)).train()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        with saved_bytes(model) as saved:
            logits = model(input_ids=torch.zeros(1, context_tokens, dtype=torch.long), use_cache=False).logits
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inside = sum(saved.by_layer)
    layer_input = context_tokens * shape.hidden_size * dtype.itemsize
    checkpointed = saved.total - inside + len(layers) * layer_input + max(saved.by_layer, default=0)
    return ModelSize(
        context_tokens=context_tokens,
        parameters=parameters,
        flops_per_token=flops_per_token(model, context_tokens),
        activation_bytes=saved.total,
        checkpointed_bytes=checkpointed if layers else saved.total,
        logits=logits.numel(),
    )


def estimate(size: ModelSize, config: TrainConfig) -> Estimate:
    """What one worker of a run with `config` holds, and what a step computes."""
    element = 4 if config.precision == "fp32" else 2
    parameters, stage = size.parameters, config.zero_stage
    workers = config.min_workers or config.workers  # if nodes are lost, the remaining workers hold everything
    rows = config.micro_batch
    compiled = config.compile and config.use_gpu and config.precision != "fp32"  # not measured otherwise
    if config.activation_checkpointing:
        per_row: float = size.checkpointed_bytes
    else:
        per_row = size.activation_bytes * (_COMPILED_SHARE if compiled else 1)
    # In half precision: the logits, their fp32 copy and its softmax; otherwise the logits and the softmax.
    per_logit = _COMPILED_LOGIT_BYTES if compiled else 8 if config.precision == "fp32" else 10
    tokens = config.rows_per_step * size.context_tokens
    return Estimate(
        weights=element * (parameters / workers + min(parameters, _MOST_GATHERED) if stage == 3 else parameters),
        gradients=element * parameters / (workers if stage >= 2 else 1),
        optimizer=8 * parameters if stage == 0 else 12 * parameters / workers,
        buffers=0.0 if stage == 0 else element * min(parameters, BUCKET_ELEMENTS),
        activations=per_row * rows,
        logits=per_logit * size.logits * rows,
        tokens_per_step=tokens,
        flops_per_step=size.flops_per_token * tokens,
    )


def step_seconds(found: Estimate, config: TrainConfig, gpu: Gpu, mfu: float) -> float:
    """Seconds per step on `config.workers` of `gpu`. The second forward pass of checkpointing is not useful work."""
    again = 4 / 3 if config.activation_checkpointing else 1
    return found.flops_per_step * again / (config.workers * gpu.peak_flops(config.precision) * mfu)


def advice(size: ModelSize, config: TrainConfig, memory_bytes: float) -> str:
    """What to change so that the run fits into `memory_bytes` per worker, with the same rows per step."""
    rows = config.micro_batch * config.gradient_accumulation
    smaller = [count for count in range(config.micro_batch, 0, -1) if rows % count == 0]
    for checkpointing in sorted({config.activation_checkpointing, True}):
        for micro_batch in smaller:
            options = {
                "micro_batch": micro_batch,
                "gradient_accumulation": rows // micro_batch,
                "activation_checkpointing": checkpointing,
            }
            if estimate(size, config.model_copy(update=options)).total <= memory_bytes:
                return _changes(config, options)
    for stage in range(config.zero_stage + 1, 4):
        split = config.model_copy(update={"zero_stage": stage, "micro_batch": 1, "activation_checkpointing": True})
        if estimate(size, split).total <= memory_bytes:
            return f"Raise zero_stage to {stage}, lower micro_batch to 1, and set activation_checkpointing: true."
    return "No setting makes it fit: use more workers with zero_stage 2 or 3, a larger GPU, or a smaller model."


def _changes(config: TrainConfig, options: dict[str, Any]) -> str:
    changed = [f"{name}: {str(new).lower()}" for name, new in options.items() if getattr(config, name) != new]
    if not changed:
        return "By this estimate it fits: something else takes memory too, or it is in pieces; lower micro_batch."
    return f"Set {', '.join(changed)}."


def explain_shortage(size: ModelSize, config: TrainConfig, memory_bytes: float) -> str:
    """For a worker that ran out of memory: the estimate and what to lower."""
    found = estimate(size, config)
    return (
        f"out of memory: estimated {_gb(found.total)} per worker ({_gb(found.state)} of weights, gradients, optimizer "
        f"and buffers; {_gb(found.activations + found.logits)} of activations and logits for micro_batch "
        f"{config.micro_batch}), and there are {_gb(memory_bytes)}. {advice(size, config, memory_bytes)}"
    )


def render(name: str, size: ModelSize, config: TrainConfig, gpu_name: str, mfu: float | None = None) -> str:
    """The plan of one model as text: memory with and without activation checkpointing, time, and what it assumes.

    Args:
        mfu: the share of the peak that is reached; without it, times are given for the lowest and highest measured.
    """
    gpu = gpu_named(gpu_name)
    both = [config.model_copy(update={"activation_checkpointing": on}) for on in (False, True)]
    found = [estimate(size, variant) for variant in both]
    shares = _MEASURED_SHARES if mfu is None else (mfu,)
    # Per variant, the longest time first, since the lowest share comes first.
    seconds = [
        [step_seconds(one, variant, gpu, share) for share in shares] for one, variant in zip(found, both, strict=True)
    ]
    lines = [
        f"{name}: {config.base}, {size.parameters / 1e6:,.1f}M parameters, {config.precision}, "
        f"ZeRO {config.zero_stage}, {_workers(config)}; {config.micro_batch} x {size.context_tokens:,} tokens "
        f"per pass, {config.gradient_accumulation} passes per step",
        f"  {'GB per worker':24}{'plain':>20}{'activation_checkpointing':>28}",
    ]
    parts = ("weights", "gradients", "optimizer", "buffers", "activations", "logits")
    lines += [_row(part, [[getattr(one, part) / _GB] for one in found]) for part in parts]
    lines.append(_row("reserved (assumed)", [[_RESERVED_BYTES / _GB]] * 2))
    lines.append(_row(f"total, of {gpu.memory_bytes / _GB:,.0f} ({gpu_name})", [[one.total / _GB] for one in found]))
    lines.append(_row("seconds per step", seconds))
    lines.append(
        _row(f"hours, {config.steps:,} steps", [[one * config.steps / 3600 for one in ends] for ends in seconds])
    )
    chosen = found[config.activation_checkpointing]
    lines.append(
        f"  a step: {chosen.tokens_per_step:,} tokens, {chosen.flops_per_step:.2e} FLOPs; times are estimates without "
        "waiting for other workers or storage,"
    )
    if mfu is None:
        low, high = _MEASURED_SHARES
        lines.append(f"  at {low:.0%} to {high:.0%} of the peak, {_SHARES_SOURCE}.")
        lines.append("  --mfu takes the share that a run of yours has reached: its log tells it as MFU.")
    else:
        lines.append(f"  at {mfu:.0%} of the peak, as given.")
    if chosen.total > gpu.memory_bytes:
        lines.append(f"  does not fit. {advice(size, config, gpu.memory_bytes)}")
    return "\n".join(lines)


def _workers(config: TrainConfig) -> str:
    return f"{config.workers} workers" + (f" (memory: with {config.min_workers})" if config.min_workers else "")


@dataclass(slots=True)
class Saved:
    """Bytes that autograd keeps: in total, and per decoder layer."""

    total: int
    by_layer: list[int]


@contextlib.contextmanager
def saved_bytes(model: Any) -> Iterator[Saved]:
    """Count what a forward pass in the block keeps for its backward pass: each storage once, without parameters.

    Works on real and on fake tensors. The result is filled in at the end.
    """
    # Storages are held, because the address of a freed one could be reused and taken for the same.
    seen: dict[int, Any] = {parameter.untyped_storage()._cdata: None for parameter in model.parameters()}
    counted = Saved(0, [])

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage
            counted.total += storage.nbytes()
        return tensor

    def enter(*_: Any) -> None:
        counted.by_layer.append(-counted.total)

    def leave(*_: Any) -> None:
        counted.by_layer[-1] += counted.total

    handles = []
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield counted
    for handle in handles:
        handle.remove()


def _row(name: str, values: list[list[float]]) -> str:
    """A row of two columns, each a figure or a range, whose values are given from highest to lowest."""
    plain, checkpointed = (" to ".join(map(_figure, reversed(ends))) for ends in values)
    return f"  {name:24}{plain:>20}{checkpointed:>28}"


def _figure(value: float) -> str:
    return f"{value:,.2f}" if value >= 0.1 else f"{value:.2g}"


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / _GB:,.1f} GB"
