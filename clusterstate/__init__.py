"""What Kubernetes says: objects parsed once into frozen values. Imports nothing of ours."""
