"""A file behind an https address of a public host, fetched once into a temporary folder.

The host's name is resolved first; if any of its addresses is not public (private, loopback, link-local, reserved …), nothing is
sent. The connection then goes to the address that was checked and to no other, so that a name that resolves differently
the second time gains nothing. Each redirect is checked in the same way. Proxies of the environment are not used.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from nbkit.data.archives import PACKED
from nbkit.data.progress import FETCHING, bar
from nbkit.errors import DataError

SIZE_LIMIT = 2**32  # bytes
REDIRECTS = 5
SECONDS = 20.0  # without any answer
SLOWEST = 2**10  # bytes a second, on the average, after the first minute
CHUNK = 2**17
SUFFIX_OF = {  # content type → how the file is read, where its name does not say
    "application/json": ".json",
    "application/jsonl": ".jsonl",
    "application/x-jsonlines": ".jsonl",
    "application/jsonlines": ".jsonl",
    "application/x-ndjson": ".jsonl",
    "application/ndjson": ".jsonl",
    "text/csv": ".csv",
    "text/tab-separated-values": ".tsv",
    "text/plain": ".txt",
    "text/markdown": ".md",
    "application/vnd.apache.parquet": ".parquet",
    "application/x-parquet": ".parquet",
    "application/zip": ".zip",
}


class _Pinned(http.client.HTTPSConnection):
    """Talks to the checked address; the certificate must still be that of the host's name."""

    def __init__(self, host: str, port: int, address: str) -> None:
        self._tls = ssl.create_default_context()
        super().__init__(host, port, timeout=SECONDS, context=self._tls)
        self._address = address

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self.port), self.timeout)
        self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)


@dataclass(frozen=True)
class Net:
    """How names are resolved and connections are made."""

    lookup: Callable[..., Any] = socket.getaddrinfo
    connection: Callable[[str, int, str], http.client.HTTPConnection] = _Pinned
    size_limit: int = SIZE_LIMIT


NET = Net()


