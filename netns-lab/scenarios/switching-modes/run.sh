#!/usr/bin/env bash
# A node changes how it writes Services, under load: no new connection fails, an open one goes on, nothing of the old is left.
. "$(dirname "$0")/../lib.sh"
up --topology "$here/topology.toml"
log=$(mktemp); talk=$(mktemp); stop=$(mktemp)
say "the client connects to http://10.96.0.80 without pause, and keeps one connection to 10.96.0.7:7 open"
at client sh -c 'while [ -e "$0" ]; do curl -s -m 2 http://10.96.0.80 || echo FAILED; done' "$stop" > "$log" &
load=$!
at client python3 "$here/talk.py" 10.96.0.7 7 "$stop" > "$talk" &
conversation=$!
rules() { at node-1 sh -c 'iptables-save; iptables-legacy-save' 2>/dev/null | grep -c -e "-A KUBE-" || true; }
tables() { at node-1 nft list tables | grep -c nodeplane || true; }
say "iptables: $(rules) rules in KUBE- chains, $(tables) nftables tables of ours"
[ "$(rules)" -gt 0 ] && [ "$(tables)" = 0 ] || fail "not what iptables mode looks like"
for mode in ${MODES:-nftables iptables}; do
  say "every node changes to $mode"
  np lab switch --name "$LAB" "$mode"
  echo "$mode: $(rules) rules in KUBE- chains, $(tables) nftables tables of ours"
  case $mode in
    nftables) [ "$(rules)" = 0 ] && [ "$(tables)" = 1 ] || fail "something of the old mode is left" ;;
    *) [ "$(rules)" -gt 0 ] && [ "$(tables)" = 0 ] || fail "something of the old mode is left" ;;
  esac
done
rm "$stop"
wait "$load"
wait "$conversation" || fail "the open connection broke"
total=$(wc -l < "$log") failed=$(grep -c FAILED "$log" || true)
say "$total new connections, $failed failed; the open one carried $(cat "$talk") lines there and back"
rm "$log" "$talk"
[ "$total" -gt 0 ] || fail "the client made no connection"
[ "$failed" = 0 ] || fail "$failed connections failed"
