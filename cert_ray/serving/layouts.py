"""The prompt of each stage of a cascade: in the paper's layout, and in the one where the context comes first.

In: a context, and the engines. Out: the tokens of each stage's prompt. No vote and no sampling in here.

`SketchFirst`, two models:
  sketcher   the sketch of the context (`contexts.sketch_context`), as in its training text, which is sketches of files;
  generator  `encode_pair(sketch, context)`: the winning sketch, the separator, and the context as the user wrote it.
             Its answer continues the context. By default the sketch is the predicted one alone, as in the paper; with
             `sketch_scope="file"` the context's own sketch stands before it, as in the generator's training text.

`ContextFirst`, one model: the context as the user wrote it, then the separator, after which the model sketches what
follows. Once a sketch is chosen, it and another separator follow. The second prompt begins with the whole first one,
which the engine has already read (`EngineConfig.prefix_cache_tokens`). The blanks that a context ended in stand in the
sketch, as in training.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

from cert_ray.serving.cascade_config import CascadeConfig
from cert_ray.serving.contexts import sketch_context
from cert_ray.serving.engines import Engine
from cert_ray.serving.voting import Sketch
from cert_ray.sketching import Sketched, moved, prompt_format


class Prompts(Protocol):
    """The prompts of one context."""

    @property
    def alone(self) -> list[int]:
        """The context as code, without a sketch."""
        ...

    @property
    def before_sketch(self) -> list[int]:
        """The prompt of stage one. Costs more than `alone`, and grows with the context."""
        ...

    def before_code(self, sketch: Sketch) -> list[int]:
        """The prompt of stage two."""
        ...


class Layout(Protocol):
    """The models of both stages, and how they are prompted."""

    @property
    def sketcher(self) -> Engine: ...

    @property
    def generator(self) -> Engine: ...

    @property
    def sketch_ends(self) -> frozenset[int]:
        """Tokens that end a sketch, besides the end of text."""
        ...

    @property
    def begins_alike(self) -> bool:
        """Whether stage two's prompt begins with stage one's, and goes to the same model."""
        ...

    def prompts(self, context: str, blanks: str) -> Prompts:
        """The prompts of `context`, from whose end `blanks` were cut."""
        ...


class SketchFirst:
    """The paper's layout."""

    sketch_ends: frozenset[int] = frozenset()
    begins_alike = False

    def __init__(self, sketcher: Engine, generator: Engine, config: CascadeConfig) -> None:
        self.sketcher, self.generator, self._config = sketcher, generator, config

    def prompts(self, context: str, blanks: str) -> Prompts:
        """See `Layout`."""
        return _SketchFirstPrompts(context, blanks, self.sketcher, self.generator, self._config)


class _SketchFirstPrompts:
    def __init__(self, context: str, blanks: str, sketcher: Engine, generator: Engine, config: CascadeConfig) -> None:
        self._context, self._blanks, self._config = context, blanks, config
        self._sketcher, self._generator = sketcher.tokenizer, generator.tokenizer
        self.alone = prompt_format.encode_code(self._generator, context)

    @cached_property
    def _seen(self) -> Sketched:
        return sketch_context(self._context, self._config.kind)

    @cached_property
    def before_sketch(self) -> list[int]:
        seen = self._seen
        if self._config.routing == "released":
            return prompt_format.encode_code(self._sketcher, seen.text)
        return prompt_format.encode_sketch(self._sketcher, seen.text, seen.placeholders)

    def before_code(self, sketch: Sketch) -> list[int]:
        text, placeholders = sketch.text, sketch.placeholders
        if self._config.sketch_scope == "file":
            shift = len(self._seen.text) + len(self._blanks)
            text = self._seen.text + self._blanks + text
            placeholders = (*self._seen.placeholders, *moved(placeholders, shift))
        if self._config.routing == "released":
            return prompt_format.encode_code(self._generator, prompt_format.released_pair(text, self._context))
        return prompt_format.encode_pair(self._generator, text, placeholders, self._context)


class ContextFirst:
    """One model, trained on the view `context_first`."""

    begins_alike = True

    def __init__(self, model: Engine) -> None:
        self.sketcher = self.generator = model
        self.sketch_ends = frozenset({prompt_format.separator_id(model.tokenizer)})

    def prompts(self, context: str, blanks: str) -> Prompts:
        """See `Layout`."""
        return _ContextFirstPrompts(context, blanks, self.generator)


class _ContextFirstPrompts:
    def __init__(self, context: str, blanks: str, model: Engine) -> None:
        self._tokenizer, self._blanks = model.tokenizer, blanks
        self.alone = prompt_format.encode_code(self._tokenizer, context)
        self.before_sketch = prompt_format.sketch_prompt(self._tokenizer, self.alone)

    def before_code(self, sketch: Sketch) -> list[int]:
        placeholders = moved(sketch.placeholders, len(self._blanks))
        return prompt_format.code_prompt(self._tokenizer, self.alone, self._blanks + sketch.text, placeholders)
