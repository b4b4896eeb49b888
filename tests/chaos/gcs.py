"""A Google Cloud Storage of this machine, by gcp-storage-emulator: the real client, `gcsfs`, talks to it.

In: of how many requests one is refused with 503. Out: the environment by which clients find it. What it keeps is in
memory.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from gcp_storage_emulator.server import RequestHandler, create_server

from tests.chaos.s3 import BUCKET


class _Refusing(RequestHandler):  # type: ignore[misc]
    """Refuses one of so many requests."""

    def __init__(self, every: int, numbers: Iterator[int], *given: object) -> None:
        self._every, self._numbers = every, numbers
        super().__init__(*given)  # which answers the request

    def parse_request(self) -> bool:
        """Whether the request is to be answered by the store."""
        if not super().parse_request():
            return False
        if next(self._numbers) % self._every:
            return True
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_error(503)
        return False


@contextmanager
def started_gcs(refuse_every: int) -> Iterator[Mapping[str, str]]:
    """A store with the bucket `BUCKET`, that ends with the block."""
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    try:
        server._api._httpd.handle_error = lambda *_: None  # clients that hang up early, a page for each
        refusing = functools.partial(_Refusing, refuse_every, itertools.count(1), server._storage)
        server._api._httpd.RequestHandlerClass = refusing
        yield {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{server._api._httpd.server_port}",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # what gcsfs would ask by gRPC the emulator does not know
        }
    finally:
        server.stop()
