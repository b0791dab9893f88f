#!/usr/bin/env bash
# Does a ClusterIP answer ping? In IPVS mode every node holds it on kube-ipvs0, so yes; in the others it is on no link, so no.
. "$(dirname "$0")/../lib.sh"
modes=(iptables nftables)
if modprobe -q ip_vs || [ -e /proc/net/ip_vs ]; then
  modes+=(ipvs)
else
  say "this kernel has no IPVS: netns-lab/vm/run $0 shows the third mode"
fi
up
pings() { at "$1" ping -n -q -c 1 -W 2 "$2" >/dev/null; }
for mode in "${modes[@]}"; do
  np lab switch --name "$LAB" "$mode"
  say "$mode: does 10.96.1.1 answer?"
  if pings hostnames-1 10.96.1.1; then answer=yes; else answer=no; fi
  echo "ping says $answer; the Service itself says: $(ask hostnames-1 http://10.96.1.1 1)"
  at node-1 sh -c 'ip -brief address show dev kube-ipvs0 2>/dev/null || echo "there is no kube-ipvs0"'
  case $mode in
    ipvs) [ $answer = yes ] || fail "a ClusterIP in IPVS mode does not answer ping" ;;
    *) [ $answer = no ] || fail "a ClusterIP in $mode mode answers ping" ;;
  esac
done
