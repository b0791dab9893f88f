"""Benchmarks: what a change, a first sync and a packet cost."""
