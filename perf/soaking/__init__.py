"""The parts of the soak (perf/soak.py): what runs in the pods, what changes the mesh, what watches, what judges."""
