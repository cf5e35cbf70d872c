"""`ambient demo`: a bookshop in a mesh, under load, with a capture on the link between its nodes as the proof.

The programs that run inside pods (bookshop, loadgen) use the standard library only and start in milliseconds;
what orchestrates them (run, mesh, proof, live) runs in the `ambient demo` process.
"""
