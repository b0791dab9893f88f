#!/usr/bin/env bash
# Two "pods" on a "node", wired with nothing but ip(8): what a bridge CNI plugin does, then what a routed one does.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
me=np-hand-$$
node=$me-node a=$me-a b=$me-b
trap 'for n in $node $a $b; do ip netns del "$n" 2>/dev/null || true; done' EXIT
say() { printf '\n== %s\n' "$*"; }

say "three namespaces: a node and two pods"
for n in "$node" "$a" "$b"; do ip netns add "$n"; ip -n "$n" link set lo up; done

say "a bridge on the node, and one veth pair for each pod: one end in the pod, the other plugged into the bridge"
ip -n "$node" link add cni0 type bridge
ip -n "$node" addr add 10.244.1.1/24 dev cni0
ip -n "$node" link set cni0 up
i=2
for pod in "$a" "$b"; do
  ip -n "$node" link add "veth$i" type veth peer name eth0 netns "$pod"
  ip -n "$node" link set "veth$i" master cni0 up
  ip -n "$pod" addr add "10.244.1.$i/24" dev eth0
  ip -n "$pod" link set eth0 up
  ip -n "$pod" route add default via 10.244.1.1
  i=$((i + 1))
done

say "pod a pings pod b: a and b are neighbours, the bridge passes frames"
ip netns exec "$a" python3 "$here/ping.py" 10.244.1.3
ip -n "$a" neigh show
bridge -n "$node" fdb show br cni0 | grep -v permanent || true

say "the same without a bridge: the node routes to each pod, and 169.254.1.1 is a gateway that exists nowhere"
ip -n "$node" link del cni0
i=2
for pod in "$a" "$b"; do
  ip -n "$pod" addr flush dev eth0 scope global
  ip -n "$pod" addr add "10.244.1.$i/32" dev eth0
  ip -n "$pod" route add 169.254.1.1 dev eth0 scope link
  ip -n "$pod" route add default via 169.254.1.1
  mac=$(ip -n "$node" -o link show "veth$i" | sed -E 's/.*link\/ether ([0-9a-f:]+).*/\1/')
  ip -n "$pod" neigh replace 169.254.1.1 lladdr "$mac" dev eth0 nud permanent
  mac=$(ip -n "$pod" -o link show eth0 | sed -E 's/.*link\/ether ([0-9a-f:]+).*/\1/')
  ip -n "$node" neigh replace "10.244.1.$i" lladdr "$mac" dev "veth$i" nud permanent
  ip -n "$node" route add "10.244.1.$i" dev "veth$i"
  i=$((i + 1))
done
ip netns exec "$node" sysctl -qw net.ipv4.ip_forward=1
ip netns exec "$a" python3 "$here/ping.py" 10.244.1.3
say "ttl=63 above: the packet was forwarded by a router, the node. The node's routes:"
ip -n "$node" route show
