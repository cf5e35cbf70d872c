"""Workload identity: SPIFFE ids, keys, the certificate authority, TLS contexts and certificate rotation.

Nothing is imported here: workers load `tls` and `certs` alone.
"""
