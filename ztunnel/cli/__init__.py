"""The `ambient` command; this package stays importable by any Python 3, so that `main` can say which one it needs."""
