"""A Kubernetes cluster of network namespaces on one machine."""
