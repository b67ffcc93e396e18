"""Who reaches whom, by the rules of Kubernetes' network policies applied to what is in the files."""

import ipaddress
from typing import Any

import pytest

from tests.cluster.manifests import NAMESPACE, Object, Pod, of_kind, pods, selects

POLICIES = of_kind("NetworkPolicy")
PODS = {pod.name: pod for pod in pods()}
RAY = [name for name in PODS if name != "redis"]
SERVE_WORKERS = ["serve/serve-cpu", "serve/serve-gpu"]
HEADS = [name for name in RAY if name.endswith("/head")]
# All that listens, and two ports of nothing.
PORTS = [22, 6379, 8000, 8080, 8265, 8404, 9101, 10001, 12345, 44217, 44227, 52365]


def _rules(pod: Pod, direction: str) -> list[Object] | None:
    """Rules of all policies that select the pod; None where none does: then everything is allowed."""
    kind = direction.capitalize()
    chosen = [
        policy["spec"]
        for policy in POLICIES
        if kind in policy["spec"]["policyTypes"] and selects(policy["spec"]["podSelector"], pod.labels)
    ]
    return [rule for spec in chosen for rule in spec.get(direction, [])] if chosen else None


def _has_port(rule: Object, port: int) -> bool:
    return "ports" not in rule or any(each["port"] == port for each in rule["ports"])


def _is_peer(peer: Object, other: "Pod | str") -> bool:
    """other: a pod of this namespace, the name of another namespace, or an address outside."""
    if "ipBlock" in peer:
        return isinstance(other, str) and other[0].isdigit() and _in_block(other, peer["ipBlock"])
    of_namespace = peer.get("namespaceSelector")
    if isinstance(other, Pod):
        home = {"kubernetes.io/metadata.name": NAMESPACE}
        return (of_namespace is None or selects(of_namespace, home)) and selects(
            peer.get("podSelector", {}), other.labels
        )
    return of_namespace is not None and selects(of_namespace, {"kubernetes.io/metadata.name": other})


def _in_block(address: str, block: Object) -> bool:
    where = ipaddress.ip_address(address)
    return where in ipaddress.ip_network(block["cidr"]) and not any(
        where in ipaddress.ip_network(each) for each in block.get("except", [])
    )


def _allows(rules: list[Object] | None, direction: str, other: "Pod | str", port: int) -> bool:
    side = "from" if direction == "ingress" else "to"
    return rules is None or any(
        _has_port(rule, port) and any(_is_peer(peer, other) for peer in rule[side]) for rule in rules
    )


def reaches(source: str, target: str, port: int) -> bool:
    """source and target: names of pods, of other namespaces, or addresses."""
    a: Any = PODS.get(source, source)
    b: Any = PODS.get(target, target)
    leaves = not isinstance(a, Pod) or _allows(_rules(a, "egress"), "egress", b, port)
    enters = not isinstance(b, Pod) or _allows(_rules(b, "ingress"), "ingress", a, port)
    return leaves and enters


def _open(source: str) -> set[tuple[str, int]]:
    return {(target, port) for target in PODS for port in PORTS if reaches(source, target, port)}


def test_every_pod_is_closed_in_both_directions() -> None:
    for pod in PODS.values():
        assert _rules(pod, "ingress") is not None
        assert _rules(pod, "egress") is not None


def test_the_gateway_reaches_the_api_and_nothing_else() -> None:
    assert _open("gateway") == {(name, 8000) for name in SERVE_WORKERS}


def test_monitoring_reaches_metrics_and_statistics_and_nothing_else() -> None:
    of_nodes = {(name, port) for name in RAY for port in (8080, 44217, 44227)}
    assert _open("monitoring") == of_nodes | {(name, port) for name in SERVE_WORKERS for port in (8404, 9101)}


def test_the_operator_reaches_dashboards_and_asks_servers_how_they_are() -> None:
    servers = {(name, 8000) for name in (*SERVE_WORKERS, "serve/head")}
    assert _open("kuberay-system") == {(name, 8265) for name in HEADS} | servers


@pytest.mark.parametrize("source", ["default", "kube-system", "1.1.1.1", "10.0.0.7"])
def test_nobody_else_reaches_anything(source: str) -> None:
    assert _open(source) == set()


@pytest.mark.parametrize("source", RAY)
def test_nodes_reach_their_own_cluster_and_heads_redis(source: str) -> None:
    cluster, _, _ = source.partition("/")
    own = {(name, port) for name in RAY if name.startswith(f"{cluster}/") for port in PORTS}
    redis = {("redis", 6379)} if source in ("shared/head", "serve/head") else set()
    assert _open(source) == own | redis


def test_redis_reaches_nobody() -> None:
    assert _open("redis") == set()


@pytest.mark.parametrize("source", RAY)
def test_nodes_reach_buckets_and_not_the_metadata_service(source: str) -> None:
    assert reaches(source, "52.216.0.1", 443)
    assert not reaches(source, "52.216.0.1", 80)
    assert not any(reaches(source, "169.254.169.254", port) for port in (80, 443))
    # Of one's own networks: Kubernetes, for the autoscaler, whose address is not known here.
    has_autoscaler = source in ("shared/head", "serve/head")
    assert reaches(source, "10.0.0.1", 443) == has_autoscaler
    assert not reaches(source, "10.0.0.1", 22)


def test_names_are_resolved_by_everyone() -> None:
    assert all(reaches(name, "kube-system", 53) for name in PODS)


@pytest.mark.parametrize("monitor", of_kind("PodMonitor"), ids=lambda each: each["metadata"]["name"])
def test_what_prometheus_asks_listens_and_is_reached(monitor: Object) -> None:
    chosen = [pod for pod in PODS.values() if selects(monitor["spec"]["selector"], pod.labels)]
    assert chosen
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        asked = 0
        for pod in chosen:
            for port in pod.container["ports"]:
                if port["name"] == endpoint["port"]:
                    assert reaches("monitoring", pod.name, port["containerPort"])
                    asked += 1
        assert asked


def test_all_metrics_are_asked_for() -> None:
    asked = {
        (pod.name, endpoint["port"])
        for monitor in of_kind("PodMonitor")
        for pod in PODS.values()
        if selects(monitor["spec"]["selector"], pod.labels)
        for endpoint in monitor["spec"]["podMetricsEndpoints"]
    }
    there = {
        (pod.name, port["name"])
        for pod in PODS.values()
        for port in pod.container["ports"]
        if port["name"].endswith("metrics")
    }
    assert there - asked == set()
