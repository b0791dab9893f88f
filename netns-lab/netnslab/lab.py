"""A lab's life: up, changes, down. Each step writes what it is about to make before it makes it, so that any of them can die.

    up      plan (pure) -> state.json -> namespaces, cables -> objects -> agents ... pods -> responders -> in sync
    change  plan (pure) -> state.json -> old pods away -> new pods, answering -> objects -> state.json
    down    state.json -> processes -> namespaces -> directory

Plans come from ``controlplane``; this module only puts them into effect. What is said on the way goes to ``say``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import msgspec

from clusterstate.objects import ObjectRef, Pod
from clusterstate.parse import parse_object
from kernelstate.linux import netns
from netnslab import agents, answering, attaching, names, node_cgroups, processes, wiring
from netnslab import state as states
from netnslab.api import remote
from netnslab.controlplane import complete
from netnslab.errors import LabError, LabInputError
from netnslab.given import Given, Raw, reference
from netnslab.memory import Memory
from netnslab.state import GENERATION, LabPod, LabState, write_file
from netnslab.topology import Topology

Say = Callable[[str], None]
SYNC_SECONDS = 120.0


def up(name: str, topology: Topology, given: Given, say: Say, *, timeout: float = SYNC_SECONDS, api: bool = False) -> LabState:
    """Bring up a lab and return once every node is in sync. What fails, or is interrupted, leaves nothing behind.

    With ``api`` the agents follow an API server of the lab's own, else files.

    Raises LabInputError before anything is made, LabError when the work failed.
    """
    for node in topology.nodes:
        agents.node_config(topology, node.name)
    if api:
        given = remote.with_kubernetes(given, topology)
    state = LabState(names.check_lab_name(name), topology, list(given.values()))
    objects = plan_pods(state, given)
    states.refuse_second(name)
    _refuse_taken(state.all_netns())
    states.make_root(name)
    with states.locked(name):
        try:
            state.save()
            _make(state, objects, say, timeout, api=api)
        except BaseException:
            say("taking down what was made")
            _take_down(name, state, lambda _: None)
            raise
    return state


def _refuse_taken(wanted: Iterable[str]) -> None:
    """Refuse names that somebody else's namespaces have: another lab's, perhaps, whose name ends as one of ours begins."""
    taken = sorted(set(wanted) & set(netns.names()))
    if taken:
        raise LabError(f"network namespace {taken[0]} exists already and is not this lab's")


def _make(state: LabState, objects: Given, say: Say, timeout: float, *, api: bool) -> None:
    for node in state.topology.nodes:
        agents.node_view(state, node.name).make()
    node_cgroups.make(state.name, [n.name for n in state.topology.nodes])
    state.objects.mkdir()
    segments = ", ".join(s.name for s in state.topology.segments)
    say(f"{len(state.topology.nodes)} nodes on {segments}, a router, an external client")
    wiring.make_fixed(state)
    _publish(state, objects)
    if api:
        say("an API server")
        remote.start(state)
    say(f"{len(state.topology.nodes)} agents starting")
    started = agents.start(state, [n.name for n in state.topology.nodes])
    say(f"{len(state.pods)} pods to attach")
    attaching.make_pods(state, state.pods, started)
    say(f"{len(state.pods)} pods attached")
    for line in (*answering.serve(state, state.pods), *answering.start_commands(state, state.pods)):
        say(f"warning: {line}")
    last = [-1]

    def progress(done: int, of: int) -> None:
        if done != last[0]:
            last[0] = done
            say(f"{done} of {of} nodes in sync")

    agents.await_sync(state, timeout, started, progress)
    state.complete = True
    state.save()


# -- changes ---------------------------------------------------------------------------------------------------------


class Change(msgspec.Struct):
    """What a change did: objects that were created, changed, deleted; those that were not there to delete; warnings."""

    created: list[ObjectRef] = []
    changed: list[ObjectRef] = []
    deleted: list[ObjectRef] = []
    missing: list[ObjectRef] = []
    warnings: list[str] = []


def apply(name: str, objects: Given) -> Change:
    """Create or replace objects. Raises LabInputError, and then nothing was changed."""
    served = _loaded(name)
    if served.api_port:
        done = remote.apply(served, objects)
        return Change(done.created, done.changed, warnings=done.warnings)
    with states.locked(name):
        state = _loaded(name)
        given = _given(state)
        change = Change()
        for ref, raw in objects.items():
            if ref not in given:
                change.created.append(ref)
            elif given[ref] != raw:
                change.changed.append(ref)
            given[ref] = raw
        revived = {ref.name for ref in objects if ref.kind == "Node"}
        memory = _without(state.memory, [n for n in state.memory.removed_nodes if n in revived])
        _put_into_effect(state, given, memory, change)
        return change


def delete(name: str, refs: Iterable[ObjectRef]) -> Change:
    """Delete objects; with a Namespace what is in it, with a Node the pods on it."""
    served = _loaded(name)
    if served.api_port:
        gone = remote.delete(served, refs)
        return Change(deleted=gone.deleted, missing=gone.missing, warnings=gone.warnings)
    with states.locked(name):
        state = _loaded(name)
        given, change, memory = _given(state), Change(), _without(state.memory, [])
        places = state.memory.pods
        for ref in refs:
            is_node = ref.kind == "Node" and state.topology.node(ref.name) is not None
            if is_node and ref.name not in memory.removed_nodes:
                memory.removed_nodes.append(ref.name)
            elif ref not in given:
                if ref not in change.deleted:
                    change.missing.append(ref)
                continue
            doomed = [ref, *_with_it(ref, given, {key: place.node for key, place in places.items()})]
            change.deleted += doomed
            for one in doomed:
                given.pop(one, None)
        _put_into_effect(state, given, memory, change)
        return change


def switch(name: str, mode: str, nodes: Iterable[str], *, timeout: float = SYNC_SECONDS) -> list[str]:
    """Let running nodes (none named: all) change their service mode; returns them once they are in sync.

    Raises LabInputError for a mode or node that is not there, and then nothing was changed.
    """
    with states.locked(name):
        state = _loaded(name)
        known = [n.name for n in state.topology.nodes]
        wanted = list(nodes) or known
        for node in wanted:
            if node not in known:
                raise LabInputError(f"--node: lab {name!r} has no node {node!r}; there are {', '.join(known)}")
            agents.node_config(state.topology, node, mode)
        before, state.modes = state.modes, state.modes | dict.fromkeys(wanted, mode)
        _write_configs(state, wanted)
        try:
            agents.reload(state, wanted, timeout)
        except LabError:
            state.modes = before  # so that an agent that starts again does what the others do
            _write_configs(state, wanted)
            raise
        return wanted


def _write_configs(state: LabState, nodes: Iterable[str]) -> None:
    state.save()
    for node in nodes:
        agents.write_config(state, node)


def _with_it(ref: ObjectRef, given: Given, nodes: Mapping[str, str]) -> list[ObjectRef]:
    """Return what goes with a Namespace or a Node."""
    match ref.kind:
        case "Namespace":
            return [one for one in given if one.namespace == ref.name]
        case "Node":
            return [one for one in given if one.kind == "Pod" and nodes.get(f"{one.namespace}/{one.name}") == ref.name]
        case _:
            return []


def _loaded(name: str) -> LabState:
    state = states.load(name)
    if not state.complete:
        raise LabError(f"lab {name!r} is only half made; `nodeplane lab down --name {name}` takes it down")
    return state


def _given(state: LabState) -> Given:
    return {reference(raw): raw for raw in state.given}


def _without(memory: Memory, revived: list[str]) -> Memory:
    return msgspec.structs.replace(memory, removed_nodes=[n for n in memory.removed_nodes if n not in revived])


def _put_into_effect(state: LabState, given: Given, memory: Memory, change: Change) -> None:
    before = {p.key: p for p in state.pods}
    state.given = list(given.values())
    objects = plan_pods(state, given, memory)
    _announce_pods(state, objects)
    change.warnings += _move_pods(state, before)
    _publish(state, objects)


def _move_pods(state: LabState, before: Mapping[str, LabPod]) -> list[str]:
    """Take away and make pods, from what was to what the state says; return warnings, a line each."""
    warnings: list[str] = []
    unfinished = set(state.unfinished)
    _refuse_taken(p.netns for p in state.pods if p.key not in before and not p.host_network)
    wanted = list(state.pods)
    after = {p.key: p for p in wanted}
    gone = [p for key, p in before.items() if key not in after or key in unfinished or _is_another(p, after[key])]
    new = [p for key, p in after.items() if key not in before or key in unfinished or _is_another(before[key], p)]
    state.pods = [*wanted, *(p for p in gone if p not in wanted)]
    state.unfinished = sorted({p.key for p in (*gone, *new)})
    state.save()
    warnings += answering.serve(state, [p for p in wanted if p not in new])
    remove_pods(state, gone)
    attaching.make_pods(state, new)
    warnings += answering.serve(state, wanted)
    warnings += answering.start_commands(state, new)
    state.pods, state.unfinished = wanted, []
    return warnings


def _is_another(old: LabPod, new: LabPod) -> bool:
    """Whether a pod of the same name has to be made anew. Its ports may change under it: the responder sees to that."""
    return msgspec.structs.replace(old, ports=()) != msgspec.structs.replace(new, ports=()) or bool(
        new.command and old.ports != new.ports
    )


def remove_pods(state: LabState, pods: Iterable[LabPod]) -> None:
    """End pods' processes, detach them and let go of their namespaces."""
    pods = list(pods)
    if pods:
        answering.stop_pods(state, pods)
        attaching.remove_pods(state, pods)


