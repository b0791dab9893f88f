"""Nodes become pod-to-pod connectivity: what flannel does."""
