"""The account of what waits for slow readers."""

from ztunnel.proxy.buffers import Buffers
from ztunnel.proxy.errors import BuffersFull, ProxyError


class Reader:
    """For whom some bytes wait; it forgets nothing by itself."""

    def __init__(self, waiting: int) -> None:
        self.buffered = waiting
        self.ended: list[ProxyError] = []

    def fail(self, error: ProxyError) -> None:
        self.ended.append(error)


def test_what_waits_is_counted_as_it_changes() -> None:
    buffers = Buffers(1000)
    one, other = Reader(300), Reader(200)
    buffers.changed(one)
    buffers.changed(other)
    one.buffered = 100
    buffers.changed(one)
    assert (buffers.held, len(buffers)) == (300, 2)
    buffers.forget(one)
    buffers.forget(one)
    assert (buffers.held, len(buffers)) == (200, 1)


def test_over_the_limit_the_largest_go_until_the_rest_fits() -> None:
    buffers = Buffers(1000)
    readers = [Reader(400), Reader(450), Reader(100)]
    for reader in readers:
        buffers.changed(reader)
    assert not any(reader.ended for reader in readers)
    readers[2].buffered = 700
    buffers.changed(readers[2])
    assert [len(reader.ended) for reader in readers] == [0, 0, 1]
    assert isinstance(readers[2].ended[0], BuffersFull)
    assert buffers.held == 850
