"""Connection to a Ray cluster, local or named, and the resources of its nodes."""

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..store.errors import NotFoundError

_CONNECT_SECONDS = 5
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


@contextmanager
def connected(address: str | None, cpus: int, own_code: bool = False) -> Iterator[Any]:
    """Connect to Ray, and give the module `ray`.

    Args:
        address: of a cluster; None starts a local Ray.
        cpus: of a local Ray.
        own_code: processes import the user's modules from the working directory.

    Raises:
        NotFoundError: the cluster cannot be reached, or a local Ray cannot be started.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # local clusters would otherwise leave a token in the home directory
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # Ray would otherwise report every death on standard output
    import logging

    import ray

    variables = dict(_ALLOCATOR)
    if own_code:
        variables["PYTHONPATH"] = os.pathsep.join(p for p in (os.getcwd(), os.environ.get("PYTHONPATH")) if p)
    local = address is None
    if address is not None:
        _check_reachable(address)
    try:
        ray.init(
            address="local" if local else address,
            num_cpus=cpus if local else None,
            include_dashboard=False if local else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": variables},
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if local:
            raise NotFoundError(f"a local Ray could not be started: {reason}; check the installation of ray, or do without it") from error
        raise NotFoundError(f"the Ray cluster at {address} cannot be reached: {reason}; check `address`") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Check that something listens at an address. Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            raise NotFoundError(
                f"the Ray cluster at {address} cannot be reached: {error.strerror or error}; check `address`, and run ray status there"
            ) from error


def node_resources(ray: Any) -> list[dict[str, float]]:
    """Return the resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def room(nodes: Sequence[Mapping[str, float]], bundle: Mapping[str, float]) -> int:
    """Return how many processes that take these resources fit on the nodes, each on one node."""
    return sum(min(int(node.get(name, 0) / amount + 1e-6) for name, amount in bundle.items()) for node in nodes)


def amounts(resources: Mapping[str, float]) -> str:
    """Format the CPUs and GPUs of a node, a cluster or a bundle."""
    gpus = resources.get("GPU", 0)
    return f"{resources.get('CPU', 0):g} CPUs" + (f" and {gpus:.3g} GPUs" if gpus else "")
