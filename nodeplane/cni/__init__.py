"""The CNI plugin: hangs pods on the node, and takes them away again."""
