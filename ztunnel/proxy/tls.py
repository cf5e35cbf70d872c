"""TLS over memory BIOs with reused buffers: the only file that touches OpenSSL below pyOpenSSL's public calls.

Bytes from the network are put into the read BIO, plaintext is decrypted into one shared buffer, ciphertext is taken
whole from the write BIO into another. pyOpenSSL's bio_write/recv/bio_read allocate and copy for each call: the same
work through its cffi binding moves 5.2-6.3 instead of 4.5 Gbit/s. Where the binding does not have what is needed
(`AMBIENT_TLS=public` forces this), the public calls do the same work; tests run both.

The buffers are shared by all connections of a process: whatever a method returns is valid until the next call of
any method of any engine.
"""

import os
from typing import Any

from OpenSSL import SSL

from ztunnel.identity.errors import IdentityError, RevokedError
from ztunnel.identity.tls import handshake_error
from ztunnel.memory import reserved

PLAIN = 256 * 1024  # bytes of plaintext decrypted at once: sixteen records
CIPHER = 512 * 1024  # bytes of ciphertext read from, or written to, the network at once

_WANT_READ = 2
_ZERO_RETURN = 6
_PARTIAL_WRITE = 0x1

plain = reserved(PLAIN)
"""Where `read` leaves plaintext."""
received = reserved(CIPHER)
"""Where callers put bytes from the network before `feed`."""
_out = reserved(CIPHER)


class TlsError(Exception):
    """The handshake or a record failed; the message is OpenSSL's reason."""


class CertificateRevoked(TlsError):
    """One side's certificate is revoked, and the other one refused it for that."""


class TlsClosed(TlsError):
    """The peer ended TLS (close_notify)."""


def prepare(context: SSL.Context) -> SSL.Context:
    """Make a context fit for engines; to be called before its first connection. Returns it."""
    context.clear_mode(
        _PARTIAL_WRITE
    )  # pyOpenSSL sets it; without it SSL_write takes all it is given in one call
    return context


class PublicEngine:
    """One TLS connection through pyOpenSSL's public interface."""

    __slots__ = ("_broken", "connection")

    def __init__(self, context: SSL.Context, server: bool) -> None:
        self._broken: TlsError | None = None  # found behind good records: for the next read
        self.connection = SSL.Connection(context, None)
        if server:
            self.connection.set_accept_state()
        else:
            self.connection.set_connect_state()

    def handshake(self) -> bool:
        """Go on with the handshake; True once it is done. Raises TlsError."""
        try:
            self.connection.do_handshake()
        except SSL.WantReadError:
            return False
        except (SSL.Error, IdentityError) as error:
            raise self._explained(error) from None
        return True

    def _explained(self, error: SSL.Error | IdentityError) -> TlsError:
        told = handshake_error(self.connection, error) if isinstance(error, SSL.Error) else error
        return (CertificateRevoked if isinstance(told, RevokedError) else TlsError)(str(told))

    def feed(self, size: int) -> None:
        """Take `size` bytes of `received`."""
        view = received[:size]
        while len(view):
            view = view[self.connection.bio_write(bytes(view)) :]

    def read(self) -> int:
        """Decrypt into `plain`; the number of bytes, 0 if more must be fed first.

        Raises TlsClosed at the peer's close_notify, TlsError on a bad record.
        """
        if self._broken is not None:
            raise self._broken
        total = 0
        try:
            while total < PLAIN:
                total += self.connection.recv_into(plain[total:], PLAIN - total)
        except SSL.WantReadError:
            pass
        except SSL.ZeroReturnError:
            if not total:
                raise TlsClosed("closed by the peer") from None
        except SSL.Error as error:
            self._broken = self._explained(error)
            if not total:
                raise self._broken from None
        return total

    def write(self, data: "bytes | bytearray | memoryview") -> None:
        """Encrypt all of `data` into the write BIO. Raises TlsError."""
        view = memoryview(data)
        try:
            while len(view):
                view = view[self.connection.send(view) :]
        except SSL.Error as error:
            raise self._explained(error) from None

    def take(self) -> memoryview:
        """The next ciphertext to send, empty if there is none; call again until it is empty."""
        try:
            data = self.connection.bio_read(CIPHER)
        except SSL.WantReadError:
            return _out[:0]
        _out[: len(data)] = data
        return _out[: len(data)]

    def shrink(self) -> None:
        """Give back what the BIOs have grown to; only while all that was to be sent has been taken."""

    def close(self) -> None:
        """Queue a close_notify, to be taken and sent; errors do not matter any more."""
        try:
            self.connection.shutdown()
        except SSL.Error:
            pass


