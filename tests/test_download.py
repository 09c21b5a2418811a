"""Fetching the data: from a real server on this machine, one that behaves and many that do not."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import socket
import struct
import sys
import tarfile
import threading
import types
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import download_data
import numpy as np
import pytest
from conftest import write_split
from test_commands import refused
from test_commands import run as run_script

from vocab import build_from_data, vocab_file

SIZES = {"train": 30, "dev": 10, "test": 10}
TRAIN = "/mine/train_ims.npy"


class Site:
    """A web server of files {path: bytes}. `how[path]` is a list, one entry for each request of
    that path, the last one for all later ones too; an entry is a dict of

    status      answer with it, and no file
    drop        close the connection after so many bytes of the body
    reset       … with a reset instead of an end
    claim       add this to Content-Length
    more        send so many bytes beyond what the headers say
    ranges      False: ignore Range
    if_range    False: ignore If-Range
    length      False: no Content-Length; the end of the connection ends the body
    chunked     True: chunked, no Content-Length
    headers     further headers
    body        other bytes than the file's
    first       the first byte that a Range is answered with, whatever was asked
    """

    def __init__(self, files):
        self.files, self.how, self.log = dict(files), {}, []
        self.etag = lambda path, body: f'"{hashlib.md5(body).hexdigest()}"'
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                site.answer(self)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def requests(self, path):
        """The Range headers of all requests of a path."""
        return [requested for asked, requested, _ in self.log if asked == path]

    def answer(self, request):
        path = request.path.partition("?")[0]
        self.log.append((path, request.headers["Range"], request.headers["If-Range"]))
        hows = self.how.get(path, [{}])
        how = hows[min(len(self.requests(path)), len(hows)) - 1]
        body = how.get("body", self.files.get(path))
        status = how.get("status", 404 if body is None else 200)
        if status != 200:
            return self.refuse(request, status, how)
        etag = self.etag(path, body)
        start, asked = 0, re.fullmatch(r"bytes=(\d+)-", request.headers["Range"] or "")
        condition = request.headers["If-Range"]
        fits = condition in (None, etag) or not how.get("if_range", True)
        if asked and how.get("ranges", True) and fits:
            start = how.get("first", int(asked[1]))
            if start >= len(body):
                length = {"Content-Range": f"bytes */{len(body)}"}
                return self.refuse(request, 416, {"headers": length})
        part = body[start:]
        request.send_response(206 if start or (asked and "first" in how) else 200)
        if start or "first" in how:
            span = f"bytes {start}-{len(body) - 1}/{len(body)}"
            request.send_header("Content-Range", span)
        if etag:
            request.send_header("ETag", etag)
        part += bytes(how.get("more", 0))
        if how.get("chunked"):
            request.send_header("Transfer-Encoding", "chunked")
            part = b"".join(
                b"%x\r\n%s\r\n" % (len(part[at : at + 5000]), part[at : at + 5000])
                for at in range(0, len(part), 5000)
            ) + b"0\r\n\r\n"  # fmt: skip
        elif how.get("length", True):
            request.send_header("Content-Length", str(len(part) + how.get("claim", 0)))
        for name, value in how.get("headers", {}).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(part[: how.get("drop")])
        request.wfile.flush()
        if how.get("reset"):
            now = struct.pack("ii", 1, 0)
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
        request.close_connection = True

    def refuse(self, request, status, how):
        request.send_response(status)
        for name, value in how.get("headers", {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", "0")
        request.end_headers()


@contextmanager
def serving(files):
    site = Site(files)
    thread = threading.Thread(target=site.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.server.shutdown()
        site.server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The files of a data set `mine` as a server has them: {path: bytes}."""
    folder = tmp_path_factory.mktemp("source")
    for split, n_images in SIZES.items():
        write_split(folder / "mine", split, n_images, num_regions=36, img_dim=32)
    build_from_data(folder, "mine").save(vocab_file(folder / "vocab", "mine"))
    return {
        "/" + file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.fixture
def site(source, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(source) as site:
        yield site


@pytest.fixture
def waits(monkeypatch):
    """The seconds that would have been waited."""
    waits = []
    monkeypatch.setattr(download_data.time, "sleep", waits.append)
    return waits


@pytest.fixture
def download(tmp_path, monkeypatch, capsys, waits):
    """Run the command in this process, in an empty folder: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["download_data.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            download_data.main()
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    def mine(*arguments):
        return command("--data_name", "mine", *arguments)

    command.mine = mine
    return command


def target(path):
    """Where a path of the server belongs, below the current folder."""
    return Path(path[1:]) if path.startswith("/vocab/") else Path("data" + path)


def all_there(source):
    for path, content in source.items():
        assert target(path).read_bytes() == content, path
    kept = {str(target(path)) for path in source}
    there = {str(file) for top in ("data", "vocab") for file in Path(top).rglob("*")}
    assert there - {"data/mine"} == kept  # no .part, no .tmp, nothing else


def is_refused(result, *words):
    """Exit status 2, and a last line that says all of `words`; the lines before are of retries."""
    status, _, error = result
    *before, last = error.splitlines()
    assert status == 2 and last.startswith("error: "), error
    assert not [line for line in before if "error:" in line or "Traceback" in line]
    for word in words:
        assert word in last, last
    return last


# -- a server that behaves -------------------------------------------------------------------------


def test_everything_is_fetched_once_and_ends_in_a_table(site, source, download):
    status, output, error = download.mine("--url", site.url)
    assert status == 0, error
    all_there(source)
    assert output.count(f"from {site.url}") == len(source)
    lines = output.splitlines()[len(source) :]
    assert lines[0].split() == "split file holds shape dtype size state".split()
    assert len(lines) == 1 + len(source)
    assert all(line.endswith("  whole") for line in lines[1:])
    row = next(line for line in lines if "data/mine/train_ims.npy" in line)
    assert re.split(r" {2,}", row) == [
        "train", "data/mine/train_ims.npy", "30 images", "(30, 36, 32)", "float32", "138.4 kB",
        "whole",
    ]  # fmt: skip
    assert any("150 captions" in line for line in lines)
    assert any("30 ids" in line for line in lines)

    seen = len(site.log)
    assert download.mine("--url", site.url)[0] == 0
    assert download.mine("--check")[0] == 0
    assert len(site.log) == seen  # whole files are not asked for again

    target(TRAIN).unlink()
    assert download.mine("--url", site.url)[0] == 0
    assert [path for path, *_ in site.log[seen:]] == ["/SHA256SUMS", TRAIN]
    all_there(source)


def test_small_files_come_before_large_ones(site, source, download):
    download.mine("--url", site.url)
    asked = [path for path, *_ in site.log if path in source]
    kinds = [path.rpartition("_")[2] for path in asked]
    assert kinds == ["vocab.json", *["caps.txt"] * 3, *["ids.txt"] * 3, *["ims.npy"] * 3]
    assert asked[-1] == TRAIN


def test_ids_are_optional_and_the_vocabulary_may_lie_beside(site, source, download):
    for path in list(site.files):
        if path.endswith("_ids.txt"):
            del site.files[path]
    site.files["/mine_vocab.json"] = site.files.pop("/vocab/mine_vocab.json")
    status, output, error = download.mine("--url", site.url + "/?key=1")
    assert status == 0, error
    assert target("/vocab/mine_vocab.json").read_bytes() == source["/vocab/mine_vocab.json"]
    assert output.count("none (optional)") == 3
    assert not list(Path("data").rglob("*.part*"))


def test_one_split_alone(site, download):
    assert download.mine("--url", site.url, "--splits", "test")[0] == 0
    names = {file.name for file in Path("data/mine").iterdir()}
    assert names == {"test_ims.npy", "test_caps.txt", "test_ids.txt"}
    assert download.mine("--check", "--splits", "test")[0] == 0
    assert download.mine("--check")[0] == 1


def test_the_command_as_typed(site, source, tmp_path):
    del site.files[TRAIN]
    arguments = ["--data_name", "mine", "--url", site.url]
    refused(run_script(tmp_path, "scripts/download_data.py", *arguments), "train_ims.npy", "404")
    caps = "data/mine/train_caps.txt"
    assert (tmp_path / caps).read_bytes() == source["/mine/train_caps.txt"]


# -- a server that does not ------------------------------------------------------------------------


def test_a_key_in_the_query_may_change(site, source, download):
    site.how[TRAIN] = [{"drop": 100_000}, {}]
    is_refused(download.mine("--url", site.url + "?key=1", "--retries", 0), "100,000 of 138,")
    status, _, error = download.mine("--url", site.url + "?key=2")
    assert status == 0 and site.requests(TRAIN) == [None, "bytes=100000-"]
    assert "key" not in error
    all_there(source)


def test_dropped_connections_are_resumed(site, source, download, waits):
    site.how[TRAIN] = [{"drop": 50_000}, {"drop": 30_000, "reset": True}, {"drop": 1}, {}]
    status, _, error = download.mine("--url", site.url)
    assert status == 0, error
    all_there(source)
    ranges = site.requests(TRAIN)
    starts = [int(asked.removeprefix("bytes=").rstrip("-")) for asked in ranges[1:]]
    assert ranges[0] is None and len(ranges) == 4
    # A reset may take bytes with it that had come; never more than were sent.
    assert starts[0] == 50_000 <= starts[1] <= 80_000 and starts[2] in (starts[1], starts[1] + 1)
    etag = site.etag(TRAIN, source[TRAIN])
    assert [condition for path, _, condition in site.log if path == TRAIN] == [None, *[etag] * 3]
    assert error.count(" of 5 in ") == len(waits) == 3


def test_another_run_goes_on_where_the_first_was_stopped(site, source, download):
    site.how[TRAIN] = [{"drop": 100_000}, {}]
    result = download.mine("--url", site.url, "--retries", 0)
    is_refused(result, "train_ims.npy", "100,000 of 138,", "100.0 kB are kept in")
    assert not target(TRAIN).exists()
    status, output, _ = download.mine("--check")
    assert status == 1 and "missing, 100.0 kB in train_ims.npy.part" in output
    status, _, error = download.mine("--url", site.url, "--retries", 0)
    assert status == 0 and "going on after 100.0 kB" in error
    assert site.requests(TRAIN) == [None, "bytes=100000-"]
    all_there(source)


def test_a_part_that_is_complete_needs_no_request(site, source, download):
    site.how[TRAIN] = [{"drop": 100_000}]
    download.mine("--url", site.url, "--retries", 0)
    part = Path("data/mine/train_ims.npy.part")
    part.write_bytes(source[TRAIN])  # stopped after the last byte, before it was moved
    status, _, error = download.mine("--url", site.url)
    assert status == 0, error
    assert len(site.requests(TRAIN)) == 1
    all_there(source)


@pytest.mark.parametrize("note", [None, "", "{}", "[1]", '{"link": 1, "size": "x"}', "other link"])
def test_a_part_of_unknown_origin_is_not_trusted(site, source, download, note):
    site.how[TRAIN] = [{"drop": 100_000}, {}]
    download.mine("--url", site.url, "--retries", 0)
    path = Path("data/mine/train_ims.npy.part.json")
    if note == "other link":
        note = path.read_text().replace(site.url, "http://elsewhere")
    path.unlink() if note is None else path.write_text(note)
    Path("data/mine/train_ims.npy.part").write_bytes(bytes(100_000))
    status, _, error = download.mine("--url", site.url)
    assert status == 0, error
    assert site.requests(TRAIN) == [None, None]
    all_there(source)


def test_a_server_without_ranges_starts_over(site, source, download):
    site.how[TRAIN] = [{"drop": 50_000}, {"ranges": False, "drop": 90_000}, {"ranges": False}]
    status, _, error = download.mine("--url", site.url)
    assert status == 0, error
    assert error.count("sent from the start again") == 2
    assert site.requests(TRAIN) == [None, "bytes=50000-", "bytes=90000-"]
    all_there(source)


def test_a_file_that_changes_between_attempts_is_begun_anew(site, source, download):
    other = bytearray(source[TRAIN])
    other[-40_000:] = bytes(40_000)
    site.how[TRAIN] = [{"drop": 50_000, "body": bytes(other)}, {}]
    status, _, error = download.mine("--url", site.url)
    assert status == 0, error
    assert "sent from the start again" in error
    all_there(source)


def test_a_change_is_seen_where_the_server_ignores_if_range(site, source, download):
    """It answers 206 though the file is another: the ETag of the answer tells."""
    other = bytearray(source[TRAIN])
    other[-100_000:] = bytes(100_000)
    site.how[TRAIN] = [{"drop": 60_000, "body": bytes(other)}, {"if_range": False}, {}]
    status, _, error = download.mine("--url", site.url)
    assert status == 0, error
    assert "begun anew" in error and site.requests(TRAIN) == [None, "bytes=60000-", None]
    all_there(source)


def test_weak_etags_are_not_used_and_a_date_is(site, source, download):
    date = "Mon, 02 Jan 2012 03:04:05 GMT"
    site.etag = lambda path, body: date if path == TRAIN else ""
    headers = {"headers": {"Last-Modified": date}}
    site.how[TRAIN] = [headers | {"drop": 50_000}, headers]
    site_send = site.answer

    def weak(request):  # the ETag that is sent is weak, the condition that fits is the date
        send = request.send_header
        request.send_header = lambda name, value: send(name, 'W/"1"' if name == "ETag" else value)
        site_send(request)

    site.answer = weak
    status, _, error = download.mine("--url", site.url)
    assert status == 0, error
    asked = [entry[1:] for entry in site.log if entry[0] == TRAIN]
    assert asked == [(None, None), ("bytes=50000-", date)]
    all_there(source)


def test_without_validator_the_size_must_stay(site, source, download):
    site.etag = lambda path, body: ""
    longer = source[TRAIN] + b"x"
    site.how[TRAIN] = [{"drop": 50_000}, {"body": longer}, {"drop": 70_000}, {}]
    status, _, error = download.mine("--url", site.url)
    assert status == 0, error
    assert site.requests(TRAIN) == [None, "bytes=50000-", None, "bytes=70000-"]
    all_there(source)


def test_the_wrong_range_is_not_appended(site, source, download):
    site.how[TRAIN] = [{"drop": 50_000}, {"first": 10}, {}]
    assert download.mine("--url", site.url)[0] == 0
    all_there(source)


def test_no_length_is_given(site, source, download):
    """Chunked, or ended by closing: an array's own header says when it is all there."""
    for path in source:
        site.how[path] = [{"chunked": True}]
    site.how[TRAIN] = [{"length": False, "drop": 5_000}, {"length": False}]
    dev = "/mine/dev_ims.npy"
    site.how[dev] = [{"chunked": True, "drop": 20_000}, {"chunked": True}]
    status, _, error = download.mine("--url", site.url)
    assert status == 0, error
    assert site.requests(TRAIN) == [None, "bytes=5000-"]
    assert len(site.requests(dev)) == 2
    all_there(source)


def test_busy_servers_are_asked_again(site, source, download, waits):
    busy = {"status": 503}
    site.how[TRAIN] = [busy, busy, busy, {"status": 429, "headers": {"Retry-After": "7"}}, {}]
    assert download.mine("--url", site.url)[0] == 0
    assert waits == [1, 2, 4, 7]
    all_there(source)


def test_retries_are_bounded(site, download, waits):
    site.how[TRAIN] = [{"drop": 50_000}, {"drop": 0}]
    result = download.mine("--url", site.url, "--retries", 3)
    is_refused(result, "train_ims.npy", "50,000 of", "given up after attempt 4", "are kept in")
    assert len(site.requests(TRAIN)) == 4 and waits == [1, 2, 4]
    assert not target(TRAIN).exists()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ([{"claim": 100}], ["train_ims.npy", "its header is of"]),
        ([{"claim": -100}], ["train_ims.npy", "its header is of"]),
        ([{"drop": 60_000}, {"more": 100}], ["train_ims.npy", "longer than"]),
        ([{"length": False, "more": 100}], ["train_ims.npy", "longer than"]),
        ([{"headers": {"Content-Encoding": "gzip"}}], ["train_ims.npy", "gzip"]),
        ([{"status": 404}], ["train_ims.npy", "404"]),
        ([{"status": 401}], ["train_ims.npy", "401"]),
        ([{"status": 204}], ["train_ims.npy", "204"]),
        ([{"status": 302, "headers": {"Location": "/mine/train_ims.npy"}}], ["train_ims.npy"]),
        ([{"body": b""}], ["train_ims.npy", "no header of a .npy"]),
        ([{"body": b"<!DOCTYPE html><title>Sign in</title>"}], ['a web page ("Sign in") instead']),
        ([{"body": b"\n <html>" + bytes(50_000)}], ["a web page instead of train_ims.npy"]),
        ([{"body": b"<?xml version='1.0'?><Error/>"}], ["a web page instead"]),
        ([{"body": b"\x93NUMPY\x01\x00\xff\xff{" + bytes(90)}], ["no header of a .npy"]),
        ([{"body": b"\x93NUMPY\x09\x00" + bytes(90)}], ["no header of a .npy"]),
    ],
)
def test_what_is_no_array_is_refused(site, download, how, words):
    site.how[TRAIN] = how
    is_refused(download.mine("--url", site.url, "--retries", 1), "data/mine/train_ims.npy", *words)
    assert not target(TRAIN).exists()
    left = {file.name for file in Path("data/mine").iterdir() if "train_ims" in file.name}
    assert left == set()


