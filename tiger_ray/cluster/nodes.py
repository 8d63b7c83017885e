"""The nodes of a running cluster: which Ray and Python they run, and what they have."""

from __future__ import annotations

from dataclasses import dataclass

from tiger_ray.cluster.connect import connect
from tiger_ray.errors import TigerError
from tiger_ray.settings.ray import RaySettings


@dataclass(frozen=True)
class Node:
    """One machine of the cluster."""

    address: str
    ray: str
    python: str


@dataclass(frozen=True)
class Cluster:
    """All machines that are alive, and their resources together."""

    nodes: tuple[Node, ...]
    resources: dict[str, float]


def driver_node() -> Node:
    """This process."""
    import platform

    import ray

    return Node("this machine", ray.__version__, platform.python_version())


def ask_nodes(settings: RaySettings, timeout_s: float = 15.0) -> Cluster:
    """Join the cluster and ask each node for its versions.

    Args:
        settings: the address.
        timeout_s: seconds that all nodes together may take.

    Raises:
        TigerError: no cluster answers, its Ray is another version, or a node does not answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    connect(settings)

    def versions() -> tuple[str, str]:  # within, so that a node without tiger_ray can run the function
        import platform

        import ray

        return ray.__version__, platform.python_version()

    alive = [node for node in ray.nodes() if node["Alive"]]
    answers = {
        node["NodeManagerAddress"]: ray.remote(num_cpus=0, max_retries=0)(versions)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote()
        for node in alive
    }
    _, waiting = ray.wait(list(answers.values()), num_returns=len(answers), timeout=timeout_s)
    if waiting:
        silent = [address for address, answer in answers.items() if answer in waiting]
        raise TigerError(
            f"{len(silent)} of {len(answers)} Ray nodes did not answer within {timeout_s:g} s: {', '.join(silent[:5])}. Look "
            "at these nodes (ray status), or take them out of the cluster"
        )
    found = tuple(Node(address, *ray.get(answer)) for address, answer in answers.items())
    return Cluster(found, dict(ray.cluster_resources()))


def require_one_version(cluster: Cluster, driver: Node) -> None:
    """Refuse a cluster in which a node runs another Ray or Python than this process.

    Python may differ in its last number.

    Raises:
        TigerError: names the nodes and the versions.
    """
    other = [
        node
        for node in cluster.nodes
        if node.ray != driver.ray or node.python.split(".")[:2] != driver.python.split(".")[:2]
    ]
    if other:
        named = ", ".join(f"{node.address} (Ray {node.ray}, Python {node.python})" for node in other[:5])
        raise TigerError(
            f"{len(other)} of {len(cluster.nodes)} Ray nodes run other versions than this process (Ray {driver.ray}, Python "
            f"{driver.python}): {named}. Install ray=={driver.ray} there, or the cluster's version here, and start the nodes "
            "again"
        )
