"""NetworkPolicy and ClusterNetworkPolicy: from selectors to who may talk to whom, seen from one node."""
