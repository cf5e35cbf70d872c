"""The control plane: objects of the store in, xDS and certificates out, to any node proxy that speaks them."""
