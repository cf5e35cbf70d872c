"""The verbs of the `ambient` command, one module each; each has its click command as `command`."""
