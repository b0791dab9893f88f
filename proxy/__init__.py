"""Services become load balancing: what kube-proxy does."""
