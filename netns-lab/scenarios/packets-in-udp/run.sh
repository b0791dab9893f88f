#!/usr/bin/env bash
# A pod's packet as the payload of UDP, seen on the router; then forwarder and agent are killed, and nobody notices for long.
. "$(dirname "$0")/../lib.sh"
up --topology udp

say "node-1: which engine wraps packets, and the one route into the tunnel"
at node-1 nodeplane status | grep -E '^overlay|^ +node-'
at node-1 ip route show dev flannel0

say "one datagram as it leaves the router, while hostnames-1 asks a pod on node-3"
at router python3 "$here/look.py" west >"/tmp/$LAB.seen" & looking=$!
far=$(field "[p['ip'] for p in s['pods'] if p['node'] == 'node-3'][0]")
for _ in $(seq 20); do
  ask hostnames-1 "http://$far:9376" 1 >/dev/null
  kill -0 $looking 2>/dev/null || break
done
wait $looking || fail "no datagram to port 8285 was seen"
cat "/tmp/$LAB.seen"; seen=$(cat "/tmp/$LAB.seen"); rm "/tmp/$LAB.seen"
[[ $seen == *"outer  192.168."*"inner  10.244."* ]] || fail "that is no packet of a pod in UDP"

say "the forwarder of node-1 is killed"
forwarder() { at node-1 sh -c 'cat /run/nodeplane/forwarder.lock'; }
first=$(forwarder)
kill -9 "$first"
for _ in $(seq 50); do [ "$(forwarder)" != "$first" ] && break; sleep 0.1; done
[ "$(forwarder)" != "$first" ] || fail "no other forwarder came"
for _ in $(seq 5); do answer=$(ask hostnames-1 "http://$far:9376" 1); [ -n "$answer" ] && break; done
[ -n "$answer" ] || fail "node-3 is not reached any more"
echo "process $first is gone, $(forwarder) forwards; the pod on node-3 answers"

say "the agent of node-1 is killed; its forwarder goes on"
kill -9 "$(field "[n['agent_pid'] for n in s['nodes'] if n['name'] == 'node-1'][0]")"
answers=$(ask hostnames-1 "http://$far:9376" 10 | grep -c .)
echo "$answers of 10 questions answered without an agent"
[ "$answers" = 10 ] || fail "the tunnel needs the agent"
