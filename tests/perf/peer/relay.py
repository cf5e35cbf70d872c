"""python relay.py LISTEN-PORT HOST PORT: a TCP relay on loopback, a thread a direction."""

import socket
import sys
import threading


def copy(source: socket.socket, target: socket.socket) -> None:
    """Until the end of `source`."""
    try:
        while data := source.recv(262144):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        source.close()
        target.close()


listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=1024)
while True:
    client, _ = listener.accept()
    server = socket.create_connection((sys.argv[2], int(sys.argv[3])))
    for one in (client, server):
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for pair in ((client, server), (server, client)):
        threading.Thread(target=copy, args=pair, daemon=True).start()
