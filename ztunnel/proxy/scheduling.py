"""How eagerly the kernel runs a worker that has been woken: at once while little happens, in its turn while much does.

A waking program usually cuts in on the one that runs. For a single request that is right. Under many it means that
the proxy is woken for each event alone, takes the core away from the client or server that was about to make the
next ones, and pays two switches, two system calls and a TLS record for one small message. A program of the class
SCHED_BATCH (sched(7)) waits until the one that runs has made its pause, and then finds several events.

Measured on 2 cores, 16 connections: 33,000 instead of 28,000 requests a second, 29 instead of 34 us of processor
time in both proxies for each; 64 connections: 5 % more. At one connection there is nothing to gather. Where other
programs keep all cores busy the batch class costs latency (4 connections beside one such program: p99 9 instead of 2
ms), so it is for times of many events only.
"""

import os

MANY = 3.0  # events a turn, on average, from which on they are gathered
FEW = 2.0  # and below which they are no more


class Scheduling:
    """Chooses between SCHED_OTHER and SCHED_BATCH for this thread by what its reactor has to do.

    A process that was started in another class (SCHED_IDLE, a real-time one) keeps it, as does everything where
    the system refuses: its owner has decided.
    """

    __slots__ = ("_enabled", "_events", "_turns", "batch")

    def __init__(self, enabled: bool = True) -> None:
        self.batch = False
        self._enabled = enabled and os.sched_getscheduler(0) == os.SCHED_OTHER
        self._turns = 0
        self._events = 0

    def adapt(self, turns: int, events: int) -> None:
        """Look at the reactor's counts of turns and events since its start; to be called a few times a second."""
        some = turns - self._turns
        each = (events - self._events) / some if some else 0.0
        self._turns, self._events = turns, events
        wanted = each >= MANY or (self.batch and each >= FEW)
        if wanted != self.batch and self._enabled:
            try:
                os.sched_setscheduler(0, os.SCHED_BATCH if wanted else os.SCHED_OTHER, os.sched_param(0))
            except OSError:  # a sandbox that does not allow it
                self._enabled = False
            else:
                self.batch = wanted
