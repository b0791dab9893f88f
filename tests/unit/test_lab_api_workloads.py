"""The lab's API server: Deployments and ReplicaSets, stepped to their end over a store in memory."""

from __future__ import annotations

import itertools

import pytest

from netnslab.api.workloads import End, Make, Set, steps


class World:
    """Objects by kind and name; pods are ready when ``ready`` says so."""

    def __init__(self):
        self.objects, self.uids, self.ends = {}, itertools.count(1), itertools.count(1)
        self.least = self.most = None

    def put(self, raw):
        metadata = {"uid": f"u{next(self.uids)}", "creationTimestamp": "2026-01-01T00:00:00Z", **raw["metadata"]}
        self.objects[raw["kind"], metadata["name"]] = {**raw, "metadata": metadata}

    def of(self, kind):
        return [raw for (one, _), raw in sorted(self.objects.items()) if one == kind]

    def step(self):
        found = steps(self.of("Deployment"), self.of("ReplicaSet"), self.of("Pod"), lambda: f"p{next(self.ends)}")
        for one in found:
            key = one.raw["kind"], one.raw["metadata"]["name"]
            match one:
                case Make():
                    assert key not in self.objects
                    self.put(one.raw)
                case Set():
                    self.objects[key] = one.raw
                case End():
                    del self.objects[key]
        return found

    def start_pods(self):
        """Let one pod that is not ready become so; tell whether there was one."""
        for pod in self.of("Pod"):
            if "status" not in pod:
                pod["status"] = {"conditions": [{"type": "Ready", "status": "True"}]}
                return True
        return False

    def settle(self):
        """Step until nothing is left to do, a pod starting only where no step is."""
        self.least, self.most = len(self.ready()), len(self.of("Pod"))
        for _ in range(200):
            moved = self.step() or self.start_pods()
            self.least, self.most = min(self.least, len(self.ready())), max(self.most, len(self.of("Pod")))
            if not moved:
                return
        raise AssertionError("it never comes to an end")

    def ready(self):
        return [pod for pod in self.of("Pod") if "status" in pod]

    def images(self):
        return sorted(pod["spec"]["containers"][0]["image"] for pod in self.of("Pod"))


def deployment(image="a", replicas=4, **spec):
    template = {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "web", "image": image}]}}
    about = {"name": "web", "namespace": "default", "uid": "d", "creationTimestamp": "2026-01-01T00:00:00Z"}
    selector = {"matchLabels": {"app": "web"}}
    whole = {"replicas": replicas, "selector": selector, "template": template, **spec}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": about, "spec": whole}


def change(world, **fields):
    wanted = deployment(**fields)
    before = world.objects["Deployment", "web"]
    world.objects["Deployment", "web"] = {**before, "spec": wanted["spec"]}


@pytest.fixture
def world():
    found = World()
    found.put(deployment())
    found.settle()
    return found


def test_a_deployment_comes_up(world):
    """It makes one ReplicaSet, that makes the pods, which carry the labels and their owner; then nothing is left to do."""
    (replica_set,) = world.of("ReplicaSet")
    assert world.images() == ["a"] * 4
    labels = {pod["metadata"]["labels"]["pod-template-hash"] for pod in world.of("Pod")}
    assert labels == {replica_set["metadata"]["name"].removeprefix("web-")}
    status = world.of("Deployment")[0]["status"]
    assert (status["replicas"], status["updatedReplicas"], status["availableReplicas"]) == (4, 4, 4)
    assert world.step() == []


@pytest.mark.parametrize(
    ("strategy", "least", "most"),
    [
        ({}, 3, 5),
        ({"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}, 3, 4),
        ({"rollingUpdate": {"maxSurge": "50%", "maxUnavailable": 0}}, 4, 6),
        ({"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}}, 3, 4),
        ({"type": "Recreate"}, 0, 4),
    ],
)
def test_a_rolling_update_keeps_within_its_bounds(world, strategy, least, most):
    """A new template replaces all pods, never more of them at once, nor fewer ready, than the strategy says."""
    change(world, image="b", strategy=strategy)
    world.settle()
    assert world.images() == ["b"] * 4
    assert (world.least, world.most) == (least, most)
    assert [one["spec"]["replicas"] for one in world.of("ReplicaSet")].count(0) == 1


def test_rolled_back_it_takes_the_old_replica_set(world):
    """The old template again is the old ReplicaSet again, with a new revision."""
    change(world, image="b")
    world.settle()
    change(world, image="a")
    world.settle()
    assert world.images() == ["a"] * 4
    revisions = {one["spec"]["replicas"]: one["metadata"]["annotations"] for one in world.of("ReplicaSet")}
    assert {count: found["deployment.kubernetes.io/revision"] for count, found in revisions.items()} == {4: "3", 0: "2"}
    assert world.of("Deployment")[0]["metadata"]["annotations"]["deployment.kubernetes.io/revision"] == "3"


@pytest.mark.parametrize("count", [0, 1, 7])
def test_scaled(world, count):
    """It has as many pods as it says; those that are not ready go first."""
    world.of("Pod")[2].pop("status")
    unready = world.of("Pod")[2]["metadata"]["name"]
    change(world, replicas=count)
    world.settle()
    assert len(world.of("Pod")) == count
    assert (("Pod", unready) in world.objects) is (count > 4)


def test_nobody_owns_what_is_left_behind(world):
    """With a Deployment go its ReplicaSets, and with those their pods; a pod that nobody made stays."""
    world.put({"kind": "Pod", "metadata": {"name": "own", "namespace": "default"}, "spec": {"containers": []}})
    del world.objects["Deployment", "web"]
    world.settle()
    assert list(world.objects) == [("Pod", "own")]


def test_old_revisions_are_forgotten(world):
    """Of the ReplicaSets that are empty no more stay than the history may hold."""
    for image in "bcdef":
        change(world, image=image, revisionHistoryLimit=2)
        world.settle()
    assert len(world.of("ReplicaSet")) == 3
