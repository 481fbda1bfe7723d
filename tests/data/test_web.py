"""Files behind https: the guard around addresses, redirects, sizes and kinds. A local server stands for the public host."""

from __future__ import annotations

import gc
import gzip
import http.client
import http.server
import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbkit.data import web
from nbkit.data.sources import read
from nbkit.errors import DataError

ROWS = [{"instruction": f"Say {i}.", "output": "ü"} for i in range(20)]
LINES = "\n".join(map(json.dumps, ROWS)).encode()
PUBLIC = "93.184.216.34"
ADDRESSES = {
    "data.example": PUBLIC,
    "other.example": "2606:2800:220:1::1",
    "inside.example": "10.1.2.3",
    "meta.example": "169.254.169.254",
}

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


def answer(status: int = 200, body: bytes = LINES, **headers: str) -> Answer:
    def send(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Length": str(len(body)), **given}.items():
            if value:
                request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    return send


class Host:
    """A web server on this machine; `asked` are the addresses that connections were made to, `paths` what was asked for."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, int, str]] = []
        self.paths: list[str] = []
        host = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host.paths.append(self.path)
                host.answers.get(self.path, answer(404))(self)

            def log_message(self, *_: Any) -> None:
                """Nothing is printed."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def connection(self, host: str, port: int, address: str) -> http.client.HTTPConnection:
        self.asked.append((host, port, address))
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)


def lookup(host: str, port: int, **_: Any) -> list[Any]:
    if host not in ADDRESSES:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ADDRESSES[host], port))]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    made = Host()
    monkeypatch.setattr(web, "NET", web.Net(lookup=lookup, connection=made.connection))
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_file_is_fetched_from_the_checked_address_and_read_again_and_again(host: Host) -> None:
    host.answers["/deep/rows.jsonl?download=true"] = answer(Content_Type="application/octet-stream")
    url = "https://data.example/deep/rows.jsonl?download=true"
    found = read(url)
    assert found.name == url
    assert [row.value for row in found.rows] == [row.value for row in found.rows] == ROWS
    assert (host.asked, len(host.paths)) == ([("data.example", 443, PUBLIC)], 1)
    folder = Path(found.rows.keeps.name)
    rows = iter(found.rows)
    assert len(next(rows).value) == 2 and folder.is_dir()
    mark = found.fingerprint
    del found
    assert folder.is_dir()
    assert len(list(rows)) == 19
    del rows
    gc.collect()
    assert not folder.exists() and mark


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/rows", LINES, {"Content-Type": "application/x-ndjson; charset=utf-8"}),
        ("/rows", json.dumps(ROWS).encode(), {"Content-Type": "application/json"}),
        (
            "/rows",
            b"instruction,output\n" + b"".join(f"Say {i}.,\u00fc\n".encode() for i in range(20)),
            {"Content-Type": "text/csv"},
        ),
        ("/get?id=3", LINES, {"Content-Disposition": 'attachment; filename="rows.jsonl"'}),
        ("/rows.jsonl.gz", gzip.compress(LINES), {}),
        ("/caf\u00e9/rows.jsonl", LINES, {}),
    ],
)
def test_the_address_the_name_or_the_type_tells_how_it_is_read(
    host: Host, path: str, body: bytes, headers: dict[str, str]
) -> None:
    host.answers[path.replace("\u00e9", "%C3%A9")] = answer(200, body, **headers)
    assert [row.value for row in read(f"https://data.example{path}").rows] == ROWS


def test_redirects_are_followed_and_each_is_checked(host: Host) -> None:
    host.answers["/a.jsonl"] = answer(302, b"", Location="https://other.example/b")
    host.answers["/b"] = answer(307, b"", Location="/c?x=1")
    host.answers["/c?x=1"] = answer()
    assert len(read("https://data.example/a.jsonl").head) == 20
    assert [asked[::2] for asked in host.asked] == [
        ("data.example", PUBLIC),
        ("other.example", ADDRESSES["other.example"]),
        ("other.example", ADDRESSES["other.example"]),
    ]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "https://inside.example/b.jsonl",
            r"leads to inside.example \(10.1.2.3\), which is not a public host, so nothing was sent",
        ),
        ("https://127.0.0.1/b.jsonl", "127.0.0.1.*not a public host"),
        ("http://data.example/b.jsonl", "not https .redirected to 'http://data.example"),
        ("file:///etc/passwd", "not https"),
        ("/a.jsonl", "redirected more than 5 times"),
        ("", "answers 302 without a new address"),
    ],
)
def test_redirects_that_are_refused(host: Host, target: str, message: str) -> None:
    host.answers["/a.jsonl"] = answer(302, b"", Location=target)
    with pytest.raises(DataError, match=message):
        read("https://data.example/a.jsonl")
    assert {asked[0] for asked in host.asked} == {"data.example"}


