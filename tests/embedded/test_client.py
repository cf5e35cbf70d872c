"""Signals that come while a client waits for its program: each reaches it, none before the mesh knows of it."""

import json
import os
import select
import signal
import socket
import threading

import pytest

from ztunnel.embedded.client import FORWARDED, _forwarding_signals, _lines


@pytest.mark.parametrize("number", FORWARDED)
def test_a_signal_before_the_request_follows_it(number: signal.Signals) -> None:
    ours, theirs = socket.socketpair()
    before = signal.getsignal(number)
    with ours, theirs:
        theirs.setblocking(False)
        with _forwarding_signals(ours) as signals:
            os.kill(os.getpid(), number)
            with pytest.raises(BlockingIOError):
                theirs.recv(100)
            signals.begin()
            assert json.loads(theirs.recv(100)) == {"signal": number}
            os.kill(os.getpid(), number)
            assert json.loads(theirs.recv(100)) == {"signal": number}
    assert signal.getsignal(number) == before


def test_a_signal_just_before_the_wait_ends_the_wait() -> None:
    """It leaves something to read, so that no moment is left in which it could be overlooked."""
    ours, theirs = socket.socketpair()
    with ours, theirs, _forwarding_signals(ours) as signals:
        signals.begin()
        assert not select.select([signals.wake], [], [], 0)[0]
        os.kill(os.getpid(), signal.SIGTERM)
        assert select.select([signals.wake], [], [], 0)[0]

        def program() -> None:
            assert json.loads(theirs.recv(100)) == {"signal": signal.SIGTERM}
            theirs.sendall(b'{"exit": 5}\n')

        thread = threading.Thread(target=program)
        thread.start()
        assert next(_lines(ours, signals.wake)) == {"exit": 5}
        thread.join()


def test_other_threads_leave_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def run() -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs, _forwarding_signals(ours) as signals:
            signals.begin()
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