class BindingEngine(PublicEngine):
    """The same through the binding: no copy but OpenSSL's own, no exception where nothing is wrong."""

    __slots__ = ("_rbio", "_ssl", "_wbio")

    def __init__(self, context: SSL.Context, server: bool) -> None:
        super().__init__(context, server)
        connection: Any = self.connection
        self._ssl = connection._ssl
        self._rbio = connection._into_ssl
        self._wbio = connection._from_ssl

    def feed(self, size: int) -> None:
        _bio_write(self._rbio, _received_c, size)

    def read(self) -> int:
        ssl = self._ssl
        size = _ssl_read(ssl, _plain_c, PLAIN)
        if size <= 0:
            if self._broken is not None:
                _clear_errors()
                raise self._broken
            return self._nothing(size)
        total: int = size
        # SSL_read gives one record (16 KiB at most). A record is followed by more while bulk flows, and one call
        # that finds nothing costs about 1 us: less than what a larger write to the application saves.
        while size >= 8192 and total < PLAIN:
            size = _ssl_read(ssl, _plain_c + total, PLAIN - total)
            if size <= 0:
                # What is wrong is raised by the next call. OpenSSL itself fails again then, but says why only once.
                try:
                    self._nothing(size)
                except TlsError as error:
                    self._broken = error
                break
            total += size
        return total

    def _nothing(self, result: int) -> int:
        code = _get_error(self._ssl, result)
        if code == _WANT_READ:
            return 0
        if code == _ZERO_RETURN:
            raise TlsClosed("closed by the peer")
        try:
            connection: Any = self.connection
            connection._raise_ssl_error(self._ssl, result)
        except SSL.Error as error:
            raise self._explained(error) from None
        return 0

    def write(self, data: "bytes | bytearray | memoryview") -> None:
        size = len(data)
        result = _ssl_write(self._ssl, _from_buffer(data), size)
        if result != size:
            self._nothing(result)
            raise TlsError("OpenSSL did not take the data")

    def take(self) -> memoryview:
        size = _bio_read(self._wbio, _out_c, CIPHER)
        return _out[: size if size > 0 else 0]

    def shrink(self) -> None:
        # A memory BIO keeps the most that it ever held (0.7 MiB after reads of 512 KiB): new ones take their place.
        rbio, wbio = _bio_new(_bio_s_mem()), _bio_new(_bio_s_mem())
        while (size := _bio_read(self._rbio, _out_c, CIPHER)) > 0:  # the beginning of a record
            _bio_write(rbio, _out_c, size)
        _set_bio(self._ssl, rbio, wbio)  # frees the others
        connection: Any = self.connection
        connection._into_ssl, connection._from_ssl = rbio, wbio
        self._rbio, self._wbio = rbio, wbio


Engine: type[PublicEngine] = PublicEngine
"""The engine in use."""

try:
    _ssl_module: Any = SSL
    _lib: Any = _ssl_module._lib
    _ffi: Any = _ssl_module._ffi
    _ssl_read = _lib.SSL_read
    _ssl_write = _lib.SSL_write
    _bio_read = _lib.BIO_read
    _bio_write = _lib.BIO_write
    _get_error = _lib.SSL_get_error
    _clear_errors = _lib.ERR_clear_error
    _bio_new = _lib.BIO_new
    _bio_s_mem = _lib.BIO_s_mem
    _set_bio = _lib.SSL_set_bio
    _from_buffer = _ffi.from_buffer
    _plain_c = _from_buffer(plain)
    _received_c = _from_buffer(received)
    _out_c = _from_buffer(_out)
except AttributeError:  # another pyOpenSSL than the ones tried
    pass
else:
    if os.environ.get("AMBIENT_TLS") != "public":
        Engine = BindingEngine
