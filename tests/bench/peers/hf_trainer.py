"""Hugging Face Trainer's side: a causal language model on rows of token ids, bf16 autocast or fp32, fused AdamW.

Imports nothing of cert-ray; wants torch, transformers and accelerate. In: a folder with config.json and rows.npy
[rows, context + 1]. Out: one JSON line, clock and CPU-seconds at the start and after each step.
"""

import argparse
import json
import tempfile
import time
import warnings

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Clock(TrainerCallback):
    """Notes the time at the start and after every step."""

    def __init__(self):
        self.ticks = []

    def on_train_begin(self, *_, **__):
        """The model and the optimizer stand."""
        self.ticks.append((time.time(), time.process_time()))

    def on_step_end(self, *_, **__):
        """One optimizer step is done."""
        self.ticks.append((time.time(), time.process_time()))


def main():
    """Train, and print the ticks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--warmup-steps", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--fp32", action="store_true", help="in place of bf16 autocast")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(given.folder), dtype=torch.float32)
    ids = torch.from_numpy(np.load(f"{given.folder}/rows.npy"))[:, :-1]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        options = TrainingArguments(
            output_dir=output, max_steps=given.warmup_steps + given.steps, per_device_train_batch_size=given.rows,
            bf16=not given.fp32, use_cpu=True, optim="adamw_torch_fused", learning_rate=5e-4, weight_decay=0.1,
            adam_beta2=0.95, torch_compile=given.compile, logging_strategy="no", save_strategy="no", report_to=[],
            disable_tqdm=True,
        )  # fmt: skip
        Trainer(model=model, args=options, train_dataset=rows, callbacks=[clock]).train()
    print(json.dumps(clock.ticks))


if __name__ == "__main__":
    main()
