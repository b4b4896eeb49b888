"""What decontamination found, for people and programs: which document matched which problem, how and where.

In: `schemas.CONTAMINATION` rows of all shards, and the index they were found with. Out: `contamination/report.json`
and `contamination/report.md` below the stage's folder.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pyarrow as pa

from cert_ray import storage
from cert_ray.corpus.decontamination import ProblemIndex

_SHOWN_ROWS, _SHOWN_CHARACTERS = 200, 80  # in the Markdown; the JSON has everything


def write_report(folder: str, found: pa.Table, problems: ProblemIndex) -> None:
    """Write both reports of the matches `found`."""
    matches = found.to_pylist()
    figures = {
        "problem_files": problems.checksums,
        "options": problems.config.model_dump(mode="json"),
        "problems": len({(owner.problems, owner.task_id) for owner in problems.owners}),
        "problems_found": len({(match["problems"], match["task_id"]) for match in matches}),
        "documents_dropped": len({(match["source"], match["path"]) for match in matches}),
        "matches_by_kind": dict(sorted(Counter(f"{match['part']}, {match['how']}" for match in matches).items())),
        "matches": matches,
    }
    target = storage.join(folder, "contamination")
    storage.write_text(storage.join(target, "report.json"), json.dumps(figures, indent=1) + "\n")
    storage.write_text(storage.join(target, "report.md"), _markdown(figures))


def _markdown(figures: dict[str, Any]) -> str:
    matches = figures["matches"]
    lines = [
        "# Decontamination",
        "",
        f"{figures['documents_dropped']:,} documents dropped; they hold {figures['problems_found']:,} of "
        f"{figures['problems']:,} problems of {', '.join(figures['problem_files'])}.",
        "",
        "| problem | part | how | document | line | text |",
        "|---|---|---|---|---|---|",
    ]
    for match in matches[:_SHOWN_ROWS]:
        text = " ".join(match["text"].split())[:_SHOWN_CHARACTERS].replace("|", "\\|").replace("`", "'")
        document = f"{match['source']}: {match['path']}".replace("|", "\\|")
        lines.append(
            f"| {match['task_id']} | {match['part']} | {match['how']} | {document} | {match['line']} | `{text}` |"
        )
    if len(matches) > _SHOWN_ROWS:
        lines += ["", f"{len(matches) - _SHOWN_ROWS:,} more matches are in report.json."]
    return "\n".join(lines) + "\n"
