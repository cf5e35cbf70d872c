"""The mesh's Kubernetes manifests, as files that `kubectl apply -k` and `ambient install` both read."""
