"""NetworkPolicy: from selectors to who may talk to whom, seen from one node."""
