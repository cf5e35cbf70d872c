"""The messages of the wire: .proto files under proto/ and the modules generated from them.

Imported by the control process, the control plane and the node agent, never by a worker.
"""
