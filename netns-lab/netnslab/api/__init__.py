"""A small API server of a lab's own: what kubectl and the agents' source ask of a real one, over the same HTTP."""
