"""What goes over the wire below the requests: HTTP in any pieces, TLS, proxies; and how the thinking is forced."""

import asyncio
import json
import random
import shutil
import socket
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from distill.endpoints import identity, open_endpoints
from distill.endpoints.failures import Failure
from distill.endpoints.http import Connection
from distill.errors import UserError
from distill.recipe_teacher import Teacher
from tests import tiny
from tests.distill.endpoints.scripted import Server, ask, replies, teacher

# HTTP.


class Wire(asyncio.Transport):
    """A transport that goes nowhere."""

    closed = False

    def write(self, data):
        pass

    def abort(self):
        self.closed = True

    def is_closing(self):
        return self.closed


class Body:
    complete = False

    def __init__(self):
        self.data = b""

    def feed(self, data):
        self.data += data


async def receive(pieces):
    connection, body = Connection(lambda: 0.0), Body()
    connection.connection_made(Wire())
    done = connection.exchange(b"", lambda head: body)
    for piece in pieces:
        connection.data_received(piece)
    if not done.done():
        connection.connection_lost(None)
    return await done, body.data, connection.reusable


def chunked(parts, end=b"0\r\n\r\n"):
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + end


def in_pieces(data, draw):
    size = draw.choice([1, 2, 3, 7, 50, 1000])
    while data:
        cut = draw.randint(1, size)
        yield data[:cut]
        data = data[cut:]


@pytest.mark.parametrize("seed", range(50))
def test_chunks_in_any_pieces(seed):
    draw = random.Random(seed)
    parts = [bytes(draw.choices(b"ab\r\n0", k=draw.choice([1, 2, 17, 300]))) for _ in range(draw.randrange(6))]
    end = draw.choice([b"0\r\n\r\n", b"0\r\nTrailer: x\r\n\r\n", b"000;x=y\r\n\r\n"])
    head, body, reusable = asyncio.run(receive(in_pieces(chunked(parts, end), draw)))
    assert (head.status, body, reusable) == (200, b"".join(parts), True)


@pytest.mark.parametrize(
    ("data", "body", "reusable"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab", b"ab", True),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab", b"ab", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nab", b"ab", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nab", b"ab", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nabHTTP/1.1 200 OK", b"ab", False),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
        (b"HTTP/1.1 200 OK\r\n\r\nto the end", b"to the end", False),
    ],
)
def test_bodies_and_what_becomes_of_the_connection(data, body, reusable):
    for pieces in ([data], [data[n : n + 1] for n in range(len(data))]):
        found = asyncio.run(receive(pieces))
        assert found[1:] == (body, reusable)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\nab", "cut"),
        (chunked([b"ab"], b"4\r\nab"), "cut"),
        (b"HTTP/1.1 20", "connection"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "bad_http"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n", "bad_http"),
        (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "bad_http"),
        (b"HTTP/2 200\r\n\r\n", "bad_http"),
        (chunked([b"ab"], b"0x1\r\na\r\n"), "bad_http"),
        (chunked([b"ab"], b"1\r\nabc\r\n"), "bad_http"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70000, "bad_http"),
    ],
)
def test_what_is_no_http_ends_the_exchange(data, kind):
    with pytest.raises(Failure) as raised:
        asyncio.run(receive([data]))
    assert raised.value.kind == kind


# TLS and proxies.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    names = "subjectAltName=DNS:localhost,DNS:teacher.test,IP:127.0.0.1"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-addext", names, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


@pytest.fixture
def secure(certificate):
    server = Server()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    server.http.socket = context.wrap_socket(server.http.socket, server_side=True, do_handshake_on_connect=False)
    with server:
        yield server


@pytest.mark.parametrize("stream", [True, False])
def test_https(secure, certificate, monkeypatch, stream):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    endpoints = [{"url": f"https://127.0.0.1:{secure.port}/v1"}]
    assert {r.finish_reason for r in replies(teacher(endpoints=endpoints, stream=stream), 20).values()} == {"stop"}


def test_a_certificate_that_nobody_vouches_for_is_not_taken(secure, capsys):
    url = f"https://127.0.0.1:{secure.port}/v1"
    with pytest.raises(ConnectionError):
        replies(teacher(endpoints=[{"url": url}], timeout=0.5))
    assert secure.asked == [] and "certificate" in capsys.readouterr().err


