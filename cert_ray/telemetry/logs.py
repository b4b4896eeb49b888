"""Log lines that name their run, stage and shard, as text or JSON; and one run's story, kept beside the run.

Entry points call `configure` once: lines go to stderr in the form asked for, else in that of `CERT_RAY_LOG_FORMAT`. A
worker on another machine takes over what its driver `inherited`. `scope` names what lines are about. `story` also
writes every line, shard by shard, as JSON to files in RUN/logs/BEGAN-VERB-PID, so that one can read in order what jobs
and retries did when their machines are gone. A story that cannot be written is a warning, and never ends a run; a store
that hangs holds nobody up.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import Context, ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from cert_ray import __version__, storage
from cert_ray.errors import CertRayError, ConfigError

logger = logging.getLogger(__name__)

FORM_VARIABLE = "CERT_RAY_LOG_FORMAT"
FOLDER = "logs"
_NOISY = ("ray", "httpx", "urllib3", "filelock", "matplotlib", "fsspec", "azure")
_FLUSH_EVERY_S = 30.0  # assumed: the most that a killed job's story may lack
_CLOSE_S = 60.0  # assumed: a finished job waits no longer for its story to be written
_WAITING_LINES = 100_000  # some 50 MB; further lines, while the store takes nothing, are lost
_SCOPE: ContextVar[Mapping[str, str]] = ContextVar("scope", default={})  # noqa: B039 - never changed, only replaced


class Form(StrEnum):
    """How lines look."""

    TEXT = "text"
    JSON = "json"


def configure(form: str | None = None) -> None:
    """Send log lines to stderr. Does nothing if logging is already configured.

    Raises:
        ConfigError: for a `form` other than text or json.
    """
    wanted = chosen_form(form)
    if logging.getLogger().handlers:
        return
    logging.basicConfig(level=logging.INFO, handlers=[_to_stderr(wanted)])
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if wanted == Form.JSON:
        logging.getLogger("cert_ray").setLevel(logging.DEBUG)


def _to_stderr(form: Form) -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.INFO if form == Form.TEXT else logging.DEBUG)
    handler.setFormatter(formatter(form))
    handler.addFilter(_add_scope)
    return handler


def chosen_form(form: str | None = None) -> Form:
    """`form`, else the environment's, else text.

    Raises:
        ConfigError: for a form other than text or json.
    """
    name = form or os.environ.get(FORM_VARIABLE) or Form.TEXT
    try:
        return Form(name)
    except ValueError as error:
        raise ConfigError(f"{FORM_VARIABLE} or --log-format: {name!r}; known are {', '.join(Form)}") from error


def formatter(form: Form) -> logging.Formatter:
    """For people, or one JSON object a line: time (UTC), level, what the line is about, message, and its origin."""
    if form == Form.TEXT:
        return logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S")
    return _Json(
        ["levelname", "run", "verb", "stage", "shard", "message", "name", "process"],
        rename_fields={"levelname": "level", "name": "logger", "process": "pid"},
        timestamp="time",
        static_fields={"host": platform.node()},
        exc_info_as_array=True,
    )


class _Json(JsonFormatter):
    """Leaves out fields that a line does not have."""

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in log_data.items() if value is not None}


def _add_scope(record: logging.LogRecord) -> bool:
    for name, value in _SCOPE.get().items():
        if not hasattr(record, name):
            setattr(record, name, value)
    return True


@contextmanager
def scope(**fields: str) -> Iterator[None]:
    """Lines logged in the block carry `fields`, e.g. run=, stage=, model=, besides those of enclosing blocks."""
    token = _SCOPE.set({**_SCOPE.get(), **fields})
    try:
        yield
    finally:
        _SCOPE.reset(token)


@contextmanager
def warnings_alone(library: str, but: str | None = None) -> Iterator[None]:
    """In the block, the terminal shows only warnings and errors of logger `library` ("" is the root); files keep all.

    Args:
        but: the beginning of a warning that is not shown either, since it reports what we asked for.
    """

    def shown(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING and not (but and record.getMessage().startswith(but))

    consoles = [
        handler
        for handler in logging.getLogger(library).handlers
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
    ]
    for console in consoles:
        console.addFilter(shown)
    try:
        yield
    finally:
        for console in consoles:
            console.removeFilter(shown)


@dataclass(frozen=True, slots=True)
class Inherited:
    """How a process logs: the form of its lines, and its scope."""

    form: Form
    fields: Mapping[str, str]


def inherited() -> Inherited:
    """What a worker of this process on another machine takes over."""
    formatters = [handler.formatter for handler in logging.getLogger().handlers]
    configured = Form.JSON if any(isinstance(one, _Json) for one in formatters) else Form.TEXT
    return Inherited(configured if formatters else chosen_form(), dict(_SCOPE.get()))


@contextmanager
def taken_over(given: Inherited, kept_as: str | None = None) -> Iterator[None]:
    """In a worker: log lines of the block go to stderr, which Ray forwards, like those of the process that `inherited`.

    Args:
        kept_as: the verb of the worker's own story, if the scope names a run; None keeps none.
    """
    ours = logging.getLogger("cert_ray")
    before = ours.level, ours.propagate
    handler = _to_stderr(given.form)
    ours.addHandler(handler)
    ours.propagate = False  # Ray Train's workers have handlers of another form at the root
    ours.setLevel(logging.INFO if given.form == Form.TEXT else logging.DEBUG)
    run = given.fields.get("run")
    try:
        with scope(**given.fields), story(run, kept_as) if run and kept_as else nullcontext():
            yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before[0])
        ours.propagate = before[1]


@contextmanager
def story(run: str, verb: str) -> Iterator[None]:
    """Lines of the block carry `run` and `verb`, and are also kept below `run`, with how the block began and ended."""
    began = datetime.now(UTC)
    ours = logging.getLogger("cert_ray")
    kept = _Story(storage.join(run, FOLDER, f"{began:%Y%m%dT%H%M%S}-{verb}-{os.getpid()}"))
    before = ours.level
    ours.addHandler(kept)
    ours.setLevel(logging.DEBUG)
    clock = time.monotonic()
    try:
        with scope(run=run, verb=verb):
            logger.debug("%s began", verb, extra={"event": "began", "versions": _versions(), "command": sys.argv})
            try:
                yield
            except BaseException as error:
                event = "failed" if isinstance(error, Exception) else "stopped"
                told = {"event": event, "seconds": round(time.monotonic() - clock, 1)}
                trace = None if isinstance(error, CertRayError) else error
                logger.debug("%s %s: %s", verb, event, _why(error), exc_info=trace, extra=told)
                raise
            ended = {"event": "finished", "seconds": round(time.monotonic() - clock, 1)}
            logger.debug("%s finished", verb, extra=ended)
    finally:
        ours.removeHandler(kept)
        ours.setLevel(before)
        kept.close()


def _why(error: BaseException) -> str:
    if isinstance(error, Exception):
        return str(error) or type(error).__name__
    return f"{type(error).__name__} {error}".strip()  # for SIGTERM, and so for `ray job stop`: SystemExit 143


def _versions() -> dict[str, str]:
    return {"cert-ray": __version__, "python": platform.python_version()}


class _Story(logging.Handler):
    """Keeps lines in numbered files, each with what came since the one before: object stores cannot append.

    A thread of its own writes them (a `QueueListener` would write line by line, a `MemoryHandler` inside the logging
    call). What guards the caller's writes does not apply in it, so a run that was superseded can still say so.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(formatter(Form.JSON))
        self.addFilter(_add_scope)
        self._folder, self._parts = folder, 0
        self._waiting, self._lost = list[str](), 0  # the list: others append to it, and only the thread removes
        self._warned = False
        self._ending = threading.Event()
        self._writer = threading.Thread(target=Context().run, args=(self._write_now_and_then,), daemon=True)
        self._writer.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + "\n"
        except Exception:  # noqa: BLE001 - logging is a boundary: what cannot be told ends nothing
            self.handleError(record)
            return
        if len(self._waiting) < _WAITING_LINES:
            self._waiting.append(line)
        else:
            self._lost += 1

    def close(self) -> None:
        self._ending.set()
        self._writer.join(_CLOSE_S)
        if lacks := self._lost + len(self._waiting):
            logger.warning("the run's story in %s is missing %d lines", self._folder, lacks)
        super().close()

    def _write_now_and_then(self) -> None:
        while not self._ending.wait(_FLUSH_EVERY_S):
            self._write()
        self._write()

    def _write(self) -> None:
        lines = list(self._waiting)
        if not lines:
            return
        try:
            # Written once: the next flush tries again anyway, and each retry here would log itself into the story.
            storage.write_text_once(storage.join(self._folder, f"part-{self._parts:05d}.jsonl"), "".join(lines))
        except Exception as error:  # noqa: BLE001 - clients of object stores raise errors of their own
            if not self._warned:
                self._warned = True
                logger.warning("the run's story could not be written, trying again: %s", error)
            return
        self._parts += 1
        del self._waiting[: len(lines)]
