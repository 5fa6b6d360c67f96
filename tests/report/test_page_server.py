"""The page on the loopback: who is answered, with what, and that no path leads out of the run's folder."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from repo_fast.config import default_options
from repo_fast.errors import InputError
from repo_fast.report.page_server import PageServer
from repo_fast.report.run_page import RunPage
from tests.report.made_run import make_run, metrics_of
from tests.report.test_page import Page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("watched") / "run", 3)
    (folder / "plots").mkdir()
    (folder / "plots" / "a b.png").write_bytes(b"picture")
    (folder / "policy").mkdir()
    (folder / "policy" / "model.safetensors").write_text("weights")
    (folder.parent / "secret.jsonl").write_text("secret")
    (folder / "samples.jsonl").symlink_to(folder.parent / "secret.jsonl")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[PageServer]:
    with PageServer(RunPage(folder, default_options), folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(
    server: PageServer, path: str, method: str = "GET", host: str | None = None
) -> tuple[int, bytes, http.client.HTTPMessage]:
    """A request as it is written, with no path made shorter."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{server.server_port}")
    connection.endheaders()
    response = connection.getresponse()
    return response.status, response.read(), response.headers


def test_it_listens_on_the_loopback_alone(server: PageServer) -> None:
    assert server.socket.getsockname() == ("127.0.0.1", server.server_port)
    assert server.url == f"http://127.0.0.1:{server.server_port}/"
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if line.split()[3] == "0A"]
    assert [own for own in listening if own.endswith(f":{server.server_port:04X}")] == [
        f"0100007F:{server.server_port:04X}"
    ]


def test_the_page_asks_whether_there_is_another_one(server: PageServer, folder: Path) -> None:
    status, body, headers = ask(server, "/")
    page = Page(body.decode())
    assert status == 200 and "Mean reward" in page.text and headers["Cache-Control"] == "no-store"
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "connect-src 'self'" in policy
    version = next(a["data-version"] for tag, a in page.tags if tag == "html")
    assert headers["ETag"] == version
    status, body, headers = ask(server, "/", "HEAD")
    assert (status, body, headers["ETag"]) == (200, b"", version)
    assert not (folder / "report.html").exists()


def test_the_page_is_made_anew_when_the_run_goes_on(server: PageServer, folder: Path) -> None:
    before = ask(server, "/report.html")[2]["ETag"]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics_of(4)[-1]) + "\n")
    assert ask(server, "/", "HEAD")[2]["ETag"] != before
    assert b"step 4 of 40" in ask(server, "/report.html")[1]


def test_what_the_page_links_to_is_given(server: PageServer, folder: Path) -> None:
    status, body, headers = ask(server, "/metrics.jsonl")
    assert (status, body) == (200, (folder / "metrics.jsonl").read_bytes())
    assert headers["Content-Type"] == "text/plain; charset=utf-8" and headers["X-Content-Type-Options"] == "nosniff"
    status, body, headers = ask(server, "/plots/a%20b.png")
    assert (status, body, headers["Content-Type"]) == (200, b"picture", "image/png")


@pytest.mark.parametrize(
    "path",
    [
        *("/../secret.jsonl", "/plots/../../secret.jsonl", "/..%2fsecret.jsonl", "/%2e%2e/secret.jsonl"),
        *("//secret.jsonl", "/samples.jsonl", "/policy/model.safetensors", "/policy/", "/plots", "/nothing"),
        *("/metrics.jsonl/../config.yaml", "/etc/passwd"),
    ],
)
def test_nothing_else_is_given(server: PageServer, path: str) -> None:
    status, body, _ = ask(server, path)
    assert status == 404 and b"secret\n" not in body and b"weights" not in body


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{}", "127.0.0.1", "localhost:1", "127.0.0.1:{}.evil.example"]
)
def test_who_calls_it_by_another_name_is_refused(server: PageServer, host: str) -> None:
    status, body, _ = ask(server, "/", host=host.format(server.server_port))
    assert status == 403 and b"Mean reward" not in body
    assert ask(server, "/", host=f"localhost:{server.server_port}")[0] == 200


def test_without_a_name_too(server: PageServer) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port), 60) as visitor:
        visitor.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b" 403 " in visitor.recv(4096).splitlines()[0]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE"])
def test_nothing_but_reading(server: PageServer, method: str) -> None:
    assert ask(server, "/", method)[0] == 501


def test_a_visitor_that_goes_and_a_page_that_fails_end_nothing(
    server: PageServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port)) as visitor:
        visitor.sendall(b"GET / HT")

    def fails(version: str) -> None:
        raise RuntimeError("no page")

    with monkeypatch.context() as patch:
        patch.setattr(server._page, "parts", fails)
        patch.setattr(server, "_made", ("", b""))
        with pytest.raises(http.client.RemoteDisconnected):
            ask(server, "/")
    assert ask(server, "/")[0] == 200
    said = capsys.readouterr().err
    assert said == "the page could not be made: RuntimeError: no page\n"


def test_a_port_that_is_taken(server: PageServer, folder: Path) -> None:
    with pytest.raises(InputError, match=rf"--port {server.server_port} cannot be had \(Address already in use\)"):
        PageServer(RunPage(folder, default_options), folder, server.server_port)
