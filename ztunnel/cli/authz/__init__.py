"""What `ambient authz` computes: what policies mean for connections, without a connection being made."""
