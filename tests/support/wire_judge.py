"""What was seen on the wires of a node, judged by the oracle: the same question for every mode."""

import random

from service_worlds import LOCAL_ADDRESSES

TRIES = 3
"""How often each flow is sent: balancing draws lots, and each result must be one the oracle knows."""


def outcome_of(flow, event):
    """Bring what was seen on the wires into the oracle's words; a set where the wire cannot tell two apart."""
    local = flow.destination in LOCAL_ADDRESSES or flow.destination.is_loopback
    if event is None:
        return {"drop"}
    what, destination, port, _source = event
    if what == "refused":
        # The node itself refuses a port on which nobody listens, just as a rule would.
        return {"reject", "pass", "accept"} if local else {"reject"}
    if (destination, port) == (flow.destination, flow.port):
        return {"drop", "reject", "pass", "accept"} if local else {"pass"}
    return {f"[{destination}]:{port}" if destination.version == 6 else f"{destination}:{port}"}


def agrees(flow, event, expected):
    """Whether what was seen is among the oracle's outcomes, source address included."""
    seen = outcome_of(flow, event)
    for outcome in expected:
        if (outcome.backend or outcome.verdict) not in seen:
            continue
        if not outcome.backend or flow.source in LOCAL_ADDRESSES:
            return True
        replaced = event[3] != flow.source
        if replaced == outcome.masquerade:
            return True
    return False


class Judge:
    """Sends flows over a wire and holds what becomes of them against an oracle."""

    def __init__(self, wire):
        self._wire = wire
        self._identities = iter(range(random.randrange(1 << 20), 1 << 30))

    def disagreements(self, flows, oracle):
        """Send every flow a few times; return (flow, what was seen, what is allowed) wherever the two do not meet."""
        sent = {}
        for flow in flows:
            for _ in range(TRIES):
                identity = next(self._identities)
                sent[identity] = flow
                self._wire.send(flow, identity)
        found = self._wire.collect(sent)
        judged = [(flow, found.get(identity), oracle.judge(flow).outcomes) for identity, flow in sent.items()]
        return [one for one in judged if not agrees(*one)]
