"""A packet socket on an interface, with scapy."""

import logging
import os
from typing import Any

SOL_PACKET = 263
PACKET_IGNORE_OUTGOING = 23


def open_link(interface: str, expression: str = "") -> Any:
    """A scapy socket that hears the frames of the interface, in both directions, that a pcap filter lets through.

    On the loopback interface, which shows each frame twice, only once. Raises OSError, ValueError for the filter.
    """
    # Scapy would write caches into the home directory, where nothing shall be left.
    os.environ |= {"XDG_CACHE_HOME": os.devnull, "XDG_CONFIG_HOME": os.devnull}
    # It warns of links whose type it has no packet class for; here frames stay bytes.
    logging.getLogger("scapy").setLevel(logging.ERROR)
    from scapy.arch.common import compile_filter
    from scapy.arch.linux import L2ListenSocket
    from scapy.error import Scapy_Exception

    if expression:
        try:
            compile_filter(expression, iface=interface)
        except (Scapy_Exception, ImportError, OSError) as error:  # ImportError: of libpcap
            raise ValueError(
                f"{expression!r}: {error}; see pcap-filter(7); libpcap has to be installed"
            ) from error
    try:
        link = L2ListenSocket(iface=interface, promisc=False, filter=expression or None)
    except (ValueError, Scapy_Exception) as error:  # what scapy makes of a missing interface, by its version
        raise OSError(str(error)) from error
    if interface == "lo":
        link.ins.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    return link
