"""What a process can tell of itself while it runs: its tasks, its memory, where its time goes, its connections.

Imported by workers too: nothing but the standard library, trio and msgspec.
"""
