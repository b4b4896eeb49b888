"""An S3 of this machine, by moto, that can be told to refuse: the real client, `s3fs`, talks to it.

In: nothing. Out: `S3`, its address and the variables by which clients find it; `refuse_every` and `down` say what it
refuses with 503, as S3 does when it wants its clients to slow down.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import boto3
import httpx
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "chaos"
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass
class S3:
    """A running S3 with one bucket."""

    url: str
    refuse_every: int | None = None  # of so many requests one is refused
    down: bool = False  # every request is refused
    refused: int = 0
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def variables(self) -> Mapping[str, str]:
        """The environment of its clients."""
        secrets = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "chaos")
        return {**secrets, "AWS_ENDPOINT_URL": self.url, "AWS_DEFAULT_REGION": "us-east-1"}

    def refuses(self) -> bool:
        """Whether the next request is refused."""
        number = next(self._numbers)
        refused = self.down or (self.refuse_every is not None and number % self.refuse_every == 0)
        self.refused += refused
        return refused

    def client(self) -> Any:
        """One of boto3's, which keeps nothing of what it saw."""
        options = {"endpoint_url": self.url, "region_name": "us-east-1"}
        return boto3.client("s3", aws_access_key_id="chaos", aws_secret_access_key="chaos", **options)

    def objects(self) -> dict[str, bytes]:
        """Every object by its key."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return {key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


@contextmanager
def started_s3() -> Iterator[S3]:
    """An S3 with the bucket `BUCKET`, that ends with the block."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it says a line for each request
    moto = DomainDispatcherApplication(create_backend_app)
    running: list[S3] = []

    def serve(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if running and running[0].refuses():
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(_SLOW_DOWN)))])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [_SLOW_DOWN]
        answer: Iterable[bytes] = moto(environ, start)
        return answer

    server = make_server("127.0.0.1", 0, serve, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    s3 = S3(f"http://127.0.0.1:{server.server_port}")
    try:
        httpx.post(f"{s3.url}/moto-api/reset").raise_for_status()  # what an earlier S3 of this process held
        s3.client().create_bucket(Bucket=BUCKET)
        running.append(s3)
        yield s3
    finally:
        server.shutdown()
        thread.join()