def test_a_body_shorter_than_was_said_is_given_up(site, source, download):
    """Text has no header of its own: the server is asked for the rest, which it does not have."""
    path = "/mine/dev_caps.txt"
    for how in ({"claim": 100}, {"claim": 100, "ranges": False}):
        site.how[path] = [how]
        is_refused(download.mine("--url", site.url, "--retries", 2), "dev_caps.txt", "given up")
        assert not target(path).exists()
    shutil.rmtree("data")
    last = source[path].splitlines(keepends=True)[-1]
    site.how[path] = [{"claim": -len(last)}]  # … and one caption less than there is
    words = ["dev_ims.npy", "10 rows do not fit the 49 captions"]
    is_refused(download.mine("--url", site.url), *words)
    assert not target("/mine/dev_ims.npy").exists()


def npy(shape, dtype=np.float32):
    stream = io.BytesIO()
    np.save(stream, np.zeros(shape, dtype))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (TRAIN, npy((30, 36, 8), np.float64), ["float64"]),
        (TRAIN, npy((30, 8)), ["(30, 8)"]),
        (TRAIN, npy((29, 36, 8)), ["29 rows do not fit the 150 captions"]),
        (TRAIN, npy((30, 36, 8)) + b"x", ["bytes, but its header"]),
        ("/mine/train_caps.txt", b"a dog\n\xff\xfe\n", ["train_caps.txt", "line 2", "not UTF-8"]),
        ("/mine/train_caps.txt", b"a dog\n\na cat\n", ["line 2", "empty"]),
        ("/mine/train_caps.txt", b"", ["empty"]),
        ("/mine/train_caps.txt", bytes(100), ["binary data"]),
        ("/mine/train_caps.txt", b"<html>not found</html>", ["a web page"]),
        ("/vocab/mine_vocab.json", b"[1, 2]", ["no JSON object", "vocab.py builds one"]),
        ("/vocab/mine_vocab.json", b'{"word2idx": {}}', ["word2idx"]),
        ("/vocab/mine_vocab.json", b'{"word2idx": ', ["not a JSON file"]),
    ],
)  # fmt: skip
def test_files_that_are_not_whole_are_refused(site, download, path, body, words):
    site.how[path] = [{"body": body}]
    is_refused(download.mine("--url", site.url), str(target(path)), *words)
    assert not target(path).exists()
    assert not list(Path("data").rglob("*.part*")) + list(Path("vocab").rglob("*.part*"))


