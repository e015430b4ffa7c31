"""From a base URL to open connections: addresses, TLS, and the proxies that the environment names."""

import asyncio
import base64
import contextlib
import errno
import os
import resource
import socket
import ssl
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import ip_address
from urllib.parse import SplitResult, unquote, urlsplit

from distill.endpoints.failures import Failure
from distill.endpoints.http import Connection
from distill.errors import UserError

_CONNECT_SECONDS = 30.0
# This machine has no more files or ports: no fault of the server's.
_OURS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.EADDRNOTAVAIL}


@dataclass(frozen=True)
class Address:
    """Where a base URL leads. Raises UserError for one that cannot be used; `place` is the recipe's field."""

    url: str
    place: str
    parts: SplitResult = field(init=False)
    proxy: SplitResult | None = field(init=False, repr=False)  # may hold a password

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            known = bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            known = False
        if not known:
            raise UserError(f"{self.place}: '{self.url}' is no URL of a server")
        if parts.username is not None:
            raise UserError(f"{self.place}: the URL holds a user name; keys come from the environment (`key`)")
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "proxy", _proxy(parts, self.place))

    @property
    def host(self) -> str:
        return self.parts.hostname or ""

    @property
    def port(self) -> int:
        return self.parts.port or (443 if self.secure else 80)

    @property
    def secure(self) -> bool:
        return self.parts.scheme == "https"

    def target(self, path: str) -> str:
        """The request's target: absolute for a proxy that is asked to fetch it (RFC 9112, 3.2.2)."""
        local = self.parts.path.rstrip("/") + path
        return f"http://{self.parts.netloc}{local}" if self.proxy and not self.secure else local

    def headers(self) -> dict[str, str]:
        given = {"Host": self.parts.netloc}
        if self.proxy and not self.secure:
            given |= _proxy_key(self.proxy)
        return given

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        context.set_alpn_protocols(["http/1.1"])
        return context

    async def open(self, clock: Callable[[], float]) -> Connection:
        """A new connection. Raises Failure "connect", of which the server has seen no request."""
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                return await self._open(clock)
        except TimeoutError:
            raise Failure("connect", f"no connection within {_CONNECT_SECONDS:.0f} s", sent=False) from None
        except OSError as error:  # ssl.SSLError is one
            reason = getattr(error, "verify_message", "") or error.strerror or str(error) or type(error).__name__
            if isinstance(error, ConnectionError) and error.errno:
                reason = os.strerror(error.errno).lower()  # asyncio's own words do not say why
            if error.errno in _OURS:
                raise Failure("local", reason, sent=False, overload=True) from None
            raise Failure("connect", reason, sent=False) from None

    async def _open(self, clock: Callable[[], float]) -> Connection:
        loop = asyncio.get_running_loop()
        tls = self._tls if self.secure else None
        name = self.host if self.secure else None

        def connection() -> Connection:
            return Connection(clock)

        if self.proxy is None:
            return (await loop.create_connection(connection, self.host, self.port, ssl=tls, server_hostname=name))[1]
        proxy_port = self.proxy.port or 80
        if not self.secure:
            return (await loop.create_connection(connection, self.proxy.hostname or "", proxy_port))[1]
        tunnel = await self._tunnel(self.proxy.hostname or "", proxy_port)
        try:
            return (await loop.create_connection(connection, sock=tunnel, ssl=tls, server_hostname=name))[1]
        except BaseException:
            tunnel.close()
            raise

    async def _tunnel(self, host: str, port: int) -> socket.socket:
        """A socket that the proxy has joined to the server (CONNECT)."""
        assert self.proxy is not None
        loop = asyncio.get_running_loop()
        kind, *_, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
        tunnel = socket.socket(kind, socket.SOCK_STREAM)
        try:
            tunnel.setblocking(False)
            await loop.sock_connect(tunnel, address)
            server = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
            lines = [f"CONNECT {server} HTTP/1.1", f"Host: {server}"]
            lines += [f"{name}: {value}" for name, value in _proxy_key(self.proxy).items()]
            await loop.sock_sendall(tunnel, ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
            answer = b""
            # Byte by byte at the end, so that none of what follows the answer is taken.
            while not answer.endswith(b"\r\n\r\n"):
                got = await loop.sock_recv(tunnel, 1)
                if not got or len(answer) > 1 << 14:
                    raise OSError(f"the proxy {host}:{port} closed the connection")
                answer += got
            if answer.split(b" ", 2)[1:2] != [b"200"]:
                said = answer.split(b"\r\n", 1)[0].decode("latin-1")[:100]
                raise OSError(f"the proxy {host}:{port} does not connect to the server: {said}")
            return tunnel
        except BaseException:
            tunnel.close()
            raise


def _proxy(parts: SplitResult, place: str) -> SplitResult | None:
    """The proxy for a URL by http_proxy, https_proxy, all_proxy and no_proxy. None for this machine, whatever they say:
    a server on loopback cannot be reached through another host."""
    host = parts.hostname or ""
    with contextlib.suppress(ValueError):
        if ip_address(host).is_loopback:
            return None
    proxies = urllib.request.getproxies()
    found = proxies.get(parts.scheme) or proxies.get("all")
    if not found or host == "localhost" or urllib.request.proxy_bypass(host):
        return None
    proxy = urlsplit(found if "://" in found else f"http://{found}")
    if proxy.scheme != "http" or not proxy.hostname:
        raise UserError(
            f"{place}: the environment names a {proxy.scheme} proxy for {host}; only http:// proxies are known here "
            "(no_proxy takes the host out)"
        )
    return proxy


def _proxy_key(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


def allow_connections(connections: int) -> None:
    """Raise the number of open files that this process may have, as far as it is allowed to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        ceiling = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (ceiling, hard))
