"""ADD and DEL: the order in which a pod is attached and taken away, and what is undone when something fails in between.

    ADD   veth pair (fails if the pod has the interface) -> record -> addresses -> policies in force -> both ends configured -> result
    DEL   record, else what can be said without -> addresses given back -> link -> told the agent -> record away

ADD undoes in reverse what it did. DEL does all it can, whatever is missing; what fails is told at the end, and the record stays, so
that a second DEL or GC finds it. Concurrent calls for different containers meet only in the address management, which has a lock, and
on the bridge, of which the second finds the first's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType

from kernelstate.errors import KernelRefusedError
from kernelstate.linux.netns_file import is_held, is_own
from kernelstate.linux.pod_link import alias_of, links_in, open_links
from nodeplane.cni import bridge, gate, ipam, routed, store
from nodeplane.cni.config import TYPE, render, stated_mac
from nodeplane.cni.delegate import call_plugin
from nodeplane.cni.protocol import INVALID_NETNS, IO_FAILURE, KERNEL_REFUSED, Attachment, CniError, Json
from nodeplane.cni.result import parse_result

Environment = Mapping[str, str]
MODULES: dict[str, ModuleType] = {"routed": routed, "bridge": bridge}


def add(conf: Json, attachment: Attachment, environment: Environment) -> Json:
    """Attach a pod; return the result in the form of 1.1.0. Raises CniError, KernelRefusedError; then nothing is left."""
    check_netns(attachment, environment)
    rendered = render(conf)
    mac = stated_mac(conf, attachment.args)
    with contextlib.ExitStack() as undo:
        if rendered["type"] == TYPE:
            result = _attach(rendered, attachment, environment, mac, undo)
        else:
            result = _delegate(rendered, attachment, environment, undo)
        undo.pop_all()
    return result


def _attach(conf: Json, attachment: Attachment, environment: Environment, mac: str, undo: contextlib.ExitStack) -> Json:
    mode = MODULES[conf["mode"]]
    ends = mode.make_ends(conf, attachment, mac)
    undo.callback(gate.withdraw, conf, attachment)
    undo.callback(_try, delete_near, ends.near)
    store.keep(conf, attachment)
    undo.callback(store.forget, conf, attachment)
    undo.callback(_try, ipam.ask, "DEL", conf, environment)
    given = ipam.addresses(conf, environment)
    gate.wait(conf, attachment, [one["address"].partition("/")[0] for one in given["ips"]])
    result: Json = mode.connect(conf, attachment, ends, given)
    return result


def _delegate(conf: Json, attachment: Attachment, environment: Environment, undo: contextlib.ExitStack) -> Json:
    with links_in(attachment.netns) as pod:
        if pod.exists(attachment.ifname):  # asked here: undoing a delegate's failure would take away what is there
            raise KernelRefusedError("create link", f"{attachment.ifname} in {attachment.netns}", "File exists")
    store.keep(conf, attachment)
    undo.callback(store.forget, conf, attachment)
    undo.callback(_try, call_plugin, "DEL", conf, environment)
    return call_plugin("ADD", conf, environment)


def delete(conf: Json, attachment: Attachment, environment: Environment) -> None:
    """Take an attachment away, as far as there is anything of it. Raises CniError naming what could not be done."""
    made = made_with(conf, attachment)
    failures: list[str] = []
    if made["type"] == TYPE:
        with collecting(failures):
            ipam.ask("DEL", made, environment)
        with collecting(failures):
            delete_link(made["name"], attachment)
        gate.withdraw(made, attachment)
    else:
        previous = conf.get("prevResult")
        with collecting(failures):
            call_plugin("DEL", {**made, **({"prevResult": parse_result(previous)} if previous else {})}, environment)
    if failures:
        raise CniError(IO_FAILURE, f"DEL of {attachment.words}: {'; '.join(failures)}")
    store.forget(made, attachment)


def made_with(conf: Json, attachment: Attachment) -> Json:
    """Return the configuration an attachment was made with; where there is no record, one that is good enough to undo it."""
    kept = store.find(conf, attachment)
    stated = {key: conf[key] for key in ("cniVersion", "name", "dataDir") if conf.get(key)}
    if kept is not None:
        return {**kept, **stated}
    try:
        return render(conf)
    except CniError:  # subnet.env has gone with the agent, say
        kind = (conf.get("delegate") or {}).get("type", TYPE)
        own = {"type": ipam.HOST_LOCAL, "ranges": ipam.ANY_RANGE}
        return {**stated, "type": kind, "mode": conf.get("mode") or "routed", "ipam": {**own, **(conf.get("ipam") or {})}}


def delete_link(network: str, attachment: Attachment) -> None:
    """Delete a pod's interface, from inside where the namespace is still there, else by the mark of the node's end."""
    if attachment.netns and is_held(attachment.netns) and not is_own(attachment.netns):  # never a link of the node's own
        with links_in(attachment.netns) as pod:
            pod.delete(attachment.ifname)
        return
    mark = alias_of(network, attachment.container, attachment.ifname)
    with open_links() as node:
        for one in node.links():
            if one.alias == mark:
                node.delete(one.name)


def delete_near(name: str) -> None:
    """Delete the node's end of a pair, and so both."""
    with open_links() as node:
        node.delete(name)


def check_netns(attachment: Attachment, environment: Environment) -> None:
    """See that the pod's namespace is one, and not the node's. Raises CniError."""
    if not is_held(attachment.netns):
        raise CniError(INVALID_NETNS, f"CNI_NETNS: must be a network namespace, is {attachment.netns!r}")
    if is_own(attachment.netns) and environment.get("CNI_NETNS_OVERRIDE", "").lower() not in {"1", "true", "t"}:
        raise CniError(INVALID_NETNS, f"CNI_NETNS: is the node's own network namespace: {attachment.netns!r}")


@contextlib.contextmanager
def collecting(failures: list[str]) -> Iterator[None]:
    """Note what fails, and go on."""
    try:
        yield
    except CniError as error:
        failures.append(error.message)
    except (KernelRefusedError, OSError) as error:
        failures.append(str(error))


def _try(function: Callable[..., object], *arguments: object) -> None:
    """Undo one thing; that it fails is less important than what made us undo it, and GC comes by."""
    with collecting([]):
        function(*arguments)


def kernel_words(error: KernelRefusedError) -> CniError:
    """Say in CNI's form what the kernel refused."""
    return CniError(KERNEL_REFUSED, str(error))
