#!/usr/bin/env bash
# The Kubernetes documentation's hostnames Service, down to its rules.
. "$(dirname "$0")/../lib.sh"
up --topology "$here/topology.toml"
ip=$(field 's["services"][0]["cluster_ips"][0]')

say "90 connections from the client to http://$ip"
ask client "http://$ip" 90 | cut -d' ' -f1 | sort | uniq -c | tee "/tmp/$LAB.tally"
n=$(wc -l < "/tmp/$LAB.tally"); rm "/tmp/$LAB.tally"
[ "$n" = 3 ] || fail "$n pods answered, not 3"

say "why: the Service's chain on node-1, one rule an endpoint"
rules=$(at node-1 sh -c 'for v in legacy nft; do iptables-$v-save -t nat 2>/dev/null; done | grep -E "^-A KUBE-SVC-[A-Z0-9]+ .*default/hostnames:.*KUBE-SEP-"')
printf '%s\n' "$rules"
[ "$(printf '%s\n' "$rules" | wc -l)" = 3 ] || fail "not three rules"
grep -q -- '--probability 0.33333333' <<< "$rules" || fail "the first of three is not taken one time in three"
grep -q -- '--probability 0.50000000' <<< "$rules" || fail "the second is not taken one time in two of what is left"
[ "$(grep -vc -- --probability <<< "$rules")" = 1 ] || fail "the last must take all that is left"

say "one of the three is deleted: two rules, one half and the rest"
printf 'apiVersion: v1\nkind: Pod\nmetadata: {name: hostnames-2}\n' | change delete
at node-1 sh -c 'for v in legacy nft; do iptables-$v-save -t nat 2>/dev/null; done | grep -E "^-A KUBE-SVC-[A-Z0-9]+ .*default/hostnames:.*KUBE-SEP-"'
ask client "http://$ip" 40 | cut -d' ' -f1 | sort | uniq -c
