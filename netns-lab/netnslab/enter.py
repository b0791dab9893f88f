"""Becoming a program inside a pod, a node, the router or the external client: `lab exec`.

Decides which place a name means. The program replaces this process, so its exit code, its terminal and its signals are its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from netnslab import agents, mounts, names, node_cgroups
from netnslab.errors import LabError
from netnslab.state import LabState


class Place(NamedTuple):
    """A namespace, and the node whose view of /run belongs to it, if one does."""

    netns: str
    view: mounts.NodeView | None
    lab: str = ""
    node: str = ""
    """Whose process it becomes; empty: nobody's."""


def find_place(state: LabState, stated: str) -> Place:
    """Return where ``ns/pod``, a node, ``external``, ``router`` or a pod of the default namespace is. Raises LabError."""
    if "/" not in stated:
        if state.topology.node(stated) is not None:
            return Place(state.node_netns(stated), agents.node_view(state, stated), state.name, stated)
        if stated in {names.EXTERNAL, names.ROUTER}:
            return Place(state.node_netns(stated), None)
    pod = state.pod(stated if "/" in stated else f"default/{stated}")
    if pod is None:
        nodes = ", ".join(n.name for n in state.topology.nodes)
        raise LabError(f"lab {state.name!r} has no pod or node {stated!r}; its nodes are {nodes}, external and router")
    return Place(pod.netns, agents.node_view(state, pod.node) if pod.host_network else None, state.name, pod.node)


def become(place: Place, command: Sequence[str]) -> NoReturn:
    """Replace this process by a program in that place. Raises LabError if there is no such program."""
    if place.node:
        node_cgroups.enter(place.lab, place.node)
    mounts.enter(place.netns, place.view)
    os.environ["PATH"] = agents.path_with_program()
    try:
        os.execvp(command[0], list(command))  # noqa: S606  running what was asked for is the point
    except OSError as error:
        raise LabError(f"{command[0]}: {error.strerror}") from error
