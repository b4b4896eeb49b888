"""Joins or starts Ray for the verbs that need it, and asks a cluster's nodes about themselves."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import ray
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._private.services import canonicalize_bootstrap_address
from ray._private.worker import BaseContext
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cert_ray.errors import CertRayError, ClusterError
from cert_ray.on_ray import LOST, own_errors
from cert_ray.operations.cluster_address import find_host, wait_for_listener
from cert_ray.operations.nodes import (
    NodeFacts,
    facts_of_this_node,
    refuse_other_versions,
    tell_unprotected,
    versions_here,
)
from cert_ray.retries import answered_within
from cert_ray.telemetry import logs

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_JOINING_S = 30.0  # assumed: long enough for a node to start a process; slower nodes are not waited for
_TOKEN_IS_USED = "Token authentication is enabled for this Ray cluster"  # another warning says that no token was found
_REFUSED = "it does not accept this process' token, or there is none here"
_TOKEN = (
    "Set RAY_AUTH_MODE=token, and the cluster's own token as RAY_AUTH_TOKEN, in the file RAY_AUTH_TOKEN_PATH, or in "
    "~/.ray/auth_token; KubeRay keeps it in a Secret with the cluster's name."
)
_WHICH_PORT = "Give the port of the GCS, 6379 unless another was chosen; the dashboard's is 8265."
_VERSIONS = "Use the cluster's image, or install its versions here: `ray[default]==VERSION` in the same Python."
_START = "Start one with `ray start --head`, or give its HOST:PORT; without an address, a Ray is started here."
_HEAD = "node:__internal_head__"  # Ray's resource that only the head has
_NODE_ANSWERS_S = 20.0  # assumed
_LATE = "timed out during startup"  # in Ray 2.60's bare Exception for a process of its own that was not up in time
_RETRIES = 20  # assumed: well above the number of nodes that one evaluation really loses

_WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # Ray runs as many processes as there are cores
    "TOKENIZERS_PARALLELISM": "false",
    # Serve gives up on a proxy that was not up at three checks of 5 s; on a busy machine its start takes longer. The
    # whole start has a minute.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",
    # Serve's processes call each other by gRPC, since actor calls cost more (docs/serving.md). On one machine nothing
    # is lost by that: a vanished host, which Ray would notice sooner, takes all of them with it. The bound on a message
    # is gRPC's highest; with the default, an answer of more than 4 MiB would fail.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str((1 << 31) - 1),
}


@contextmanager
def ray_session(
    address: str | None = None, check_versions: bool = True, patience_s: float = _JOINING_S
) -> Iterator[None]:
    """Ray for the length of a block: the cluster of `address` or of a submitted job, else a private one, stopped after.

    A private Ray listens on loopback and makes its own token. `ray.init()` alone would join any cluster that happens to
    run on this machine, so "local" is asked for by name. SIGTERM ends the block as `SystemExit`, with status 143.

    Args:
        check_versions: ask the nodes that are there now; those that an autoscaler adds later have the same image.
        patience_s: how long to wait for a head that does not answer.

    Raises:
        ClusterError: when there is no cluster, or none that accepts this process's token, Ray and Python; or when a
            private Ray is not up in time.
        ConfigError: for something that is no address, and when a node of the cluster runs another version of Python,
            Ray or cert-ray, or no cert-ray.
    """
    if ray.is_initialized():
        yield
        return
    target = address or os.environ.get("RAY_ADDRESS")
    if target:
        _join(target, patience_s)
        logger.info("ray: joined %s", target)
        try:
            if check_versions:
                refuse_other_versions(ask_nodes(_JOINING_S), versions_here())
            with _ended_by_sigterm():
                yield
        finally:
            ray.shutdown()
        return
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    with tempfile.TemporaryDirectory(prefix="cr", ignore_cleanup_errors=True) as folder:  # short: paths of sockets
        with logs.warnings_alone("ray", but=_TOKEN_IS_USED):  # it is meant to be enabled
            logger.info("ray: starting a private one")
            context = _start(folder)
        resources = ray.cluster_resources()
        logger.info(
            "ray: private, cpus=%d memory_gb=%.1f dashboard=http://%s",
            resources["CPU"],
            resources["memory"] / 1e9,
            context.dashboard_url,
        )
        try:
            with _ended_by_sigterm():
                yield
        finally:
            ray.shutdown()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Replace the handler that Ray sets for a driver, which prints the process's stack and ends it with status 15."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        if before is not None:  # a handler not set from Python, which Python cannot set again
            signal.signal(signal.SIGTERM, before)


def node_here() -> tuple[str, str]:
    """The id of the node that this process runs on, and its cluster's address (`RAY_ADDRESS`, or the Ray found here).

    Raises:
        ClusterError: when no Ray runs, or when this node is the head: the whole cluster would go with it.
    """
    with ray_session(os.environ.get("RAY_ADDRESS", "auto"), check_versions=False, patience_s=_NODE_ANSWERS_S):
        context = ray.get_runtime_context()
        node_id, address = context.get_node_id(), context.gcs_address
        resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == node_id)
    if _HEAD in resources:
        raise ClusterError(address, "this node is its head, and the cluster ends with it", "Drain the other nodes.")
    return node_id, address


def _start(folder: str) -> BaseContext:
    try:
        return ray.init(
            address="local",
            include_dashboard=True,  # on loopback; Ray Train asks its state API every second, and warns without it
            log_to_driver=True,  # a training worker reports its steps on its own stderr
            logging_level=logging.WARNING,
            _temp_dir=folder,
            runtime_env={"env_vars": _WORKER_ENVIRONMENT, "worker_process_setup_hook": know_own_cluster},
        )
    except Exception as error:
        if _LATE not in str(error):
            raise
        ray.shutdown()
        cure = "The machine is too busy, or short of memory: stop other work, and run the same command again."
        raise ClusterError("local", "Ray's own processes did not start in time", cure) from error


def _join(target: str, patience_s: float) -> None:
    host = find_host(target)
    if host is None and target == "auto":
        try:
            found = canonicalize_bootstrap_address(target)
        except ConnectionError as error:
            raise ClusterError(target, "no Ray runs on this machine", _START) from error
        host = find_host(found) if found is not None else None
    if host is not None:
        wait_for_listener(*host, patience_s)
        # Without a mode, Ray may find a token by itself for `auto`, but only there and only later.
        if not target.startswith("ray://") and (target != "auto" or "RAY_AUTH_MODE" in os.environ):
            name = f"[{host[0]}]" if ":" in host[0] else host[0]
            _greet(target, f"{name}:{host[1]}", patience_s)
    try:
        ray.init(address=target, logging_level=logging.WARNING)  # our own log line says what was joined
    except ray.exceptions.AuthenticationError as error:
        raise ClusterError(target, _REFUSED, _TOKEN) from error
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()  # it may already be connected
        other = "Version mismatch" in str(error)
        problem = " ".join(str(error).split()) if other else _last_line(error)
        raise ClusterError(target, problem.rstrip("."), _VERSIONS if other else _START) from error


def _greet(target: str, gcs: str, patience_s: float) -> None:
    """Return if a GCS answers and accepts our token; on its own, `ray.init` would retry again and again.

    Raises:
        ClusterError: at once for a wrong token, and for no answer within `patience_s`.
    """
    try:
        ensure_token_if_auth_enabled(create_token_if_missing=False)  # without one the client would abort this process
    except ray.exceptions.AuthenticationError as error:
        raise ClusterError(target, _REFUSED, _TOKEN) from error

    def ask() -> Exception | None:
        try:
            GcsClient(address=gcs)
        except Exception as error:  # noqa: BLE001 - it is told to the thread that waits
            return error
        return None

    try:
        refusal = answered_within(patience_s, ask)  # it cannot be stopped, and may wait for 40 s
    except TimeoutError:
        problem = (
            f"something listens there, but does not answer as a head of Ray {ray.__version__} within {patience_s:g} s"
        )
        raise ClusterError(target, problem, _WHICH_PORT) from None
    if isinstance(refusal, ray.exceptions.AuthenticationError):
        raise ClusterError(target, _REFUSED, _TOKEN) from refusal
    if refusal is not None:
        raise ClusterError(target, _last_line(refusal).rstrip("."), _WHICH_PORT) from refusal


def know_own_cluster() -> None:
    """Runs in every process of a private Ray when it starts: makes the cluster of this session its own.

    What Ray Train leaves behind to free a dead driver's resources looks for a cluster itself, and fails if two run.
    """
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


def run_on_worker(work: Callable[[], Result], cpus: float, gpus: float) -> Result:
    """Run `work` in a task that has these resources, which a job's own process may lack; returns its result.

    Its log lines appear as the caller's, and are kept beside them as those of VERB-worker. If its worker or node is
    lost it runs again, up to 20 times, so it must continue from what it has kept.

    Raises:
        CertRayError: what `work` raises, at once and without Ray's wrapping; or when worker or node were lost more
            often.
    """
    log = logs.inherited()

    def logged() -> Result:
        with logs.taken_over(log, kept_as=f"{log.fields.get('verb', 'work')}-worker"):
            return work()

    task = ray.remote(logged).options(num_cpus=cpus, num_gpus=gpus, max_retries=_RETRIES)
    try:
        with own_errors():
            found: Result = ray.get(task.remote())
    except LOST as error:
        raise CertRayError(
            f"this work lost its worker or node {_RETRIES + 1} times, so the work itself may be the cause. Compare the "
            "node's memory with the model's size, check evaluation's cpus and gpus in the recipe, and look for a crash "
            f"of a native library in Ray's worker logs. Ray says: {_last_line(error)}"
        ) from error
    return found


def warn_of_unprotected_nodes(unsafe: bool, unfiltered: bool) -> None:
    """Warn of each kind of node on which generated code will not run, or unfiltered. Others may join later."""
    for line in tell_unprotected(ask_nodes(_JOINING_S, try_sandbox=not unsafe), unsafe, unfiltered):
        logger.warning("%s", line)


def ask_nodes(timeout_s: float = 60.0, try_sandbox: bool = False) -> list[NodeFacts]:
    """What every living node of the connected cluster says of itself, sorted by address; or why it does not answer.

    Args:
        try_sandbox: start a sandbox where tasks of one CPU may run, as those of an evaluation do.
    """
    task = ray.remote(facts_of_this_node)
    asked = {}
    for node in sorted(ray.nodes(), key=lambda node: str(node["NodeManagerAddress"])):
        if node["Alive"]:
            pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            name, resources = str(node["NodeManagerAddress"]), node["Resources"]
            # No argument unless one is needed: an older node's function takes none, and must still report its version.
            tries = (True,) if try_sandbox and resources.get("CPU", 0) > 0 else ()
            reference = task.options(num_cpus=0, max_retries=0, scheduling_strategy=pinned).remote(*tries)
            asked[reference] = NodeFacts(address=name, cpus=resources.get("CPU", 0), gpus=resources.get("GPU", 0))
    ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    answers = []
    for reference, node in asked.items():
        try:
            answers.append(node.answered(ray.get(reference, timeout=0)))
        except ray.exceptions.GetTimeoutError:
            ray.cancel(reference, force=True)
            answers.append(node.silent(f"no answer within {timeout_s:g} s"))
        except (ray.exceptions.RayTaskError, ray.exceptions.RuntimeEnvSetupError) as error:
            answers.append(node.failed(_last_line(error)))
        except ray.exceptions.RayError as error:  # the node, or the process there, is gone
            answers.append(node.silent(_last_line(error)))
    return answers


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
