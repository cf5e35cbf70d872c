"""An ambient service mesh: the node proxy, its control plane and the `ambient` command."""

__version__ = "0.1.0"
