"""A session of HTTP requests to model servers, which looks at every address before it connects.

This module alone needs requests: a run that asks no server does not import it.
"""

from __future__ import annotations

import os
import socket
from typing import Any, Final

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection

from curation.serving.connection import CA_VARIABLES, CONNECT_TIMEOUT_S, JSON_HEADERS, EndpointError, is_no_server


class _Checked(HTTPConnection):
    """A connection that looks at the address it leads to, whatever name or spelling led there."""

    registered = False

    def _new_conn(self) -> socket.socket:
        try:
            found = socket.getaddrinfo(self._dns_host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            found = []  # the connection says what is wrong with the name
        for *_, place in found:
            self._check(str(place[0]))
        made = super()._new_conn()
        try:
            self._check(str(made.getpeername()[0]))  # a name may have another address now
        except BaseException:
            made.close()
            raise
        return made

    def _check(self, address: str) -> None:
        if why := is_no_server(address, registered=self.registered):
            raise EndpointError(f"{why}, not a model server: no request is sent to it", refused=True)


class _CheckedTls(_Checked, HTTPSConnection):
    pass


class _CheckedRegistered(_Checked):
    registered = True


class _CheckedRegisteredTls(_CheckedTls):
    registered = True


def _pool_classes(registered: bool) -> dict[str, type[urllib3.HTTPConnectionPool]]:
    class Plain(urllib3.HTTPConnectionPool):
        ConnectionCls = _CheckedRegistered if registered else _Checked

    class Tls(urllib3.HTTPSConnectionPool):
        ConnectionCls = _CheckedRegisteredTls if registered else _CheckedTls

    return {"http": Plain, "https": Tls}


_POOLS: Final = {registered: _pool_classes(registered) for registered in (False, True)}


class _Adapter(HTTPAdapter):
    def __init__(self, registered: bool) -> None:
        self._registered = registered
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS[self._registered]


class Session(requests.Session):
    """A requests session for one thread, without proxies or passwords from the environment.

    Preparing a request costs more time than sending it, and all requests to a URL differ only in their body: each is
    prepared once.

    Args:
        key: Sent as ``Authorization: Bearer``, but to URLs that hold a user and a password of their own.
        registered: The servers come from files that others may write; see ``is_no_server``.
    """

    def __init__(self, key: str = "", *, registered: bool = False) -> None:
        super().__init__()
        self.trust_env = False  # no proxies, no .netrc
        self.key = key
        self.mount("http://", _Adapter(registered))
        self.mount("https://", _Adapter(registered))
        self.certificates: str | bool = next(filter(None, map(os.environ.get, CA_VARIABLES)), None) or True
        self._prepared: dict[tuple[str, str], requests.PreparedRequest] = {}

    def prepared(self, method: str, url: str, body: bytes | None) -> requests.PreparedRequest:
        """A request that is valid until the next one to the same URL.  Raises requests' errors for a malformed URL."""
        request = self._prepared.get((method, url))
        if request is None:
            headers = {**JSON_HEADERS, "Authorization": f"Bearer {self.key}"} if self.key else JSON_HEADERS
            request = self.prepare_request(requests.Request(method, url, headers=headers))
            self._prepared[method, url] = request
        if body is not None:
            request.body = body
            request.headers["Content-Length"] = str(len(body))
        return request

    def exchange(self, request: requests.PreparedRequest, timeout_s: float) -> requests.Response:
        """Send it, and return the answer as soon as its headers are here.  No redirect is followed.  Raises requests'
        errors, OSError and EndpointError."""
        timeouts = (min(CONNECT_TIMEOUT_S, timeout_s), timeout_s)
        adapter = self.get_adapter(str(request.url))
        return adapter.send(request, stream=True, timeout=timeouts, verify=self.certificates, proxies={})
