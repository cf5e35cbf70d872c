"""The node's side of the control plane: the mesh by delta xDS, and certificates."""
