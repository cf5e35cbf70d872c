"""The waypoint: a proxy that stands before services or workloads, with an identity of its own.

What is sent to them enters it through one tunnel and leaves it through another one. It decides about connections: who
may reach what it stands before, and which endpoint is taken.
"""
