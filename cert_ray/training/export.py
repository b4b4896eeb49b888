"""From a checkpoint to a plain Hugging Face folder. In: a verified checkpoint. Out: safetensors, configs, tokenizer.

The weights are the optimizer's fp32 ones, combined from all workers' parts, so the exported model has the engine's
logits. Needs neither Ray nor a process group. A card (README.md) is also written, but not among the returned files,
since it may be rewritten when more is known. The manifest is not written here.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cert_ray import manifests, storage
from cert_ray.manifests import WrittenFile
from cert_ray.tokens.encoding import MODEL_VIEW
from cert_ray.tokens.vocabulary import load_tokenizer, vocabulary_size
from cert_ray.training import checkpoints, model_card
from cert_ray.training.deepspeed_engine import fp32_weights
from cert_ray.training.records import from_json_lines
from cert_ray.training.scratch import scratch_folder

ENGINE_FOLDER, MODEL_FOLDER, TOKENIZER_FOLDER = "engine", "model", "tokenizer"
RECORDS_NAME = "records.jsonl"
FACTS_NAME = "facts.json"  # `model_card.run_facts`
_NO_ROOM: Final = "Free some, or set TMPDIR, and run the same again: the checkpoint stays."


def export_checkpoint(checkpoint: str, output: str) -> tuple[WrittenFile, ...]:
    """Write the model of `checkpoint` into the folder `output`; return what was written, with checksums.

    Raises:
        CheckpointError: when a file of the checkpoint is missing or damaged.
        DiskFullError, StorageFullError: when a disk is full.
    """
    part = checkpoints.first_part(checkpoint)
    told = functools.partial(checkpoints.full_disk_told, "the exported model", output, _NO_ROOM)
    with scratch_folder("export") as temporary:
        with told():
            source = checkpoints.fetch(checkpoint, part, None, temporary / "checkpoint")
        target = temporary / "model"
        shape = AutoConfig.from_pretrained(source / MODEL_FOLDER, trust_remote_code=False)
        with torch.device("meta"):  # makes no weights, which would only be replaced
            model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
        model.load_state_dict(fp32_weights(source / ENGINE_FOLDER, part.zero_stage), assign=True)
        model.tie_weights()
        card = model_card.render_card(_facts(output, model, source, part.step))
        with told():
            model.save_pretrained(target)
            for file in sorted((source / TOKENIZER_FOLDER).iterdir()):
                (target / file.name).write_bytes(file.read_bytes())
            storage.write_text(storage.join(output, model_card.CARD_NAME), card)
            return tuple(manifests.copy_in(file, output) for file in sorted(target.iterdir()))


def _facts(output: str, model: Any, checkpoint: Path, step: int) -> model_card.ModelFacts:
    """The facts that a checkpoint holds; `operations.model_cards` adds those of the run."""
    told, noted = checkpoint / RECORDS_NAME, checkpoint / FACTS_NAME
    steps = from_json_lines(told.read_text(), str(told)) if told.is_file() else []
    facts: dict[str, Any] = json.loads(noted.read_text()) if noted.is_file() else {}  # earlier versions wrote none
    if not facts:
        tokens = vocabulary_size(load_tokenizer(str(checkpoint / TOKENIZER_FOLDER)))  # the table has padding rows
        facts = {"vocab_size": tokens, "view": getattr(model.config, MODEL_VIEW, None)}
    facts |= {
        "name": storage.name_of(output),
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": step,
        "tokens": steps[-1].tokens if steps else None,
        "losses": model_card.losses_of(steps),
    }
    return model_card.ModelFacts.from_mapping(facts, str(noted))
