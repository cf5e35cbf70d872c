"""The node proxy's DNS: answers its pods' queries for names of the mesh, and passes on all others."""
