#!/usr/bin/env bash
# A NodePort from outside the cluster: who answers, and whose address does he see?
. "$(dirname "$0")/../lib.sh"
up
node=$(field 's["nodes"][0]["ip"]') client=$(field 's["external"]["ip"]')

say "externalTrafficPolicy: Cluster. 60 connections from $client to node-1, $node:30080"
ask external "http://$node:30080" 60 | sort | uniq -c | tee "/tmp/$LAB.tally"
answers=$(cat "/tmp/$LAB.tally"); rm "/tmp/$LAB.tally"
grep -q " $client\$" <<< "$answers" && fail "a pod saw the client's own address"

say "externalTrafficPolicy: Local"
change apply "$here/local.yaml"
answers=$(ask external "http://$node:30080" 30 | sort | uniq -c)
printf '%s\n' "$answers"
grep -qv " $client\$" <<< "$answers" && fail "a pod did not see the client's own address"
local=$(field '" ".join(p["namespace"] + "/" + p["name"] for p in s["pods"] if p["node"] == "node-1")')
for pod in $(awk '{print $2}' <<< "$answers"); do
  [[ " $local " == *" $pod "* ]] || fail "$pod answered and is not on node-1"
done
echo "only node-1's own pods answered, and they saw $client"