class Settled(NamedTuple):
    """What became of given objects: all of them, complete; what was dealt out; and warnings, a line each."""

    objects: Given
    memory: Memory
    warnings: list[str]


def settle(name: str, given: Given, memory: Memory, claim: Callable[[LabState], None]) -> Settled:
    """Let the lab's pods be those of the given objects: the kubelets' work, for the lab's API server.

    ``claim`` is told the state before it is written. Raises LabInputError, and then nothing was changed, and LabError.
    """
    with states.locked(name):
        state = _loaded(name)
        before = {p.key: p for p in state.pods}
        objects = plan_pods(state, given, memory)
        claim(state)
        warnings = _move_pods(state, before)
        state.save()
        return Settled(objects, state.memory, warnings)


def await_told(name: str, version: int, seconds: float) -> None:
    """Wait until every agent that runs has programmed a version of the lab's API server, or for some time."""
    state = states.load(name)
    state.generation = version
    with contextlib.suppress(LabError):
        agents.await_sync(state, seconds)


# -- plans and objects -----------------------------------------------------------------------------------------------


def plan_pods(state: LabState, given: Given, memory: Memory | None = None) -> Given:
    """Complete the objects and set the state's memory and pods accordingly; makes nothing."""
    completed = complete(given, state.topology, memory or Memory())
    state.memory = completed.memory
    state.pods = [_lab_pod(state.name, raw) for ref, raw in completed.objects.items() if ref.kind == "Pod"]
    return completed.objects


