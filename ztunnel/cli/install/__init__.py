"""The life cycle of an installation in a Kubernetes cluster; what the verbs install, uninstall and upgrade do."""
