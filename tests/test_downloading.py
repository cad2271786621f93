"""Downloads from a server on this machine that can break off, ignore ranges or send a page."""

import errno
import hashlib
import socket
import ssl
import sys
import threading
from dataclasses import replace
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from filelock import FileLock
from published_files import write_published

from fsefs_nnunet.backbones.published.downloading import download
from fsefs_nnunet.backbones.zoo import ZOO
from fsefs_nnunet.cli.main import main

CONTENT = bytes(range(256)) * 4000  # about 1 MB
CUT = 300_000


class Server(ThreadingHTTPServer):
    """What it does is in `mode`; the Range headers that came are in `ranges`."""

    mode = "plain"
    content = CONTENT

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[str | None] = []

    @property
    def link(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file.pth"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        asked = self.headers["Range"]
        self.server.ranges.append(asked)
        content = self.server.content
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if self.server.mode == "no ranges":
            asked, start = None, 0
        if self.server.mode == "missing":
            return self.send_error(404)
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : CUT if self.server.mode == "breaks off" else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def entry(server: Server, **changes):
    known = {"size": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}
    return replace(ZOO["suprem_unet"], link=server.link, file="file.pth", **{**known, **changes})


def test_whole_file(server, tmp_path):
    file = download(entry(server), tmp_path / "new")
    assert file == tmp_path / "new" / "file.pth" and file.read_bytes() == CONTENT
    assert [f.name for f in file.parent.iterdir()] == ["file.pth"]


def test_resumes_where_it_broke_off(server, tmp_path):
    server.mode = "breaks off"
    with pytest.raises(
        ValueError, match=rf"ended after {CUT} of {len(CONTENT)} bytes: run .* download suprem_unet again"
    ):
        download(entry(server), tmp_path)
    assert (tmp_path / "file.pth.part").read_bytes() == CONTENT[:CUT]
    server.mode = "plain"
    assert download(entry(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={CUT}-"]


@pytest.mark.parametrize("known", [{}, {"size": 0, "sha256": ""}])
def test_server_that_ignores_ranges(server, tmp_path, known):
    server.mode = "no ranges"
    (tmp_path / "file.pth.part").write_bytes(b"x" * 1000)
    assert download(entry(server, **known), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("size", [0, len(CONTENT)])
def test_a_part_that_is_whole_already(server, tmp_path, size):
    (tmp_path / "file.pth.part").write_bytes(CONTENT)
    assert download(entry(server, size=size), tmp_path).read_bytes() == CONTENT
    assert server.ranges == ([] if size else [f"bytes={len(CONTENT)}-"])


def test_a_part_of_a_longer_file_starts_again(server, tmp_path):
    (tmp_path / "file.pth.part").write_bytes(CONTENT + b"more")
    assert download(entry(server), tmp_path).read_bytes() == CONTENT


def test_another_file_than_the_known_one(server, tmp_path):
    with pytest.raises(ValueError, match=r"returned a file other than the known one .*download it again, or ask"):
        download(entry(server, sha256="0" * 64), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_page_instead_of_a_file(server, tmp_path):
    server.content = b"<!DOCTYPE html><html>Too many downloads</html>"
    with pytest.raises(ValueError, match=r"file\.pth was not opened: it is a web page"):
        download(entry(server, size=0, sha256=""), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_link_that_is_gone(server, tmp_path):
    server.mode = "missing"
    with pytest.raises(
        ValueError, match=r"was refused \(404 Not Found\)\. Get file\.pth from http.* import suprem_unet"
    ):
        download(entry(server), tmp_path)


def test_offline(server, tmp_path):
    """Nobody listens at the port: refused at once, with the link and what to do."""
    gone = entry(server)
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError) as error:
        download(gone, tmp_path)
    assert f"No connection to {gone.link} (" in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("save it anywhere, and run: fseft backbones import suprem_unet FILE")


def test_no_name_service(tmp_path, monkeypatch):
    def unknown(*args, **kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ValueError, match=r"^No connection to http.*Temporary failure in name resolution.*Get "):
        download(ZOO["suprem_unet"], tmp_path)


@pytest.mark.parametrize("error", [ssl.SSLError("record layer failure"), OSError(errno.ENETUNREACH, "unreachable")])
def test_a_network_that_goes_away_is_no_full_disk(server, tmp_path, monkeypatch, error):
    def read(answer, size):
        raise error

    monkeypatch.setattr(HTTPResponse, "read", read)
    with pytest.raises(ValueError, match=r"^No connection to http.*Try again"):
        download(entry(server), tmp_path)


def narrow(server: Server, tmp_path, monkeypatch) -> bytes:
    """suprem_unet with few channels and no known SHA-256 in the zoo; returns the content of its file."""
    write_published(tmp_path / "made.pth", "suprem_unet", width=8)
    monkeypatch.setitem(ZOO, "suprem_unet", entry(server, size=0, sha256="", features=8))
    monkeypatch.setenv("fseft_backbones", str(tmp_path / "store"))
    return (tmp_path / "made.pth").read_bytes()


@pytest.mark.parametrize("bad", [lambda good: b'{"error": "busy"}', lambda good: good[: len(good) // 2]])
def test_a_bad_download_is_not_kept(server, tmp_path, monkeypatch, capsys, bad):
    """Of a file whose size and SHA-256 nobody knows; the second download fetches it again."""
    good, store = narrow(server, tmp_path, monkeypatch), tmp_path / "store"
    server.content = bad(good)
    assert main(["backbones", "download", "suprem_unet"]) == 2
    assert " It was deleted: run fseft backbones download suprem_unet again, or: Get " in capsys.readouterr().err
    assert {file.suffix for file in store.iterdir()} == {".lock"}
    server.content = good
    assert main(["backbones", "download", "suprem_unet"]) == 0
    assert len(server.ranges) == 2 and (store / "suprem_unet.safetensors").exists()


def test_two_downloads_at_once(server, tmp_path, monkeypatch, capsys):
    server.content = narrow(server, tmp_path, monkeypatch)
    store = tmp_path / "store"
    store.mkdir()
    with FileLock(store / "suprem_unet.download.lock"):
        assert main(["backbones", "download", "suprem_unet"]) == 2
    assert f"Another process is downloading 'suprem_unet' into {store}: wait until" in capsys.readouterr().err
    assert not server.ranges
    assert main(["backbones", "download", "suprem_unet"]) == 0
    assert main(["backbones", "remove", "suprem_unet"]) == 0
    assert not list(store.iterdir())


def test_a_download_that_could_not_be_imported_does_not_start(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "monai.networks.nets.swin_unetr", None)
    monkeypatch.setitem(ZOO, "btcv", replace(ZOO["btcv"], link=server.link))
    assert main(["backbones", "download", "btcv", "-o", str(tmp_path)]) == 2
    assert "needs MONAI" in capsys.readouterr().err and not server.ranges


def test_command_downloads_and_imports(server, tmp_path, monkeypatch, capsys):
    write_published(tmp_path / "made.pth", "suprem_unet")
    server.content = (tmp_path / "made.pth").read_bytes()
    monkeypatch.setitem(ZOO, "suprem_unet", entry(server, size=len(server.content), sha256=""))
    store = tmp_path / "store"
    monkeypatch.setenv("fseft_backbones", str(store))
    assert main(["backbones", "download", "suprem_unet"]) == 0
    assert "All 62 tensors of the backbone matched" in capsys.readouterr().out
    assert sorted(f.name for f in store.iterdir() if f.suffix != ".lock") == [
        "suprem_unet.json",
        "suprem_unet.safetensors",
    ]


@pytest.mark.parametrize(
    "backbone_id, said", [("fseft", "no direct link to 'fseft'. Get fseft.pth from"), ("x", "'x' is no")]
)
def test_what_cannot_be_downloaded(capsys, backbone_id, said):
    assert main(["backbones", "download", backbone_id]) == 2
    assert said in capsys.readouterr().err