def test_nobody_answers(download, waits, tmp_path):
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{port.getsockname()[1]}"
    result = download.mine("--url", url, "--retries", 2)
    is_refused(result, url, "Connection refused", "attempt 3")
    assert waits == [1, 2]
    is_refused(download.mine("--url", "http://no-such-host.invalid/x"), "no-such-host.invalid")
    assert waits == [1, 2]  # another attempt would end the same way
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_mirror_steps_in(site, source, download):
    del site.files[TRAIN]
    site.how["/mine/dev_ims.npy"] = [{"body": b"<html>"}]
    with serving(source) as mirror:
        status, output, error = download.mine("--url", site.url, "--url", mirror.url)
        assert status == 0, error
        asked = {path for path, *_ in mirror.log}
        assert asked == {"/SHA256SUMS", TRAIN, "/mine/dev_ims.npy"}
        assert output.count(f"from {mirror.url}") == 2
        all_there(source)
        target(TRAIN).unlink()
        mirror.files.clear()
        last = is_refused(download.mine("--url", site.url, "--url", mirror.url), "train_ims.npy")
        assert last.count("404") == 2 and site.url in last and mirror.url in last


def test_a_dead_mirror_is_asked_once(site, source, download, waits):
    dead = "http://no-such-host.invalid"
    assert download.mine("--url", dead, "--url", site.url)[0] == 0
    assert waits == []
    all_there(source)


