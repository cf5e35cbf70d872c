"""What the nodes' metrics say of the traffic: read from all of them, compared with a moment ago, added up and shown."""
