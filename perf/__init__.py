"""The bench room: what the mesh costs, measured beside a direct connection in one run. Rule: never a test."""
