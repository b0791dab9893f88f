"""Measurements of nodeplane; ``run.py`` begins, README.md explains each."""
