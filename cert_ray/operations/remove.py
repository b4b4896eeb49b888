"""`cert-ray remove`: a takedown. Files of a repository leave a run, and no later run of its recipe brings them back.

In: a run's folder and what to remove. Out: an entry in `removals.jsonl`, and a run that holds the text nowhere in the
clear: not in the dataset, the cleaned documents, the card, or the packed tokens. Models trained before are not touched:
they keep what they learned until they are trained again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from cert_ray import manifests, storage
from cert_ray.corpus.removals import Removal, RewrittenFile, read_removals
from cert_ray.dataset.removal import apply_removals, finish_removal, request_removal, touched_files
from cert_ray.manifests import ShardReport
from cert_ray.shards.units import report_url
from cert_ray.tokens import dataset as datasets
from cert_ray.tokens.shards import STAGE, VERB

logger = logging.getLogger(__name__)


def preview(run: str, removal: Removal) -> list[RewrittenFile]:
    """The shards that `remove` would rewrite.

    Raises:
        InputError: when there is no run.
    """
    return list(touched_files(storage.absolute(run), removal))


def remove(run: str, removal: Removal, keep_out: bool = False) -> Removal:
    """Take what `removal` names out of `run`. Called again, it finishes what was interrupted, else changes nothing.

    Raises:
        InputError: when there is no run, or it holds nothing that matches and `keep_out` is false.
        ShardCorruptError: when a shard disagrees with its report; nothing is removed from that shard.
    """
    run = storage.absolute(run)
    requested = request_removal(run, removal, keep_out)
    apply_removals(run)
    shards = {storage.name_of(file.file).removesuffix(".parquet") for one in read_removals(run) for file in one.files}
    views = list(_forget_tokens(run, shards))
    for view in views:
        logger.info("tokens/%s: deleted what was made from the removed text; `cert-ray pack` makes it again", view)
    return finish_removal(run, requested)


def _forget_tokens(run: str, shards: set[str]) -> Iterable[str]:
    """Delete the packed tokens of `shards`, if they were made from another dataset; yields the views concerned."""
    folder = storage.join(run, "tokens")
    digest = datasets.digest_of(storage.join(run, "dataset"))
    for view in storage.list_folders(folder):
        tokens = storage.join(folder, view)
        if manifests.is_finished(tokens):
            manifest = manifests.read_manifest(tokens, STAGE, VERB)
            if manifest.notes["dataset_digest"] == digest:
                continue  # packed after the removal
        found = False
        for shard in sorted(shards):
            url = report_url(tokens, shard)
            if storage.exists(url):
                found = True
                storage.remove(storage.join(tokens, manifests.MANIFEST_NAME))  # the pack is not finished any more
                for file in ShardReport.model_validate_json(storage.read_bytes(url)).files:
                    storage.remove(storage.join(tokens, file.name))
                storage.remove(url)
        if found:
            yield view
