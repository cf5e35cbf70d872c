"""The control plane in a Kubernetes cluster: what it asks of, keeps in and writes to the API server.

Rule: what several replicas share is in the API server; a replica that cannot reach it goes on with what it has read.
"""