def test_without_the_last_small_file_no_large_one_is_fetched(site, download):
    del site.files["/mine/test_caps.txt"]
    is_refused(download.mine("--url", site.url), "test_caps.txt", "404")
    assert not [path for path, *_ in site.log if path.endswith(".npy")]


# -- checksums, room, locks ------------------------------------------------------------------------


def sums_of(files):
    return "".join(f"{hashlib.sha256(c).hexdigest()}  .{path}\n" for path, c in files.items())


def changed(content):
    """Another array of the same kind."""
    return content[:-4] + struct.pack("<f", 7.0)


def test_checksums_of_the_server_and_of_a_file(site, source, download):
    site.files["/SHA256SUMS"] = sums_of(source).encode()
    assert download.mine("--url", site.url)[0] == 0
    target(TRAIN).unlink()
    site.files[TRAIN] = changed(source[TRAIN])
    is_refused(download.mine("--url", site.url), "train_ims.npy", "SHA-256", "is not the")
    assert not list(Path("data").rglob("train_ims*"))

    site.files["/SHA256SUMS"] = b"<html>no such page"
    assert download.mine("--url", site.url)[0] == 0  # nothing is known of it now
    Path("sums").write_text(sums_of(source))
    status, output, _ = download.mine("--check", "--sha256", "sums")
    assert status == 1 and output.count("wrong") == 1 and "SHA-256" in output
    last = is_refused(download.mine("--url", site.url, "--sha256", "sums"), "--overwrite")
    assert "train_ims.npy" in last
    site.files[TRAIN] = source[TRAIN]
    command = ["--url", site.url, "--sha256", "sums", "--overwrite"]
    assert download.mine(*command)[0] == 0
    Path("sums").unlink()
    all_there(source)


def test_sums_are_found_by_the_end_of_the_path(tmp_path):
    a, b, c = ("a" * 64, "b" * 64, "C" * 64)
    file = tmp_path / "sums"
    file.write_text(f"{a}  f30k_precomp/train_ims.npy\n{b} *./x/coco_precomp/train_ims.npy\n\n")
    sums = download_data.Sums(file)
    assert sums.of("f30k_precomp/train_ims.npy") == a
    assert sums.of("coco_precomp/train_ims.npy") == b
    assert sums.of("mine/train_ims.npy") is None
    file.write_text(f"{a}  f30k_precomp/train_ims.npy\n{c}  train_ims.npy\n")
    sums = download_data.Sums(file)
    assert sums.of("f30k_precomp/train_ims.npy") == a and sums.of("mine/train_ims.npy") == "c" * 64


def test_bad_checksum_files(site, download):
    for content, words in (
        (b"hello\n", ["line 1"]), (b"", ["no SHA-256"]), (b"\xff", ["UTF-8"]),
        (b"a" * 40 + b"  x\n", ["line 1"]),
    ):  # fmt: skip
        Path("sums").write_bytes(content)
        is_refused(download.mine("--url", site.url, "--sha256", "sums"), "sums", *words)
    is_refused(download.mine("--url", site.url, "--sha256", "nowhere"), "nowhere")
    assert site.log == []
    site.files["/SHA256SUMS"] = b"hello\n"
    status, _, error = download.mine("--url", site.url)
    assert status == 0 and "SHA256SUMS is not used" in error


def test_a_full_disk_is_noticed_before(site, source, download, monkeypatch):
    free = 100_000
    usage = type(shutil.disk_usage("."))
    monkeypatch.setattr(download_data.shutil, "disk_usage", lambda path: usage(1, 1, free))
    is_refused(download.mine("--url", site.url), "train_ims.npy", "138.4 kB needed, 100.0 kB free")
    assert Path("data/mine/dev_ims.npy").is_file() and not target(TRAIN).exists()
    assert not target(TRAIN + ".part").exists()
    free = 10**9
    assert download.mine("--url", site.url)[0] == 0
    all_there(source)