def _lab_pod(lab: str, raw: Raw) -> LabPod:
    parsed = parse_object(raw, "the lab")
    if not parsed.objects:
        raise LabInputError(str(parsed.errors[0]))
    pod = parsed.objects[0]
    assert isinstance(pod, Pod)
    own = names.pod_netns(lab, pod.namespace, pod.name)
    return LabPod(
        namespace=pod.namespace,
        name=pod.name,
        node=pod.node,
        netns=names.node_netns(lab, pod.node) if pod.host_network else own,
        ips=tuple(map(str, pod.ips)),
        host_network=pod.host_network,
        command=pod.command,
        ports=tuple(dict.fromkeys((p.protocol, p.port) for p in pod.ports)),
    )


def file_name(ref: ObjectRef) -> str:
    """Return the file an object is in; no name has an underscore, so no two objects share one."""
    return "_".join(part for part in (ref.kind.lower(), ref.namespace, ref.name) if part) + ".json"


def _announce_pods(state: LabState, objects: Given) -> None:
    """Let agents hear of pods before they are made: where policies are enforced none starts that its node does not know."""
    for ref, raw in objects.items():
        path = state.objects / file_name(ref)
        if ref.kind == "Pod" and not path.exists():
            write_file(path, msgspec.json.encode(raw) + b"\n")


def _publish(state: LabState, objects: Given) -> None:
    """Write the objects that differ from what is there, remove those that went, then say so by ``.generation``."""
    wanted = {file_name(ref): msgspec.json.encode(raw) + b"\n" for ref, raw in objects.items()}
    present = {p.name for p in state.objects.iterdir() if not p.name.startswith(".")}
    for name, data in wanted.items():
        if name not in present or (state.objects / name).read_bytes() != data:
            write_file(state.objects / name, data)
    for name in present - wanted.keys():
        (state.objects / name).unlink()
    state.generation += 1
    state.save()
    write_file(state.objects / GENERATION, f"{state.generation}\n".encode())


# -- down ------------------------------------------------------------------------------------------------------------


def down(name: str, say: Say) -> None:
    """Take down a lab, whole or half made. Raises LabError when there is none."""
    with states.locked(name):
        try:
            state: LabState | None = states.load(name)
        except LabError:  # killed before its state was written: then nothing else had been made
            state = None
        _take_down(name, state, say)


def _take_down(name: str, state: LabState | None, say: Say) -> None:
    if state is not None:
        spaces = state.all_netns()
        inodes = processes.inodes(spaces)

        def find() -> set[int]:
            recorded = {p.pid for p in state.processes if processes.is_alive(p)}
            return processes.living_in(inodes) | recorded | processes.running(remote.MODULE, name)

        killed = processes.kill(find, f"lab {name}")
        for space in spaces:
            netns.delete(space)
        say(f"{killed} processes and {len(inodes)} namespaces taken away")
    node_cgroups.remove(name)
    states.remove_root(name)
