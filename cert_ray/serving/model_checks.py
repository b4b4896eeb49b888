"""Whether models suit the roles they are given, before anything is deployed and before any weights are read.

In: folders by role (`model`, or `sketcher` and `generator`). Out: what they say of their models, or an error that names
the folder, its role and what to change. This costs reading a tokenizer, where loading a model costs minutes. Problems
that only loading shows, such as weights that do not fit the configuration, are not found.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from cert_ray import storage
from cert_ray.errors import ConfigError, InputError, TokenizerMismatchError
from cert_ray.serving.engines import EngineConfig
from cert_ray.serving.model_folders import Described, describe, find_infill, window
from cert_ray.sketching import PLACEHOLDER_KINDS, prompt_format
from cert_ray.tokens.encoding import MODEL_VIEW, View

_NEEDED = (prompt_format.SEPARATOR, *(prompt_format.special_token(kind) for kind in PLACEHOLDER_KINDS))


def check_models(folders: Mapping[str, str], engine: EngineConfig, name: str | None = None) -> dict[str, Described]:
    """What each of `folders`, by role, says of its model. `name` is the model's name, if there are several models.

    Raises:
        InputError: when a folder holds no model that can be served.
        SchemaVersionError: when a folder was written by another version.
        TokenizerMismatchError: when a stage of a cascade does not know the special tokens.
        ConfigError: when an option of the engine does not suit a model, or its view does not suit the role.
    """
    found = {}
    for role, folder in folders.items():
        told = role if name is None else f"{role} of {name}"
        found[role] = described = _described(folder, engine, told)
        _check_engine(described, engine, told)
        _check_role(described, role, told)
    views = {role: described.view for role, described in found.items()}
    if views.get("sketcher") == View.GENERATOR and views.get("generator") == View.SKETCHER:
        raise ConfigError(
            f"sketcher={folders['sketcher']!r}, generator={folders['generator']!r}: each was trained to be the other. "
            "Swap them."
        )
    return found


def _described(folder: str, engine: EngineConfig, told: str) -> Described:
    is_of_vllm = engine.kind == "vllm"
    try:
        if is_of_vllm and not storage.is_local(folder):
            raise InputError(folder, "vLLM needs a local folder", "Copy the model to this machine.")
        return describe(folder, with_weights=not is_of_vllm)  # vLLM itself says which weights it reads
    except InputError as error:
        raise _unfit(error, told) from error


def _unfit(error: InputError, told: str) -> InputError:
    return InputError(error.uri, f"it cannot be the {told}: {error.problem}", error.cure)


def _check_engine(described: Described, engine: EngineConfig, told: str) -> None:
    config, folder = described.config, described.folder
    # Which of the architectures that transformers knows vLLM can run, it says itself.
    if engine.kind == "transformers" and (type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder):
        problem = f"its architecture ({config.model_type}) is not one that continues a text"
        raise _unfit(InputError(folder, problem, "Give a causal language model."), told)
    try:
        window(folder, config)
    except InputError as error:
        raise _unfit(error, told) from error
    find_infill(folder, described.tokenizer, engine.infill)


def _check_role(described: Described, role: str, told: str) -> None:
    is_both = described.view == View.CONTEXT_FIRST
    if role == "model" and not is_both:
        return  # a plain one
    if role != "model" and is_both:
        raise ConfigError(
            f"{described.folder}: it cannot be the {told}: it was trained for both stages. Serve it as `model`, alone."
        )
    missing = [token for token in _NEEDED if described.tokenizer.token_to_id(token) is None]
    if not missing:
        return
    wanted, cure = told, "Serve it as `model`, or train it with `cert-ray train` on the sketcher or generator view."
    if is_both:
        wanted = "model of both stages"
        cure = f"Take {MODEL_VIEW!r} out of its config.json to serve it as a plain model, or train it with "
        cure += f"`cert-ray train` on the view {View.CONTEXT_FIRST.value}."
    raise TokenizerMismatchError(
        f"{described.folder}: its tokenizer lacks {', '.join(missing)}, so it cannot serve as {wanted}. {cure}"
    )
