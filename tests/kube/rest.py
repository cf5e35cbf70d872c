"""The few requests that the lab itself makes of its API server, with the standard library only."""

import http.client
import json
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode


class RestError(Exception):
    """The API server answered with an error: `status`, and its message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Rest:
    """A client with a certificate of the lab's folder `pki`."""

    def __init__(self, address: str, port: int, pki: Path, user: str) -> None:
        self._target = (address, port)
        self._tls = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        self._tls.load_cert_chain(str(pki / f"{user}.crt"), str(pki / f"{user}.key"))

    def request(
        self, method: str, path: str, body: object = None, content_type: str = "application/json"
    ) -> Any:
        """The answer's JSON, or its text when it is none. Raises RestError, OSError."""
        connection = self._connect(20)
        try:
            connection.request(
                method, path, json.dumps(body) if body is not None else None, {"Content-Type": content_type}
            )
            answer = connection.getresponse()
            data = answer.read()
        except http.client.HTTPException as error:
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()
        if answer.status >= 300:
            raise RestError(answer.status, data.decode(errors="replace"))
        try:
            return json.loads(data)
        except ValueError:
            return data.decode()

    def apply(self, path: str, obj: object) -> None:
        """Server-side apply."""
        self.request("PATCH", f"{path}?fieldManager=lab&force=true", obj, "application/apply-patch+yaml")

    def watch(self, path: str) -> Iterator[tuple[str, Any]]:
        """All objects of a collection as ("ADDED", object), then ("SYNC", None), then what changes.

        Ends when the stream ends; the caller starts again. Raises RestError, OSError.
        """
        page = self.request("GET", path)
        for item in page["items"]:
            yield "ADDED", item
        yield "SYNC", None
        query = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": page["metadata"]["resourceVersion"],
        }
        connection = self._connect(None)
        try:
            connection.request("GET", f"{path}?{urlencode(query)}")
            answer = connection.getresponse()
            if answer.status != 200:
                raise RestError(answer.status, answer.read().decode(errors="replace"))
            while line := answer.readline():
                event = json.loads(line)
                if event["type"] == "ERROR":
                    return
                if event["type"] != "BOOKMARK":
                    yield event["type"], event["object"]
        except http.client.HTTPException as error:
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()

    def _connect(self, timeout: float | None) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(*self._target, timeout=timeout, context=self._tls)