def test_a_disk_that_fills_up_keeps_what_has_come(site, source, download):
    """A limit on the size of files stands for the disk; no mirror is tried, it would not help."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        result = download.mine("--url", site.url, "--url", "http://no-such-host.invalid")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "invalid" not in is_refused(result, "train_ims.npy.part", "make room")
    assert target(TRAIN + ".part").read_bytes() == source[TRAIN][:100_000]
    assert download.mine("--url", site.url)[0] == 0
    all_there(source)


def test_two_downloads_do_not_share_a_part(site, download):
    fcntl = pytest.importorskip("fcntl")
    Path("data/mine").mkdir(parents=True)
    with Path("data/mine/train_ims.npy.part").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        is_refused(download.mine("--url", site.url), "train_ims.npy.part", "another download")
    assert download.mine("--url", site.url)[0] == 0


def test_progress_is_told_in_bytes(site, download, monkeypatch):
    monkeypatch.setattr(download_data, "SAY_EVERY", 0)
    status, _, error = download.mine("--url", site.url)
    assert status == 0
    assert re.search(r"^train_ims\.npy: 138\.4 kB of 138\.4 kB, \S+ [GMk]B/s$", error, re.MULTILINE)


# -- what is there already -------------------------------------------------------------------------


def test_a_wrong_file_is_not_replaced_unasked(site, source, download):
    target(TRAIN).parent.mkdir(parents=True)
    target(TRAIN).write_bytes(source[TRAIN][:-1000])
    before = target(TRAIN).read_bytes()
    is_refused(
        download.mine("--url", site.url), "train_ims.npy", "137,", "says 138,", "--overwrite"
    )
    assert site.log == [] and target(TRAIN).read_bytes() == before
    site.how[TRAIN] = [{"status": 404}, {}]
    is_refused(download.mine("--url", site.url, "--overwrite"), "404")
    assert target(TRAIN).read_bytes() == before  # the old one goes when the new one is whole
    assert download.mine("--url", site.url, "--overwrite")[0] == 0
    all_there(source)


def test_files_of_another_data_set_are_replaced_together(site, source, download, tmp_path):
    write_split(tmp_path / "data/mine", "train", 7)
    (tmp_path / "data/mine/train_ids.txt").unlink()
    np.save(target(TRAIN), np.zeros((11, 3, 2), np.float32))
    is_refused(download.mine("--url", site.url), "35 captions do not fit the 11 images")
    assert download.mine("--url", site.url, "--overwrite")[0] == 0
    all_there(source)


def test_optional_files_that_stay_wrong(site, source, download):
    assert download.mine("--url", site.url)[0] == 0
    ids = target("/mine/dev_ids.txt")
    ids.write_text("a\nb\nc")
    is_refused(download.mine("--url", site.url), "3 ids do not fit 10 images", "--overwrite")
    del site.files["/mine/dev_ids.txt"]
    result = download.mine("--url", site.url, "--overwrite")
    is_refused(result, "3 ids do not fit 10 images", "no source has a better one")
    site.files["/mine/dev_ids.txt"] = source["/mine/dev_ids.txt"]
    assert download.mine("--url", site.url, "--overwrite")[0] == 0
    all_there(source)


def test_ids_alone(download):
    Path("data/mine").mkdir(parents=True)
    for content, state in ((b"1", "1 ids"), (b"1\n2\n", "2 ids"), (b"", "no ids in it")):
        target("/mine/dev_ids.txt").write_bytes(content)
        assert state in download.mine("--check")[1]


def test_check_touches_nothing(download, tmp_path):
    status, output, error = download("--data_name", "f30k_precomp", "--check")
    assert status == 1 and error == "" and list(tmp_path.iterdir()) == []
    assert output.count("missing") == 7 and output.count("none (optional)") == 3


def sparse(path, shape, dtype=np.float32, short=0):
    """An array of zeros that takes no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + np.dtype(dtype).itemsize * int(np.prod(shape)) - short)


def a_whole_data_set(name, images, dtype=np.float32, repeat=1):
    folder = Path("data") / name
    for split, n in images.items():
        sparse(folder / f"{split}_ims.npy", (n * repeat, 36, 2048), dtype)
        (folder / f"{split}_caps.txt").write_text("a dog .\n" * (5 * n))
    words = ["<pad>", "<start>", "<end>", "<unk>"]
    download_data.Vocabulary(words).save(Path("vocab") / f"{name}_vocab.json")
    return folder


F30K = {"train": 29_000, "dev": 1_014, "test": 1_000}
COCO = {"train": 113_287, "dev": 5_000, "test": 1_000, "testall": 5_000}


@pytest.mark.parametrize(
    ("name", "images", "dtype", "repeat"),
    [
        ("f30k_precomp", F30K, np.float32, 1),
        ("f30k_precomp", F30K, np.float16, 5),
        ("coco_precomp", COCO, np.float32, 1),
        ("coco_precomp", {"test": 5_000, "testall": 5_000}, np.float32, 1),
        ("coco_precomp", {"dev": 5_000, "test": 1_000, "testall": 5_000}, np.float32, 5),
    ],
)
def test_the_known_data_sets_are_known(download, name, images, dtype, repeat):
    folder = a_whole_data_set(name, images, dtype, repeat)
    options = ["--data_name", name, "--splits", *images]
    status, output, _ = download(*options, "--check")
    assert status == 0, output
    for split, n in images.items():
        row = next(line for line in output.splitlines() if f"{split}_ims.npy" in line)
        assert f"{n:,} images" in row and f"({n * repeat}, 36, 2048)" in row
        assert np.dtype(dtype).name in row and row.endswith("whole")
    assert "4 words" in output
    # Whole: there is nothing to fetch, and Kaggle is not asked.
    assert download(*options)[0] == 0
    (folder / "test_ids.txt").write_text("1\n2\n")
    status, output, _ = download(*options, "--check")
    assert status == 1 and "2 ids do not fit" in output and output.count("wrong") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: sparse(f / "dev_ims.npy", (1_013, 36, 2048)), ["expected (1014, 36, 2048)"]),
        (lambda f: sparse(f / "dev_ims.npy", (1_014, 100, 2048)), ["found (1014, 100, 2048)"]),
        (lambda f: sparse(f / "dev_ims.npy", (1_014, 36, 1024)), ["found (1014, 36, 1024)"]),
        (lambda f: sparse(f / "dev_ims.npy", (1_014, 36, 2048), np.int32), ["int32"]),
        (lambda f: sparse(f / "dev_ims.npy", (1_014, 36, 2048), short=8), ["299,040,888 bytes"]),
        (lambda f: sparse(f / "dev_ims.npy", (1_014, 36, 2048), short=-8), ["299,040,904 bytes"]),
        (lambda f: (f / "dev_caps.txt").write_text("a dog\n" * 5_069), ["expected 5,070", "5,069"]),
        (lambda f: (f / "dev_caps.txt").write_text("a dog\n" * 1_014), ["expected 5,070"]),
        (lambda f: (f / "dev_caps.txt").unlink(), ["missing"]),
        (lambda f: (f / "dev_ims.npy").unlink(), ["missing"]),
        (lambda f: Path("vocab/f30k_precomp_vocab.json").write_text("{"), ["not a JSON file"]),
    ],
)
def test_what_is_wrong_with_a_known_data_set(download, change, words):
    folder = a_whole_data_set("f30k_precomp", F30K)
    change(folder)
    status, output, _ = download("--data_name", "f30k_precomp", "--check")
    assert status == 1
    bad = [line for line in output.splitlines()[1:] if not line.endswith(("whole", "(optional)"))]
    assert len(bad) == 1, output
    for word in words:
        assert word in bad[0]