class Proxy:
    """Joins sockets for CONNECT; answers anything else itself. Keeps first lines and keys."""

    def __init__(self, port):
        seen = self.seen = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_CONNECT(self):
                seen.append((self.requestline, self.headers["Proxy-Authorization"]))
                with socket.create_connection(("127.0.0.1", port)) as server:
                    self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    self.wfile.flush()
                    back = threading.Thread(target=copy, args=(server, self.connection), daemon=True)
                    back.start()
                    copy(self.connection, server)
                    back.join(2)
                self.close_connection = True

            def do_POST(self):
                seen.append((self.requestline, self.headers["Proxy-Authorization"]))
                self.rfile.read(int(self.headers["Content-Length"]))
                data = json.dumps({"choices": [{"message": {"content": "proxied"}}]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://me:p%40ss@127.0.0.1:{self.http.server_address[1]}"


def copy(one, other):
    try:
        while data := one.recv(65536):
            other.sendall(data)
        other.shutdown(1)
    except OSError:
        pass


@pytest.fixture
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


def test_http_goes_through_the_proxy_that_the_environment_names(no_proxies):
    proxy = Proxy(0)
    no_proxies.setenv("http_proxy", proxy.url)
    found = replies(teacher(endpoints=[{"url": "http://teacher.test:81/v1"}], stream=False))["a0"]
    assert found.text == "proxied"
    assert proxy.seen == [("POST http://teacher.test:81/v1/chat/completions HTTP/1.1", "Basic bWU6cEBzcw==")]


def test_https_goes_through_a_tunnel(secure, certificate, no_proxies):
    proxy = Proxy(secure.port)
    no_proxies.setenv("https_proxy", proxy.url)
    no_proxies.setenv("SSL_CERT_FILE", str(certificate[0]))
    found = replies(teacher(endpoints=[{"url": "https://teacher.test/v1"}]))["a0"]
    assert found.finish_reason == "stop"
    assert proxy.seen == [("CONNECT teacher.test:443 HTTP/1.1", "Basic bWU6cEBzcw==")]
    assert secure.asked[0].headers["Proxy-Authorization"] is None


def test_loopback_needs_no_proxy(no_proxies):
    no_proxies.setenv("http_proxy", "http://127.0.0.1:9")
    with Server() as server:
        assert replies(teacher(server))["a0"].finish_reason == "stop"


def test_a_key_in_the_url_is_refused_and_not_repeated():
    with pytest.raises(UserError, match="holds a user name") as raised:
        open_endpoints(teacher(endpoints=[{"url": "http://me:secret@127.0.0.1/v1"}]))
    assert "secret" not in str(raised.value)


# Forcing the thinking, and the completions API.

PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[bot]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder whose template leaves the thinking closed."""
    found = tiny.write_teacher(tmp_path_factory.mktemp("model"))
    (found / "chat_template.jinja").write_text(PLAIN)
    return found


def sent(given, **more):
    with Server() as server:
        replies(teacher(server, **given), [ask(**more)])
    return server.asked[0]


def test_completions_get_a_prompt_rendered_here(folder):
    body = sent({"api": "completions", "model": str(folder)}, logprobs=2).body
    assert body["prompt"] == "[user]question 0[bot]<think>\n" and body["add_special_tokens"] is False
    assert body["logprobs"] == 2 and "messages" not in body
    assert sent({"api": "completions", "tokenizer": str(folder), "think": "leave"}).body["prompt"].endswith("[bot]")


FORCED = {"role": "assistant", "content": "<think>\n"}


def test_a_chat_is_forced_where_it_is_asked_for_or_the_template_shows_that_it_must_be(folder):
    for given in ({"think": "force"}, {"model": str(folder)}):
        body = sent(given).body
        assert body["messages"][1:] == [FORCED]
        assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    for given in ({}, {"model": str(folder), "think": "leave"}, {"model": "tiny-r1"}):
        body = sent(given).body
        assert len(body["messages"]) == 1 and "continue_final_message" not in body


def test_deepseek_has_words_of_its_own(monkeypatch):
    given = {"think": "force", "endpoints": [{"url": "https://api.deepseek.com/v1"}]}
    with pytest.raises(UserError, match=r"https://api\.deepseek\.com/beta"):
        open_endpoints(teacher(**given))
    given["endpoints"] = [{"url": "https://api.deepseek.com/beta"}]
    backend = open_endpoints(teacher(**given))
    body = json.loads(backend._endpoints[0].bodies.write(ask(), 5))
    assert body["messages"][1] == FORCED | {"prefix": True} and "continue_final_message" not in body


def test_logprobs_and_fields_of_the_recipe_are_passed_on():
    body = sent({"body": {"top_k": 20, "min_p": 0.1}}, logprobs=4).body
    assert (body["top_k"], body["min_p"], body["logprobs"], body["top_logprobs"]) == (20, 0.1, True, 4)
    assert body["stream_options"] == {"include_usage": True}


def test_the_identity_is_the_models_not_the_servers(folder):
    def of(**more):
        fields = {"kind": "endpoint", "model": "deepseek-ai/DeepSeek-R1", "endpoints": [{"url": "http://a/v1"}]} | more
        return identity(Teacher.model_validate(fields))

    same = [of(), of(endpoints=[{"url": "http://b/v1", "key": "K", "prompt_price": 1}]), of(timeout=5, attempts=1)]
    assert all(found == same[0] for found in same)
    assert same[0]["id"].startswith("deepseek-ai/DeepSeek-R1@") and len(same[0]["id"].split("@")[1]) == 12
    others = [of(revision="2"), of(api="completions"), of(think="force"), of(body={"top_k": 1}), of(model="other")]
    assert len({found["id"] for found in [same[0], *others]}) == 6
    # A folder's place is no part of it.
    assert of(model=str(folder))["id"].startswith(f"{folder.name}@")
