#!/usr/bin/env bash
# Three pods are replaced one by one while a client connects without pause: not one connection may fail.
. "$(dirname "$0")/../lib.sh"
up --topology "$here/topology.toml"
pod() { # pod NAME [deletionTimestamp]
  printf 'apiVersion: v1\nkind: Pod\nmetadata:\n  name: %s\n  labels: {app: web}\n' "$1"
  [ $# = 1 ] || printf '  deletionTimestamp: "%s"\n' "$2"
  printf 'spec:\n  containers:\n    - name: web\n      ports: [{containerPort: 8080}]\n'
}
log=$(mktemp); stop=$(mktemp)
say "the client connects to http://10.96.0.80 without pause"
at client sh -c 'while [ -e "$0" ]; do curl -s -m 2 http://10.96.0.80 || echo FAILED; done' "$stop" > "$log" &
load=$!
for i in 1 2 3; do
  say "web-v2-$i comes"
  pod "web-v2-$i" | change apply
  say "web-v1-$i is terminating: still there, but no new connections are sent to it"
  pod "web-v1-$i" 2026-01-01T00:00:00Z | change apply
  say "web-v1-$i goes"
  pod "web-v1-$i" | change delete
done
rm "$stop"
wait "$load"
total=$(wc -l < "$log") failed=$(grep -c FAILED "$log" || true)
say "$total connections, $failed failed; who answered:"
cut -d' ' -f1 "$log" | sort | uniq -c
rm "$log"
[ "$total" -gt 0 ] || fail "the client made no connection"
[ "$failed" = 0 ] || fail "$failed connections failed"
