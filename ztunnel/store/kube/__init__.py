"""A Kubernetes cluster as the store of objects, and access to its API server."""
