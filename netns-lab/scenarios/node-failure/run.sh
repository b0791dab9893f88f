#!/usr/bin/env bash
# A node loses its network. Until the control plane notices, a third of all connections goes nowhere.
. "$(dirname "$0")/../lib.sh"
up
ip=$(field 's["services"][0]["cluster_ips"][0]')
tally() { ask hostnames-1 "http://$ip" "$1" | cut -d' ' -f1 | sed 's/^$/(no answer)/' | sort | uniq -c; }

say "all is well"
tally 30

say "node-3's cable is pulled"
at node-3 ip link set eth0 down
before=$(ask hostnames-1 "http://$ip" 12)
sed 's/^$/(no answer)/' <<< "$before" | cut -d' ' -f1 | sort | uniq -c
echo "its pods are still endpoints, so some connections time out"

say "the control plane gives the node up: its Node object and its pods go, and every other node takes their rules out"
printf 'apiVersion: v1\nkind: Node\nmetadata: {name: node-3}\n' | change delete
after=$(tally 120)   # six pods equally likely: one is missed by all of these once in five hundred million times
printf '%s\n' "$after"
grep -q 'no answer' <<< "$after" && fail "connections are still lost"
[ "$(wc -l <<< "$after")" = 6 ] || fail "not all six remaining pods answered"
[ "$(at node-1 ip route show | grep -c '10.244.3.0/24' || true)" = 0 ] || fail "node-1 still has a route to node-3's pods"
