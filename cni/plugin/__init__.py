"""The CNI plugin: a small program in C that runs on the host, and how it is built."""
