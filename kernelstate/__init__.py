"""What Linux should hold, and how to get it there. Knows no Kubernetes word."""