def test_coco_test_of_5000_images_needs_their_captions(download):
    """5,000 rows and 5,000 captions, not repeated: an image would have one caption only."""
    folder = a_whole_data_set("coco_precomp", {"test": 5_000})
    (folder / "test_caps.txt").write_text("a dog\n" * 5_000)
    with (folder / "test_ims.npy").open("r+b") as file:
        file.seek(200)
        file.write(b"\x01")  # the first image differs from its neighbours
    status, output, _ = download("--data_name", "coco_precomp", "--check", "--splits", "test")
    assert status == 1 and "5,000 captions do not fit the 5,000 images" in output


# -- archives --------------------------------------------------------------------------------------


def as_zip(files, compression=zipfile.ZIP_DEFLATED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def as_tar(files, mode):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def packed(files, kind):
    if kind == "zip":
        return as_zip(files)
    return as_tar(files, "w:gz" if kind in ("tgz", "tar.gz") else "w")


def members(source, prefix):
    extra = {f"{prefix}readme.txt": b"hello", f"{prefix}other/train_ims.npy": b"of another set"}
    return extra | {prefix + path[1:]: content for path, content in source.items()}


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        ("zip", ""), ("zip", "../../"), ("zip", "/etc/"), ("zip", "..\\x\\"), ("tar", "./scan/a/"),
        ("tar", "../../"), ("tgz", "/etc/"), ("tar.gz", ""),
    ],
)  # fmt: skip
def test_archives_are_unpacked_by_name_and_removed(site, source, download, tmp_path, kind, prefix):
    site.files = {f"/a.{kind}": packed(members(source, prefix), kind)}
    before = set(tmp_path.parent.iterdir())
    status, _, error = download.mine("--url", f"{site.url}/a.{kind}")
    assert status == 0, error
    all_there(source)
    assert set(tmp_path.parent.iterdir()) == before
    assert {file.name for file in tmp_path.iterdir()} == {"data", "vocab"}


def test_an_archive_on_this_disk_stays(source, download, tmp_path):
    archive = tmp_path / "a b.zip"
    archive.write_bytes(as_zip(members(source, "x/")))
    before = archive.read_bytes()
    assert download.mine("--url", archive, "--splits", "test")[0] == 0
    assert {file.name for file in Path("data/mine").iterdir()} == {
        "test_ims.npy", "test_caps.txt", "test_ids.txt",
    }  # fmt: skip
    assert download.mine("--url", archive.as_uri())[0] == 0
    assert archive.read_bytes() == before
    all_there(source)


def test_an_archive_of_one_folder(site, source, download):
    flat = {path.rpartition("/")[2]: content for path, content in source.items()}
    site.files = {"/flat.zip": as_zip(flat)}
    assert download.mine("--url", f"{site.url}/flat.zip?download=1")[0] == 0
    all_there(source)


def test_an_archive_is_resumed_and_its_checksum_held(site, source, download):
    content = as_zip(members(source, ""), zipfile.ZIP_STORED)
    site.files = {"/x/a.zip": content}
    site.how["/x/a.zip"] = [{"drop": 100_000}, {}]
    url = f"{site.url}/x/a.zip"
    is_refused(download.mine("--url", url, "--retries", 0), "a.zip", "kept in data/a.zip.part")
    Path("sums").write_text(f"{hashlib.sha256(content).hexdigest()}  a.zip\n")
    assert download.mine("--url", url, "--sha256", "sums")[0] == 0
    assert site.requests("/x/a.zip") == [None, "bytes=100000-"]
    all_there(source)
    shutil.rmtree("data")
    site.files["/x/SHA256SUMS"] = f"{'0' * 64}  a.zip\n".encode()
    is_refused(download.mine("--url", url), "a.zip", "SHA-256")
    assert not [file for file in Path("data").rglob("*") if file.is_file()]


def test_links_and_folders_in_archives_are_not_followed(source, download, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(source[TRAIN])
    with tarfile.open("a.tar", "w") as archive:
        for path, content in source.items():
            info = tarfile.TarInfo(path[1:])
            if path == TRAIN:
                info.type, info.linkname = tarfile.SYMTYPE, str(secret)
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    is_refused(download.mine("--url", "a.tar"), "train_ims.npy", "has no mine/train_ims.npy")
    with zipfile.ZipFile("a.zip", "w") as archive:
        archive.writestr("mine/train_ims.npy/", b"")
        link = zipfile.ZipInfo("mine/train_ims.npy")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(secret))
    is_refused(download.mine("--url", "a.zip"), "train_ims.npy", "has no mine/train_ims.npy")
    assert not target(TRAIN).exists()


def corrupt(content, how):
    if how == "cut":
        return content[: len(content) // 2]
    if how == "flip":  # in the middle of the members' bytes
        place = len(content) // 2
        return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]
    if how == "text":
        return b"hello " * 1000
    if how == "page":
        return b"<!doctype html><title>Log in</title>"
    if how == "encrypted":
        content = bytearray(content)
        for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            at = -1
            while (at := content.find(mark, at + 1)) >= 0:
                content[at + offset] |= 1
        return bytes(content)
    return b""


DAMAGED = {  # a .tar has neither passwords nor checksums of its contents
    "zip": ("cut", "flip", "text", "page", "empty", "encrypted"),
    "tar": ("cut", "text", "empty"),
    "tgz": ("cut", "flip", "page"),
}