@pytest.mark.parametrize(
    "url",
    [
        *(
            f"https://{name}/a.jsonl"
            for name in ("localhost", "127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "0.0.0.0", "0")
        ),
        *(f"https://{name}/a.jsonl" for name in ("169.254.169.254", "100.64.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255")),
        *(f"https://{name}/a.jsonl" for name in ("2130706433", "0x7f000001", "0177.0.0.1", "127.1", "192.0.2.1", "198.18.0.1")),
        *(f"https://[{name}]/a.jsonl" for name in ("::1", "::", "fe80::1", "fc00::1", "fd12::1", "ff02::1", "::ffff:127.0.0.1")),
        *(
            f"https://[{name}]/a.jsonl"
            for name in ("::ffff:a9fe:a9fe", "64:ff9b::7f00:1", "2002:7f00:1::", "::7f00:1", "fec0::1")
        ),
        *(f"https://{name}/a.jsonl" for name in ("inside.example", "meta.example", "user:secret@data.example", "data.example:0")),
        *("http://data.example/a.jsonl", "ftp://data.example/a.jsonl", "file:///etc/passwd", "gopher://data.example/1"),
        *(
            "https:///a.jsonl",
            "https://data.example/a b.jsonl",
            "https://data.example\\@inside.example/a.jsonl",
            "https://[::1/a.jsonl",
        ),
        *("https://data.example:99999/a.jsonl", "HTTPS://LOCALHOST/a.jsonl", "https://data.example/a\r\nX: y.jsonl"),
    ],
)
def test_no_connection_is_made_to_what_is_not_public(host: Host, url: str) -> None:
    if "localhost" in url.lower():
        web.NET = replace(web.NET, lookup=socket.getaddrinfo)
    with pytest.raises(DataError, match=r"public host|not https|no plain https|no web address|not found"):
        read(url)
    assert host.asked == host.paths == []


def test_one_private_address_among_public_ones_is_enough_to_refuse(host: Host) -> None:
    both = [(2, 1, 6, "", (address, 443)) for address in (PUBLIC, "127.0.0.1")]
    web.NET = replace(web.NET, lookup=lambda *_, **__: both)
    with pytest.raises(DataError, match="127.0.0.1.*not a public host"):
        read("https://data.example/a.jsonl")
    assert host.asked == []


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:2800:220:1::1", "2a00:1450:4001::1", "64:ff9b::808:808"])
def test_public_addresses(address: str) -> None:
    assert web.is_public(address)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (answer(404), "is not there .status 404"),
        (answer(403), "refuses access"),
        (answer(401), "asks for a login"),
        (answer(500), "is not given .status 500"),
        (answer(200, b"<html>", Content_Type="text/html; charset=utf-8"), "is a web page, not a file of rows"),
        (answer(200, b"", Content_Length="99999999999"), "has 99,999,999,999 bytes, .* are the most; download it"),
        (answer(200, LINES, Content_Length=str(len(LINES) + 5)), "broke off"),
        (answer(200, LINES, Content_Encoding="br"), "packed as 'br'"),
        (answer(200, b""), "is empty"),
    ],
)
def test_answers_that_are_no_rows(host: Host, given: Answer, message: str) -> None:
    host.answers["/a.jsonl"] = given
    with pytest.raises(DataError, match=message) as caught:
        read("https://data.example/a.jsonl")
    assert "\n" not in str(caught.value)


def test_an_unknown_kind_and_a_host_that_does_not_answer(host: Host) -> None:
    host.answers["/a"] = answer(200, b"x", Content_Type="image/png")
    with pytest.raises(DataError, match="has no known ending and is of the type image/png"):
        read("https://data.example/a")
    host.answers["/b.jsonl"] = lambda request: request.connection.close()
    with pytest.raises(DataError, match="does not answer"):
        read("https://data.example/b.jsonl")
    with pytest.raises(DataError, match="The host 'nowhere.example' .* is not found"):
        read("https://nowhere.example/b.jsonl")


def test_more_bytes_than_were_said_end_at_the_limit(host: Host) -> None:
    web.NET = replace(web.NET, size_limit=1000)
    host.answers["/a.jsonl"] = answer(200, b"x" * 500_000, Content_Length="")
    with pytest.raises(DataError, match="has more than 1,000 bytes"):
        read("https://data.example/a.jsonl")


def test_a_slow_host_is_given_up(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.answers["/a.jsonl"] = answer()
    clock = iter(range(0, 10**6, 600))
    monkeypatch.setattr(web.time, "monotonic", lambda: next(clock))
    with pytest.raises(DataError, match="comes too slowly"):
        read("https://data.example/a.jsonl")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command for a certificate")
def test_the_certificate_must_be_that_of_the_name_though_the_address_is_connected_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    ask = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=data.example"]
    more = ["-addext", "subjectAltName=DNS:data.example", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*ask, *more], check=True, capture_output=True, timeout=60)
    made = Host()
    made.answers["/a.jsonl"] = answer()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    made.server.socket = server.wrap_socket(made.server.socket, server_side=True)
    made.server.handle_error = lambda *_: None
    trusting = ssl.create_default_context(cafile=str(certificate))
    connect = socket.create_connection
    reached: list[str] = []

    def to_here(address: tuple[str, int], timeout: float | None = None) -> socket.socket:
        reached.append(address[0])
        return connect(("127.0.0.1", made.port), timeout)

    monkeypatch.setattr(web, "NET", web.Net(lookup=lookup))
    monkeypatch.setattr(web.socket, "create_connection", to_here)
    with pytest.raises(DataError, match="The certificate of https://data.example/a.jsonl is not valid"):
        read("https://data.example/a.jsonl")
    monkeypatch.setattr(web.ssl, "create_default_context", lambda: trusting)
    assert len(read("https://data.example/a.jsonl").head) == 20
    with pytest.raises(DataError, match="The certificate of https://other.example/a.jsonl is not valid"):
        read("https://other.example/a.jsonl")
    assert reached == [PUBLIC, PUBLIC, ADDRESSES["other.example"]]
    made.server.shutdown()
    made.server.server_close()
