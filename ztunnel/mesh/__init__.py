"""The model of the mesh: who there is, what address means whom, which endpoint a connection goes to. No I/O."""