@pytest.mark.parametrize(("kind", "how"), [(k, how) for k, hows in DAMAGED.items() for how in hows])
@pytest.mark.parametrize("local", [False, True])
def test_damaged_archives_end_in_one_line(site, source, download, kind, how, local):
    content = corrupt(packed({TRAIN[1:]: source[TRAIN]} | members(source, ""), kind), how)
    name = f"bad.{kind}"
    site.files = {f"/{name}": content}
    Path(name).write_bytes(content)
    before = Path(name).read_bytes()
    is_refused(download.mine("--url", name if local else f"{site.url}/{name}"), name)
    assert not target(TRAIN).exists() and Path(name).read_bytes() == before
    left = [file for top in ("data", "vocab") for file in Path(top).rglob("*") if file.is_file()]
    assert not [file for file in left if file.suffix in (".part", ".tmp", ".json")]


def test_a_member_that_is_not_what_its_name_says(source, download):
    for body, words in (
        (npy((29, 36, 8)), ["do not fit"]), (npy((30, 36, 8)) + b"x", ["its header says"]),
        (b"", ["no header"]), (b"<html>", ["a web page"]),
    ):  # fmt: skip
        Path("a.zip").write_bytes(as_zip(members(source | {TRAIN: body}, "")))
        is_refused(download.mine("--url", "a.zip"), "a.zip, mine/train_ims.npy", *words)
        assert not list(Path("data").rglob("train_ims*"))


def test_a_file_that_comes_packed_is_unpacked(site, source, download):
    """As Kaggle sends some."""
    site.files["/mine/dev_caps.txt"] = as_zip({"dev_caps.txt": source["/mine/dev_caps.txt"]})
    assert download.mine("--url", site.url)[0] == 0
    all_there(source)
    target("/mine/dev_caps.txt").unlink()
    site.files["/mine/dev_caps.txt"] = as_zip({"else.txt": b"x"})
    is_refused(download.mine("--url", site.url), "an archive without dev_caps.txt")


# -- Kaggle ----------------------------------------------------------------------------------------


class FakeKaggle(types.ModuleType):
    """kagglesdk as far as it is used: pages of a list, and a redirect to where a file lies."""

    def __init__(self, base, names, error=None, error_message=""):
        super().__init__("kagglesdk")
        self.base, self.names, self.error, self.error_message = base, names, error, error_message
        self.listed = self.signed = 0

    def KaggleClient(self):
        api = types.SimpleNamespace(
            list_dataset_files=self.list_files, download_dataset=self.download
        )
        return types.SimpleNamespace(datasets=types.SimpleNamespace(dataset_api_client=api))

    def list_files(self, request):
        assert (request.owner_slug, request.dataset_slug) == ("kuanghueilee", "scan-features")
        if self.error:
            raise self.error
        self.listed += 1
        start = int(getattr(request, "page_token", "") or 0)
        files = [
            types.SimpleNamespace(name=name, total_bytes=len(name))
            for name in self.names[start : start + 3]
        ]
        after = str(start + 3) if start + 3 < len(self.names) else ""
        return types.SimpleNamespace(
            dataset_files=files, next_page_token=after, error_message=self.error_message
        )

    @contextmanager
    def download(self, request):
        self.signed += 1
        url = f"{self.base}/{request.file_name}?X-Goog-Signature={self.signed}"
        yield types.SimpleNamespace(url=url)


@pytest.fixture
def small_f30k(monkeypatch, source):
    """The known data set made small: the same files under its name."""
    monkeypatch.setitem(
        download_data.IMAGES, "f30k_precomp", {s: (n,) for s, n in SIZES.items()}
    )  # fmt: skip
    monkeypatch.setattr(download_data, "REGIONS", (36, 32))
    return {path.replace("mine", "f30k_precomp"): content for path, content in source.items()}


def on_kaggle(monkeypatch, *arguments, **others):
    fake = FakeKaggle(*arguments, **others)
    service = types.SimpleNamespace(
        ApiListDatasetFilesRequest=types.SimpleNamespace,
        ApiDownloadDatasetRequest=types.SimpleNamespace,
    )
    package = types.ModuleType("kagglesdk.datasets.types")
    package.dataset_api_service = service
    monkeypatch.setitem(sys.modules, "kagglesdk", fake)
    monkeypatch.setitem(sys.modules, "kagglesdk.datasets", types.ModuleType("datasets"))
    monkeypatch.setitem(sys.modules, "kagglesdk.datasets.types", package)
    monkeypatch.setitem(sys.modules, "kagglesdk.datasets.types.dataset_api_service", service)
    return fake


