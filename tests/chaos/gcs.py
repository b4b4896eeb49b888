"""A Google Cloud Storage of this machine, by gcp-storage-emulator: the real client, `gcsfs`, talks to it.

In: nothing. Out: the environment by which clients find it. What it keeps is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from gcp_storage_emulator.server import create_server

from tests.chaos.s3 import BUCKET


@contextmanager
def started_gcs() -> Iterator[Mapping[str, str]]:
    """A store with the bucket `BUCKET`, that ends with the block."""
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    try:
        server._api._httpd.handle_error = lambda *_: None  # clients that hang up early, a page for each
        yield {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{server._api._httpd.server_port}",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # what gcsfs would ask by gRPC the emulator does not know
        }
    finally:
        server.stop()
