"""A seeded corpus of many small files for chaos runs: distinct files, exact copies, near copies, broken ones."""

from __future__ import annotations

import random
from pathlib import Path


def write_corpus(folder: Path, files: int, seed: int) -> None:
    """`files` files in folders of fifty; of ten, one is a copy, one a near copy, and of fifty, one does not parse."""
    generator = random.Random(seed)
    texts: list[str] = []
    for number in range(files):
        kind = number % 10
        if number and number % 50 == 49:
            text = "def broken(:\n    if here:\n        return 1\n    for each in all:\n        return 2\n"
        elif kind == 3:
            text = generator.choice(texts)
        elif kind == 7:
            text = generator.choice(texts) + f"\nextra_{number} = {number}\n"
        else:
            text = _module(generator, number)
        texts.append(text)
        path = folder / f"package_{number // 50:03d}" / f"module_{number:05d}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _module(generator: random.Random, number: int) -> str:
    lines = [f'"""Module {number}."""', "import numpy as np", "import pandas as pd", ""]
    for index in range(generator.randint(20, 70)):
        word = f"{generator.getrandbits(40):010x}"
        lines += [
            f"def compute_{word}(values, limit_{word}={generator.randint(1, 999)}):",
            f'    """Return what {word} makes of the values."""',
            f"    frame_{word} = pd.DataFrame({{'column_{word}': values, 'other': np.arange(len(values))}})",
            f"    if limit_{word} > {generator.random():.6f}:",
            f"        return frame_{word}.query('column_{word} < {index}').head({generator.randint(1, 50)})",
            f"    return frame_{word}",
            "",
        ]
    return "\n".join(lines) + "\n"