def test_kaggle_single_files_at_any_depth(site, small_f30k, download, monkeypatch):
    deep = {f"/scan/features{path}": content for path, content in small_f30k.items()}
    md5 = base64.b64encode(hashlib.md5(small_f30k["/f30k_precomp/train_ims.npy"]).digest())
    site.files = deep
    train = "/scan/features/f30k_precomp/train_ims.npy"
    stored = {"headers": {"x-goog-hash": f"crc32c=AAAAAA==,md5={md5.decode()}"}}
    site.how[train] = [stored | {"drop": 50_000}, stored]
    names = [path[1:] for path in deep] + ["coco_precomp/train_ims.npy", "coco_precomp.zip"]
    fake = on_kaggle(monkeypatch, site.url, names)
    status, output, error = download()  # f30k_precomp is the default
    assert status == 0, error
    all_there_named(small_f30k)
    assert "Kaggle/kuanghueilee/scan-features" in output
    assert fake.listed == -(-len(names) // 3)
    assert fake.signed == len(small_f30k) + 1  # a fresh URL for every attempt
    assert site.requests(train) == [None, "bytes=50000-"]  # resumed though the URL is another
    assert not [path for path, *_ in site.log if "coco" in path]


def all_there_named(files):
    for path, content in files.items():
        assert target(path).read_bytes() == content, path


def test_room_for_all_of_it_is_looked_for_first(site, small_f30k, download, monkeypatch):
    on_kaggle(monkeypatch, site.url, [path[1:] for path in small_f30k])
    usage = type(shutil.disk_usage("."))
    monkeypatch.setattr(download_data.shutil, "disk_usage", lambda path: usage(1, 1, 200))
    need = sum(len(path) - 1 for path in small_f30k)  # as FakeKaggle tells the sizes
    last = is_refused(download(), f"{need} bytes needed, 200 bytes free")
    assert "by hand" not in last and site.log == []


def test_a_file_damaged_on_its_way_is_refused(site, small_f30k, download, monkeypatch):
    site.files = dict(small_f30k)
    wrong = base64.b64encode(bytes(16)).decode()
    train = "/f30k_precomp/train_ims.npy"
    site.how[train] = [{"headers": {"x-goog-hash": f"md5={wrong}"}}]
    on_kaggle(monkeypatch, site.url, [path[1:] for path in small_f30k])
    is_refused(download(), "train_ims.npy", "MD5", "--url ARCHIVE.zip")
    assert not list(Path("data").rglob("train_ims*"))


def test_kaggle_archives_of_this_data_set_alone(site, small_f30k, download, monkeypatch):
    arrays = {path[1:]: content for path, content in small_f30k.items() if "vocab" not in path}
    vocab = {path[1:]: content for path, content in small_f30k.items() if "vocab" in path}
    names = {"data/coco_data.zip": b"", "data/f30k.tar.gz": as_tar(arrays, "w:gz")}
    site.files = {f"/{name}": content for name, content in names.items()}
    site.files["/data/vocab.zip"] = as_zip(vocab)
    site.files["/readme.txt"] = b"hello"
    on_kaggle(monkeypatch, site.url, [path[1:] for path in site.files])
    status, _, error = download()
    assert status == 0, error
    all_there_named(small_f30k)
    assert {path for path, *_ in site.log} == {"/data/f30k.tar.gz", "/data/vocab.zip"}


def test_kaggle_lacks_a_file(site, small_f30k, download, monkeypatch):
    names = [path[1:] for path in small_f30k if "train_ims" not in path]
    on_kaggle(monkeypatch, site.url, names)
    is_refused(download(), "train_ims.npy", "has no f30k_precomp/train_ims.npy", "by hand")
    assert site.log == []  # before anything is fetched


@pytest.mark.parametrize(
    "error", [ConnectionError("Failed to resolve 'api.kaggle.com'"), RuntimeError("403\nForbidden")]
)
def test_kaggle_does_not_answer(download, monkeypatch, tmp_path, error):
    on_kaggle(monkeypatch, "", [], error=error)
    last = is_refused(download(), str(error).split()[0], download_data.PAGE, "--url ARCHIVE.zip")
    assert "f30k_precomp_vocab.json and 6 other files: not fetched: Kaggle does not" in last
    assert list(tmp_path.iterdir()) == []
    on_kaggle(monkeypatch, "", [], error_message="no such data set")
    is_refused(download(), "no such data set", download_data.PAGE)


def test_kaggle_is_not_installed(download, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "kagglesdk", None)
    words = ["pip install -U kagglesdk", download_data.PAGE, "--url"]
    is_refused(download("--data_name", "coco_precomp"), "coco_precomp", *words)
    assert list(tmp_path.iterdir()) == []


def test_the_real_client_speaks_so(site, small_f30k, download, monkeypatch):
    """kagglesdk itself (where it is installed), against this server instead of Kaggle's."""
    client = pytest.importorskip("kagglesdk.kaggle_http_client")
    monkeypatch.setattr(client, "get_endpoint", lambda env: site.url)
    monkeypatch.setattr(client, "get_access_token_from_env", lambda: (None, None))
    monkeypatch.setattr(client, "_get_apikey_creds", lambda: None)
    site.files = {f"/store{path}": content for path, content in small_f30k.items()}
    api = "/v1/datasets.DatasetApiService"
    answer, asked = site.answer, []

    def speak(request):
        if not request.path.startswith(api):
            return answer(request)
        said = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        asked.append(said)
        assert (said["ownerSlug"], said["datasetSlug"]) == ("kuanghueilee", "scan-features")
        if request.path == f"{api}/DownloadDataset":
            url = f"{site.url}/store/{said['fileName']}?signed"
            return site.refuse(request, 302, {"headers": {"Location": url}})
        files = [{"name": path[1:], "totalBytes": len(c)} for path, c in small_f30k.items()]
        half = len(files) // 2
        page = {"datasetFiles": files[:half], "nextPageToken": "more"}
        if said.get("pageToken") == "more":
            page = {"datasetFiles": files[half:]}
        body = json.dumps(page).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    site.answer = speak
    status, _, error = download()
    assert status == 0, error
    all_there_named(small_f30k)
    assert len(asked) == 2 + len(small_f30k)
    shutil.rmtree("data")
    site.server.shutdown()
    site.server.server_close()  # nobody answers any more
    is_refused(download(), "Kaggle does not list its files", download_data.PAGE)


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data_name", "mine"], ["--data_name mine", "--url"]),
        (["--data_name", "../x", "--url", "http://x/"], ["--data_name ../x"]),
        (["--data_name", "", "--url", "http://x/"], ["--data_name"]),
        (["--data_name", "..", "--check"], ["--data_name .."]),
        (["--splits", "testall"], ["--splits testall", "train, dev, test"]),
        (["--splits", "val"], ["--splits", "val"]),
        (["--retries", "-1"], ["--retries"]),
        (["--url", "ftp://x/y"], ["--url ftp://x/y", "http://"]),
        (["--url", "http://"], ["--url http://"]),
        (["--url", "http://x:port/"], ["--url http://x:port/"]),
        (["--url", "http://[::1/"], ["--url http://[::1/"]),
        (["--url", "http://x/a b"], ["--url", "%20"]),
        (["--url", "http://x/é"], ["--url"]),
        (["--url", "http://me:secret@x/"], ["--url …@x", "password"]),
        (["--url", "nowhere.zip"], ["nowhere.zip", "no such file"]),
        (["--url", "."], ["is a folder"]),
        (["--url", __file__], ["test_download.py", ".tar.gz"]),
        (["--sha256", "nowhere"], ["nowhere"]),
        (["--no_such"], ["--no_such"]),
    ],
)
def test_bad_options_end_in_one_line(download, tmp_path, arguments, words):
    status, output, error = download(*arguments)
    assert status == 2 and output == ""
    last = error.splitlines()[-1]
    assert "error:" in last and "Traceback" not in error
    for word in words:
        assert word in last, last
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(site, download):
    if os.geteuid() == 0:
        Path("data").write_text("a file where the folder should be")
    else:
        Path("data").mkdir(mode=0o500)
    is_refused(download.mine("--url", site.url), "data")
