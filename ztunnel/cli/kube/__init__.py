"""The mesh of a Kubernetes cluster as the verbs see it: its objects, and its processes' pages by port-forward."""