def is_public(address: str) -> bool:
    """Whether an IP address, and any IPv4 address that is wrapped in it, is one of the open internet."""
    ip = ipaddress.ip_address(address.split("%", 1)[0])
    inner: list[Any] = [ip]
    if isinstance(ip, ipaddress.IPv6Address):
        inner += [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in ipaddress.ip_network("64:ff9b::/96") or ip in ipaddress.ip_network("::/96"):
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if ip in ipaddress.ip_network("fec0::/10"):
            return False
    return all(one.is_global and not one.is_multicast and not one.is_reserved for one in inner[1:] if one is not None) and (
        ip.is_global and not ip.is_multicast
    )


def fetch(url: str, suffixes: tuple[str, ...]) -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    """(the file, the folder it lies in, which is removed with the object).

    Args:
        suffixes: the kinds of files that can be read; the address, the file's name or the content type tells which one it is.
    Raises: DataError for an address that is not https or not public, for a page instead of a file, for one that is too large.
    """
    shown, hops = url[:200], [url]
    while True:
        parts = _checked_url(hops[-1], shown)
        connection, address = _connection(parts, shown)
        try:
            response = _request(connection, parts, shown)
            if response.status in (301, 302, 303, 307, 308):
                hops.append(_redirect(response, hops, shown))
                continue
            _accepted(response, shown)
            folder = tempfile.TemporaryDirectory(prefix="nbkit-", ignore_cleanup_errors=True)
            path = Path(folder.name) / _file_name(hops, response, suffixes, shown)
            _download(response, path, shown)
            return path, folder
        except (OSError, http.client.HTTPException) as error:
            raise DataError(f"{shown} broke off ({_reason(error)}, {address}); try again, or download it yourself.") from error
        finally:
            connection.close()


def _checked_url(url: str, shown: str) -> SplitResult:
    where = "" if url[:200] == shown else f" (redirected to {url[:200]!r})"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise DataError(f"{shown!r} is no web address{where}: {error}; check it.") from error
    if parts.scheme.lower() != "https":
        raise DataError(
            f"{shown!r} is not https{where}; only https addresses of public hosts are read: use https or download it."
        )
    if not parts.hostname or port == 0 or "@" in parts.netloc or re.search(r"[\x00-\x20\x7f\\]", url):
        raise DataError(f"{shown!r} is no plain https address{where}; give https://host/path without a name, password or blanks.")
    return parts


def _connection(parts: SplitResult, shown: str) -> tuple[http.client.HTTPConnection, str]:
    """A connection to a checked address of the host, not yet opened; and that address."""
    host, port = str(parts.hostname), parts.port or 443
    try:
        found = NET.lookup(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, ValueError) as error:
        raise DataError(
            f"The host {host[:100]!r} of {shown} is not found ({_reason(error)}); check the address and the network."
        ) from error
    addresses = [str(entry[4][0]) for entry in found]
    private = next((address for address in addresses if not is_public(address)), None)
    if private is not None or not addresses:
        raise DataError(
            f"{shown} leads to {host[:100]} ({private or 'no address'}), which is not a public host, so nothing was sent; only "
            "https addresses of public hosts are read: copy the file here and give its path."
        )
    return NET.connection(host, port, addresses[0]), addresses[0]


def _request(connection: http.client.HTTPConnection, parts: SplitResult, shown: str) -> http.client.HTTPResponse:
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not target.isascii():
        from urllib.parse import quote

        target = quote(target, safe="/?&=%:;,+~!*'()@$-._")
    try:
        connection.request("GET", target, headers={"User-Agent": "nbkit", "Accept": "*/*", "Accept-Encoding": "identity"})
        return connection.getresponse()
    except ssl.SSLCertVerificationError as error:
        raise DataError(
            f"The certificate of {shown} is not valid ({error.verify_message}); download it yourself if you trust it."
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{shown} does not answer ({_reason(error)}); check the address and the network.") from error


def _redirect(response: http.client.HTTPResponse, hops: list[str], shown: str) -> str:
    target = response.headers.get("Location")
    if not target or len(hops) > REDIRECTS:
        why = f"is redirected more than {REDIRECTS} times" if target else f"answers {response.status} without a new address"
        raise DataError(f"{shown} {why}; give the address of the file itself.")
    return urljoin(hops[-1], target)


def _accepted(response: http.client.HTTPResponse, shown: str) -> None:
    if response.status != 200:
        why = {
            401: "asks for a login",
            403: "refuses access",
            404: "is not there",
            410: "is no longer there",
            429: "is asked too often",
        }
        said = why.get(response.status, "is not given")
        raise DataError(f"{shown} {said} (status {response.status}); check the address, or download the file and give its path.")
    if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise DataError(f"{shown} is a web page, not a file of rows; give the address of the raw file (often behind 'Download').")
    size = response.headers.get("Content-Length", "")
    if size.isdigit() and int(size) > NET.size_limit:
        raise DataError(f"{shown} has {int(size):,} bytes, {NET.size_limit:,} are the most; download it and give its path.")
    coding = response.headers.get("Content-Encoding", "identity").lower()
    if coding not in ("identity", "gzip", ""):
        raise DataError(f"{shown} comes packed as {coding[:20]!r}, which was not asked for; download it and give its path.")


def _file_name(hops: list[str], response: http.client.HTTPResponse, suffixes: tuple[str, ...], shown: str) -> str:
    """`rows` with the suffix that the addresses, the name in the answer or the content type have."""
    names = [unquote(urlsplit(url).path) for url in hops]
    names.append(response.headers.get_filename() or "")
    for name in names:
        if suffix := _known(name, suffixes):
            return "rows" + suffix
    kind = response.headers.get_content_type()
    if kind not in SUFFIX_OF:
        raise DataError(f"{shown} has no known ending and is of the type {kind}; give one of {', '.join(suffixes)}.")
    return "rows" + SUFFIX_OF[kind]


def _known(name: str, suffixes: tuple[str, ...]) -> str | None:
    path = Path(name.lower())
    if path.suffix in PACKED:
        inner = Path(path.stem).suffix
        return inner + path.suffix if inner in suffixes else ".zip" if path.suffix == ".zip" else None
    return path.suffix if path.suffix in suffixes else None


def _download(response: http.client.HTTPResponse, path: Path, shown: str) -> None:
    if response.headers.get("Content-Encoding", "").lower() == "gzip":
        raise DataError(f"{shown} comes packed though it was asked for plain; download it and give its path.")
    expected = response.headers.get("Content-Length", "")
    total = int(expected) if expected.isdigit() else None
    began, size = time.monotonic(), 0
    with open(path, "wb") as file, bar(total, FETCHING) as fetched:
        while data := response.read1(CHUNK):
            size += len(data)
            if size > NET.size_limit:
                raise DataError(
                    f"{shown} has more than {NET.size_limit:,} bytes, which are the most; download it and give its path."
                )
            file.write(data)
            fetched.update(len(data))
            seconds = time.monotonic() - began
            if seconds > 60 and size < SLOWEST * seconds:
                raise DataError(f"{shown} comes too slowly ({size:,} bytes in {seconds:.0f} s); download it and give its path.")
    if total is not None and size != total:
        raise DataError(f"{shown} broke off after {size:,} of {total:,} bytes; try again.")


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)[:120]
