"""The node agent: which pods are in the mesh, the rules in their network namespaces, and ztunnel told of them."""
