"""SCAN's precomputed regions, captions and vocabularies: fetched, checked, put where they belong.

    python scripts/download_data.py --data_name f30k_precomp       # 9.2 GB, from Kaggle
    python scripts/download_data.py --data_name coco_precomp       # 36.7 GB
    python scripts/download_data.py --data_name coco_precomp --splits test testall     # 1.8 GB
    python scripts/download_data.py --data_name f30k_precomp --check    # only look: exit 0 or 1

writes, and ends in a table of,

    DATA_PATH/DATA_NAME/{split}_ims.npy, {split}_caps.txt, {split}_ids.txt (where there are ids)
    VOCAB_PATH/DATA_NAME_vocab.json

Without --url it asks Kaggle (kuanghueilee/scan-features), by `kagglesdk`, which comes with
`pip install kagglehub` and with `pip install kaggle`; their credentials are used if there are any.
--url names another source, and may be repeated: a file that one lacks is sought in the next.

    --url https://host/scan     a folder with f30k_precomp/train_ims.npy …, vocab/… (or the
                                vocabulary beside the data set) and, where there is one, SHA256SUMS
    --url https://host/a.zip    an archive (.zip, .tar, .tar.gz, .tgz) that holds these files at any
                                depth; it is fetched, unpacked and removed
    --url ~/Downloads/a.zip     the same, from this disk; it stays where it is

A file is NAME.part until it is whole. Started again, the download goes on where it was stopped, if
the server still has the same file. Whole files are not fetched again; one that is there but wrong
stops the command (--overwrite fetches it anew).

Whole means: an array has the size that its own header says, a known data set has its known numbers
of images (36 × 2048 each; once, or five times over) and five captions an image, captions are UTF-8
and fit the images, the vocabulary loads, and every SHA-256 that is known is right: from --sha256
FILE (as sha256sum writes it, for files here too) or the server's SHA256SUMS (for what is fetched).

Memory does not grow with the size of the files. An archive needs room for itself and its contents.
"""

from __future__ import annotations

import argparse
import base64
import functools
import hashlib
import http.client
import io
import json
import math
import os
import re
import shutil
import socket
import ssl
import stat
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import REPEATED, RegionFile, read_ids
from errors import InputError, one_line
from evaluation import progress
from train import at_least
from vocab import Vocabulary, read_captions, vocab_file

KAGGLE = ("kuanghueilee", "scan-features")
PAGE = f"https://www.kaggle.com/datasets/{'/'.join(KAGGLE)}"
BY_HAND = f"or fetch it by hand from {PAGE} and name the archive: --url ARCHIVE.zip"

SPLITS = ("train", "dev", "test", "testall")
IMAGES = {  # how many a split of a known data set may have
    "f30k_precomp": {"train": (29_000,), "dev": (1_014,), "test": (1_000,)},
    "coco_precomp": {
        "train": (113_287,), "dev": (5_000,), "testall": (5_000,),
        "test": (1_000, 5_000),  # the first 1,000 of testall; in some copies all of it
    },
}  # fmt: skip
REGIONS = (36, 2048)  # of a known data set
CAPTIONS = 5  # an image of a known data set
KINDS = {"ims": "ims.npy", "caps": "caps.txt", "ids": "ids.txt"}
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")

CHUNK = 2**18
HEAD = 2**14  # bytes that are looked at before the rest is fetched; a .npy's header fits
TIMEOUT = 30  # seconds without a byte
LONGEST_WAIT = 60  # seconds between two attempts
SAY_EVERY = 30  # seconds between two lines of progress where there is no terminal
AGENT = "LHSC scripts/download_data.py"
BUSY = (408, 425, 429, 500, 502, 503, 504)  # worth another attempt
NOT_THERE = (403, 404, 410)  # some stores answer 403 for what they do not have


class Unavailable(Exception):
    """This source cannot give the file; another one might."""


class NotThere(Unavailable):
    """The source does not have the file."""


class Unreachable(Unavailable):
    """Nobody answers: there is no use in asking this source for other files."""


class Refused(Unavailable):
    """What came is not what it should be, and is thrown away."""


class LocalError(InputError):
    """This machine's fault: no other source would help."""


class TryAgain(Exception):
    """An attempt that failed in a way that another one may not; `wait` is what the server asks."""

    def __init__(self, reason: str, wait: int | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


# -- what is wanted, and whether it is whole -------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """A file of a data set. `key` is its path in SCAN's layout, `sizes` the numbers of images that
    its split may have (none known: any)."""

    key: str
    path: Path
    split: str = ""
    kind: str = "vocab"
    sizes: tuple[int, ...] = ()

    @property
    def required(self) -> bool:
        return self.kind != "ids"

    def partner(self, kind: str) -> Wanted:
        """The same split's regions, captions or ids."""
        name = f"{self.split}_{KINDS[kind]}"
        key = str(PurePosixPath(self.key).with_name(name))
        return Wanted(key, self.path.with_name(name), self.split, kind, self.sizes)


class Found(NamedTuple):
    """What a whole file holds."""

    count: int
    unit: str  # of what
    shape: tuple[int, ...] = ()
    dtype: str = ""


class Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    end: int  # bytes of the whole file


def wanted_files(
    data_path: Path, vocab_path: Path, data_name: str, splits: list[str] | None
) -> list[Wanted]:
    """The files of a data set, the small ones first: what is wrong shows before hours of download.

    Raises:
        InputError: for a name that is no folder's, or splits that the data set does not have.
    """
    if data_name in ("", ".", "..") or re.search(r"[/\\\0]", data_name):
        raise InputError(f"--data_name {data_name}: should be the name of a folder")
    known = IMAGES.get(data_name, {})
    there = [split for split in SPLITS if split in known] if known else list(SPLITS)
    asked = splits or (there if known else list(SPLITS[:3]))
    for split in asked:
        if split not in there:
            raise InputError(f"--splits {split}: {data_name} has {', '.join(there)}")
    vocab = vocab_file(vocab_path, data_name)
    files = [Wanted(f"vocab/{vocab.name}", vocab)]
    for kind in ("caps", "ids", "ims"):
        for split in sorted(set(asked), key=("test", "dev", "testall", "train").index):
            name = f"{split}_{KINDS[kind]}"
            path = data_path / data_name / name
            files.append(Wanted(f"{data_name}/{name}", path, split, kind, known.get(split, ())))
    return files


def read_header(file: BinaryIO, name: object) -> Header:
    """The header of a .npy file.

    Raises:
        InputError: if there is none, or it is not one of regions.
    """
    try:
        version = np.lib.format.read_magic(file)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, _, dtype = readers[version](file)
    except Exception as error:  # whatever numpy's parser says of bytes that are no array
        said = str(error)[:200]  # it may quote the bytes
        raise InputError(f"{name}: no header of a .npy array: {said}") from error
    if len(shape) != 3 or min(shape) < 1 or dtype not in (np.float32, np.float16):
        raise InputError(
            f"{name}: expected float32 or float16 (images, regions, img_dim), found {dtype} {shape}"
        )
    return Header(shape, dtype, file.tell() + dtype.itemsize * math.prod(shape))


def check_header(header: Header, sizes: tuple[int, ...], name: object) -> None:
    """Raises an InputError if the array cannot be that of a split of these sizes."""
    rows = {n * times for n in sizes for times in (1, REPEATED)}
    if sizes and (header.shape[0] not in rows or header.shape[1:] != REGIONS):
        expected = " or ".join(str((n, *REGIONS)) for n in sizes)
        raise InputError(f"{name}: expected {expected}, found {header.shape}")


def inspect(wanted: Wanted, path: Path, replaced: Container[Path] = ()) -> Found:
    """What the file at `path` holds, if it is what is wanted and fits the rest of its split.

    Args:
        replaced: files that are about to be replaced, so that nothing has to fit them.

    Raises:
        InputError: if not.
    """
    if not path.is_file():
        raise InputError(f"{path}: not a file")
    if wanted.kind == "vocab":
        return Found(len(Vocabulary.load(path)), "words")
    ims, caps = (wanted.partner(kind) for kind in ("ims", "caps"))
    captions = None if caps.path in replaced else captions_of(caps)
    if wanted.kind == "ims":
        header = check_array(wanted, path)
        images = count_images(wanted, path, caps.path, captions)
        return Found(images, "images", header.shape, str(header.dtype))
    array_there = ims.path not in replaced and is_sound(ims)
    if wanted.kind == "ids":
        counts = wanted.sizes
        if array_there:
            counts = (count_images(ims, ims.path, caps.path, captions),)
        return Found(check_ids(path, counts), "ids")
    captions = count_captions(wanted, path)
    if array_there:
        count_images(ims, ims.path, path, captions)
    return Found(captions, "captions")


def check_array(wanted: Wanted, path: Path) -> Header:
    """The header of regions that could be the wanted ones, and that fill their file.

    Raises:
        InputError: if they are not.
    """
    with path.open("rb") as file:
        header = read_header(file, path)
        size = file.seek(0, os.SEEK_END)
    check_header(header, wanted.sizes, path)
    if size != header.end:
        raise InputError(
            f"{path}: {size:,} bytes, but its header, {header.dtype} {header.shape}, says "
            f"{header.end:,}"
        )
    return header


def is_sound(ims: Wanted) -> bool:
    """Whether a split's regions are there and right in themselves. If they are wrong, their own row
    of the table says so."""
    try:
        check_array(ims, ims.path)
    except (InputError, FileNotFoundError):
        return False
    return True


def count_captions(wanted: Wanted, path: Path) -> int:
    """The number of captions in a file.

    Raises:
        InputError: if it is not one the split may have, or they cannot be read.
    """
    stat = path.stat()
    captions = lines_of(path, stat.st_mtime_ns, stat.st_size)
    if not captions or (wanted.sizes and captions not in [CAPTIONS * n for n in wanted.sizes]):
        expected = " or ".join(f"{CAPTIONS * n:,}" for n in wanted.sizes) or "one or more"
        raise InputError(f"{path}: expected {expected} captions, found {captions:,}")
    return captions


@functools.cache
def lines_of(path: Path, mtime_ns: int, size: int) -> int:
    """The number of captions, counted once for each state of the file: COCO's take a while."""
    return len(read_captions(path))


def captions_of(caps: Wanted) -> int | None:
    """The number of a split's captions, if they are there and right in themselves."""
    try:
        return count_captions(caps, caps.path)
    except (InputError, FileNotFoundError):
        return None


def count_images(wanted: Wanted, regions: Path, caps: Path, captions: int | None) -> int:
    """The number of images of an array that holds each once, or five times over as data.py takes.

    Raises:
        InputError: if it is not a number the split may have, or the captions do not fit.
    """
    array, sizes = RegionFile(regions), wanted.sizes
    images = array.num_rows
    undecided = captions is None and sizes and images not in sizes
    if (captions == images or undecided) and array.repeats():
        images //= REPEATED
    if sizes and images not in sizes:
        expected = " or ".join(f"{n:,}" for n in sizes)
        raise InputError(f"{regions}: expected {expected} images, found {images:,}")
    if captions is not None and (captions % images or (sizes and captions != CAPTIONS * images)):
        raise InputError(
            f"{caps}: {captions:,} captions do not fit the {images:,} images of {regions.name}"
        )
    return images


def check_ids(path: Path, counts: tuple[int, ...]) -> int:
    """The number of ids in a file, if it fits one of the counts of images (none: any number).

    Raises:
        InputError: if it fits none.
    """
    if not counts:
        ids = len(path.read_bytes().splitlines())
        if not ids:
            raise InputError(f"{path}: no ids in it")
        return ids
    refusals = []
    for n in counts:
        try:
            return len(read_ids(path, n))
        except InputError as error:
            refusals.append(error)
    raise refusals[-1]


class Status(NamedTuple):
    """A file here: `found` if it is whole, else why it is not (nothing: it is missing)."""

    wanted: Wanted
    found: Found | None
    wrong: str = ""


def status_of(wanted: Wanted, sums: Sums) -> Status:
    """How a file stands; with a checksum, all of it is read."""
    if not wanted.path.exists():
        return Status(wanted, None)
    try:
        found = inspect(wanted, wanted.path)
        sums.verify(wanted.key, wanted.path)
    except InputError as error:
        return Status(wanted, None, str(error))
    return Status(wanted, found)


def table(statuses: list[Status]) -> str:
    """One line a file, in the order of the splits."""
    rows = [("split", "file", "holds", "shape", "dtype", "size", "state")]
    by_split = {split: place for place, split in enumerate((*SPLITS, ""))}
    for wanted, found, wrong in sorted(statuses, key=lambda s: by_split[s.wanted.split]):
        path, part = wanted.path, part_of(wanted.path)
        state = "whole" if found else "missing" if wanted.required else "none (optional)"
        if not found and not wrong and part.is_file():
            state = f"missing, {amount(part.stat().st_size)} in {part.name}"
        rows.append((
            wanted.split or "–",
            str(path),
            f"{found.count:,} {found.unit}" if found else "–",
            str(found.shape) if found and found.shape else "–",
            (found.dtype if found else "") or "–",
            amount(path.stat().st_size) if path.exists() else "–",
            f"wrong: {wrong}" if wrong else state,
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def amount(n: float) -> str:
    """Bytes as people say them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}" if n < 10 * size else f"{n / size:.1f} {unit}"
    return f"{n:.0f} bytes"


# -- checksums -------------------------------------------------------------------------------------


class Sums:
    """SHA-256 by path, as sha256sum writes them: 64 hex digits, a blank, a blank or *, a path.

    Raises:
        InputError: if the file has another line, or none.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._by_path: dict[tuple[str, ...], str] = {}
        if file is None:
            return
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: not UTF-8: {error}") from error
        for number, line in enumerate(lines, start=1):
            match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](\S.*)", line.rstrip())
            if match:
                self._by_path[PurePosixPath(match[2]).parts] = match[1].lower()
            elif line.strip() and not line.startswith("#"):
                raise InputError(
                    f"{file}, line {number}: expected a SHA-256, two blanks and a name"
                )
        if not self._by_path:
            raise InputError(f"{file}: no SHA-256 in it")

    def of(self, key: str) -> str | None:
        """The sum of a file: of the path that has most of its last folders in common with `key`,
        where one is the end of the other."""
        parts = PurePosixPath(key).parts
        ends = [
            path
            for path in self._by_path
            if path[-len(parts) :] == parts or parts[-len(path) :] == path
        ]
        return self._by_path[max(ends, key=len)] if ends else None

    def verify(self, key: str, path: Path) -> None:
        """Raises an InputError if the sum of the file at `path` is known and is another."""
        known = self.of(key)
        if known is not None and digest(path, "sha256").hex() != known:
            raise InputError(f"{path}: its SHA-256 is not the {known[:12]}… that is known of {key}")


def digest(path: Path, algorithm: str) -> bytes:
    """A checksum of a file, read once."""
    summed = hashlib.new(algorithm, usedforsecurity=False)
    size = path.stat().st_size
    with path.open("rb") as file:
        chunks = iter(lambda: file.read(CHUNK), b"")
        for chunk in progress(chunks, -(-size // CHUNK), f"{algorithm} of {path.name}"):
            summed.update(chunk)
    return summed.digest()


# -- looking at the first bytes --------------------------------------------------------------------


def is_packed(head: bytes) -> bool:
    """Whether bytes begin as a .zip or a .gz does."""
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b"))


def refuse_page(head: bytes, what: str) -> None:
    """Raises an InputError for the HTML or XML that servers send with status 200."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:16].lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        title = re.search(rb"<title[^>]*>\s*([^<]{1,80})", head, re.IGNORECASE)
        said = f' ("{title[1].decode("utf-8", "replace").strip()}")' if title else ""
        raise InputError(f"a web page{said} instead of {what}")


def look_at_file(wanted: Wanted, head: bytes, replaced: Container[Path] = ()) -> int | None:
    """What the first bytes of a file say about its size; None: nothing.

    Args:
        replaced: as for `inspect`.

    Raises:
        InputError: if it cannot be the file that is wanted.
    """
    name = wanted.path.name
    refuse_page(head, name)
    if is_packed(head):
        return None  # Kaggle packs some files on their way; unpacked when it is here
    if wanted.kind == "ims":
        header = read_header(io.BytesIO(head), name)
        check_header(header, wanted.sizes, name)
        caps = wanted.partner("caps")
        captions = None if caps.path in replaced else captions_of(caps)
        if captions is not None and captions % header.shape[0]:
            raise InputError(
                f"{name}: {header.shape[0]:,} rows do not fit the {captions:,} captions of "
                f"{caps.path}"
            )
        return header.end
    if wanted.kind == "vocab" and not head.lstrip().startswith(b"{"):
        raise InputError(f"{name}: no JSON object")
    if not head or b"\0" in head:
        raise InputError(f"{name}: {'empty' if not head else 'binary data instead of text'}")
    return None


def look_at_archive(head: bytes) -> None:
    """Raises an InputError if the first bytes are those of no archive."""
    refuse_page(head, "an archive")
    if not is_packed(head) and head[257:262] != b"ustar":
        raise InputError("neither a .zip nor a .tar")


# -- fetching one file -----------------------------------------------------------------------------


class Link(NamedTuple):
    """Where a file can be had. `url` is asked before every attempt (signed ones expire), `name`
    stays the same."""

    name: str
    url: Callable[[], str]
    size: int = 0  # 0: not known before it is asked for


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def note_of(part: Path) -> Path:
    return part.with_name(part.name + ".json")


class Meter:
    """Bytes and rate: a bar on a terminal, a line every half minute elsewhere."""

    def __init__(self, what: str, done: int, total: int | None) -> None:
        self.what, self.done, self.total, self.bar = what, done, total, None
        self.start = self.said = time.monotonic()
        self.before = done
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=total, initial=done, desc=what, unit="B", unit_scale=True, leave=False
            )

    def add(self, n: int) -> None:
        self.done += n
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(n)
        elif now - self.said >= SAY_EVERY:
            self.said = now
            rate = (self.done - self.before) / max(now - self.start, 1e-6)
            of = f" of {amount(self.total)}" if self.total else ""
            print(f"{self.what}: {amount(self.done)}{of}, {amount(rate)}/s", file=sys.stderr)

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()


class Transfer:
    """A file on its way into `part`, in as many attempts as it takes.

    Beside it, `part`.json says what it is a part of: link, validator (the server's ETag or
    Last-Modified), size and MD5 where the server tells them. With those another attempt, or another
    run, asks for the rest only, and a file that has changed meanwhile is begun anew.

    Args:
        look: says the size of the whole file from its first bytes (None: they do not tell), and
            raises an InputError if this cannot be it.
        retries: attempts in a row that may bring nothing new.
    """

    def __init__(
        self, link: Link, part: Path, look: Callable[[bytes], int | None], retries: int
    ) -> None:
        self.link, self.part, self.look, self.retries = link, part, look, retries
        self.have = self.most = 0  # bytes that are here, and the most there have been
        self.answered = self.looked = self.ended = False
        self.forget()

    def run(self) -> None:
        """Raises Unavailable, with what has come kept if it may be of use."""
        self.part.parent.mkdir(parents=True, exist_ok=True)
        with self.part.open("ab+", buffering=0) as self.file:
            lock(self.file, self.part)
            self.recall()
            try:
                self.attempts()
                self.look_once()
                os.fsync(self.file.fileno())
                self.verify()
            except (Unavailable, LocalError) as error:
                if isinstance(error, Refused) or not self.file.seek(0, os.SEEK_END):
                    self.discard()
                raise

    def attempts(self) -> None:
        """Ask until all of it is here."""
        failures = 0
        while not self.whole():
            asked = None
            try:
                self.attempt()
                if self.whole():
                    return
                reason = f"the connection ended after {self.have:,} of {self.total:,} bytes"
            except TryAgain as error:
                reason, asked = str(error), error.wait
            except (OSError, http.client.HTTPException) as error:
                reason = why(error)
                if hopeless(error) and not self.answered:
                    raise Unreachable(f"{self.link.name}: {reason}") from error
            failures = 1 if self.have > self.most else failures + 1
            self.most = max(self.most, self.have)
            if failures > self.retries:
                kept = f"; {amount(self.have)} are kept in {self.part}" if self.have else ""
                kind = Unavailable if self.answered else Unreachable
                raise kind(f"{self.link.name}: {reason}; given up after attempt {failures}{kept}")
            wait = min(LONGEST_WAIT, 2 ** (failures - 1) if asked is None else asked)
            print(
                f"{self.link.name}: {reason}; retry {failures} of {self.retries} in {wait} s",
                file=sys.stderr,
            )
            time.sleep(wait)

    def attempt(self) -> None:
        """One request, for what is not here yet."""
        headers = {"User-Agent": AGENT}
        if self.have:
            headers["Range"] = f"bytes={self.have}-"
            if self.validator:
                headers["If-Range"] = self.validator
        try:
            response = urlopen(Request(self.link.url(), headers=headers), timeout=TIMEOUT)
        except HTTPError as error:
            self.answered = True
            with error:
                self.answer_to(error)
            return
        self.answered = True
        with response:
            self.take(response)

    def answer_to(self, error: HTTPError) -> None:
        said = f"{error.code} {error.reason}".strip()
        if error.code == 416 and self.have:  # there is nothing after what is here
            end = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range") or "")
            if end and int(end[1]) == self.have and self.total in (None, self.have):
                self.total = self.have
                return
            self.restart()
            raise TryAgain("what was here is not a part of it")
        if error.code in BUSY:
            asked = error.headers.get("Retry-After") or ""
            raise TryAgain(said, int(asked) if asked.isdecimal() else None)
        kind = NotThere if error.code in NOT_THERE else Unavailable
        raise kind(f"{self.link.name}: {said}")

    def take(self, response: http.client.HTTPResponse) -> None:
        """Write the body behind what is here, or from the start if that is what was sent."""
        headers = response.headers
        if headers.get("Content-Encoding", "identity") != "identity":
            raise Refused(f"{self.link.name}: sent as {headers['Content-Encoding']}, unasked")
        length = headers.get("Content-Length") or ""
        total = int(length) if length.isdecimal() else None
        validator = validator_of(headers)
        if response.status == 206 and self.have:
            span = re.fullmatch(
                r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""), re.IGNORECASE
            )
            same = span and int(span[1]) == self.have and self.total in (None, int(span[2]))
            if not same or (self.validator and validator and self.validator != validator):
                self.restart()
                raise TryAgain("it has changed, or another part was sent: begun anew")
            total = int(span[2])
        elif response.status == 200:
            if self.have:
                print(f"{self.link.name}: sent from the start again", file=sys.stderr)
                self.restart()
        else:
            raise Unavailable(f"{self.link.name}: unexpected status {response.status}")
        self.total, self.validator, self.md5 = total, validator, md5_of(headers) or self.md5
        room_for(self.part, (total or 0) - self.have)
        self.remember()
        with Meter(self.part.name.removesuffix(".part"), self.have, total) as meter:
            while chunk := response.read1(CHUNK):
                write_all(self.file, chunk, self.part)
                self.have += len(chunk)
                meter.add(len(chunk))
                if self.have >= HEAD:
                    self.look_once()
                if self.total is not None and self.have > self.total:
                    raise Refused(f"{self.link.name}: longer than the {self.total:,} bytes it said")
        self.ended = total is None
        if self.ended:
            self.look_once()  # only its own header can tell whether this was all of it

    def whole(self) -> bool:
        return self.ended if self.total is None else self.have == self.total

    def look_once(self) -> None:
        """Look at the first bytes, and hold the size that they tell against the server's."""
        if self.looked:
            return
        self.file.seek(0)
        try:
            size = self.look(self.file.read(HEAD))
        except InputError as error:
            raise Refused(f"{self.link.name}: {error}") from error
        if size is not None and self.total not in (None, size):
            raise Refused(
                f"{self.link.name}: {self.total:,} bytes, but its header is of {size:,} bytes"
            )
        self.total = self.total if size is None else size
        self.looked = True

    def verify(self) -> None:
        if self.md5 and digest(self.part, "md5") != base64.b64decode(self.md5):
            raise Refused(f"{self.link.name}: damaged on its way (its MD5 is not what was said)")

    # What is known of the part.

    def forget(self) -> None:
        self.total: int | None = None
        self.validator = self.md5 = ""

    def remember(self) -> None:
        note = {"link": self.link.name, "validator": self.validator, "size": self.total}
        text = json.dumps(note | {"md5": self.md5})
        try:
            note_of(self.part).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise LocalError(f"{note_of(self.part)}: {error.strerror}") from error

    def recall(self) -> None:
        """What the last run left, if it is of this link; else nothing."""
        self.have = self.most = self.file.seek(0, os.SEEK_END)
        try:
            note = json.loads(note_of(self.part).read_text(encoding="utf-8"))
            size = note["size"]
            ours = note["link"] == self.link.name and self.have <= (
                self.have if size is None else size
            )
            self.validator, self.total, self.md5 = str(note["validator"]), size, str(note["md5"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            ours = False  # the note is missing or torn: without it no part can be trusted
        if self.have and ours:
            print(f"{self.link.name}: going on after {amount(self.have)}", file=sys.stderr)
        else:
            self.restart()
            self.most = 0

    def restart(self) -> None:
        self.file.truncate(0)
        self.have, self.looked, self.ended = 0, False, False
        self.forget()

    def discard(self) -> None:
        note_of(self.part).unlink(missing_ok=True)
        self.part.unlink(missing_ok=True)


def validator_of(headers: http.client.HTTPMessage) -> str:
    """What If-Range may hold: a strong ETag, or else the date."""
    etag = headers.get("ETag") or ""
    return etag if etag.startswith('"') else headers.get("Last-Modified") or ""


def md5_of(headers: http.client.HTTPMessage) -> str:
    """The MD5 of the whole file (base64) as Google's storage tells it, where Kaggle's files lie."""
    said = ",".join(headers.get_all("x-goog-hash") or [])
    match = re.search(r"md5=([A-Za-z0-9+/]{22}==)", said)
    return match[1] if match else ""


def why(error: Exception) -> str:
    """The reason that an error of the network gives, in a line."""
    reason = getattr(error, "reason", None) or error
    return " ".join(str(reason).split()) or type(reason).__name__


def hopeless(error: Exception) -> bool:
    """Whether another attempt would end the same way: no such host, or one that is not trusted."""
    reason = getattr(error, "reason", error)
    return isinstance(reason, socket.gaierror | ssl.SSLCertVerificationError)


def lock(file: BinaryIO, path: Path) -> None:
    """Hold the file against another download into the same folder, where the system can."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LocalError(f"{path}: another download is writing here; wait for it to end") from None


def write_all(file: BinaryIO, chunk: bytes, path: Path) -> None:
    """Write to an unbuffered file; a full disk is no fault of the source."""
    view = memoryview(chunk)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        raise LocalError(f"{path}: {error.strerror}; make room and start this again") from error


def room_for(path: Path, size: int) -> None:
    """Raises a LocalError if the disk of `path` has not so many bytes left."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if size > free:
        raise LocalError(f"{path}: {amount(size)} needed, {amount(free)} free on its disk")


# -- archives --------------------------------------------------------------------------------------


def belongs(name: str, wanted: Wanted) -> bool:
    """Whether a path in some collection is that of the wanted file, at whatever depth."""
    parts, own = PurePosixPath(name.replace("\\", "/")).parts, PurePosixPath(wanted.key).parts
    return parts[-1:] == own[-1:] if wanted.kind == "vocab" else parts[-2:] == own


def members(archive: Path) -> Iterator[tuple[str, int, Callable[[], BinaryIO]]]:
    """The regular files of a .zip or .tar: path, size, and how to open it, in their order.

    Whoever goes through all of them has had all checksums of the archive checked.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                for info in packed.infolist():
                    if not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16):
                        yield info.filename, info.file_size, lambda info=info: packed.open(info)
        else:
            with tarfile.open(archive) as packed:
                for member in packed:
                    if member.isreg():
                        yield member.name, member.size, lambda m=member: packed.extractfile(m)
                while packed.fileobj.read(CHUNK):
                    pass  # a .gz has its only checksum at its end
    except FileNotFoundError:
        raise InputError(f"{archive}: no such archive") from None
    except Exception as error:  # whatever the parsers say of bytes that are no archive
        raise Refused(f"{archive}: damaged, or no archive: {why(error)}") from error


def unpack(archive: Path, wanted: list[Wanted], finish: Callable[[Wanted, Path], None]) -> None:
    """Write the wanted members to temporary files beside their places, then hand them to `finish`,
    in the order in which they are wanted.

    Only names choose a member; where it goes does not depend on the archive. A file that lies in no
    folder is taken by its name alone.

    Raises:
        Refused: if the archive is damaged, or a member is not what its name says.
    """
    here = {w: w.path.with_name(w.path.name + ".tmp") for w in wanted}
    left, come = list(wanted), {}
    try:
        for name, size, opened in members(archive):
            bare = name.removeprefix("./")
            hit = next((w for w in left if belongs(name, w) or bare == w.path.name), None)
            if hit is None:
                continue
            left.remove(hit)
            come[hit] = name
            unpack_one(archive, name, size, opened, hit, here[hit], {w.path for w in here})
        for one in [w for w in wanted if w in come]:
            try:
                finish(one, here[one])
            except InputError as error:
                raise Refused(f"{archive}, {come[one]}: {error}") from error
    finally:
        for temporary in here.values():
            temporary.unlink(missing_ok=True)


def unpack_one(
    archive: Path,
    name: str,
    size: int,
    opened: Callable[[], BinaryIO],
    wanted: Wanted,
    path: Path,
    replaced: Container[Path],
) -> None:
    """Write one member, `name`, to `path`, as long as it looks like the file that is wanted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    room_for(path, size)
    with path.open("wb", buffering=0) as file, Meter(wanted.path.name, 0, size) as meter:
        for chunk in contents(archive, name, opened):
            if not meter.done:
                try:
                    said = look_at_file(wanted, chunk, replaced)
                except InputError as error:
                    raise Refused(f"{archive}, {name}: {error}") from error
                if said not in (None, size):
                    raise Refused(f"{archive}, {name}: {size:,} bytes, its header says {said:,}")
            write_all(file, chunk, path)
            meter.add(len(chunk))
        os.fsync(file.fileno())


def contents(archive: Path, name: str, opened: Callable[[], BinaryIO]) -> Iterator[bytes]:
    """A member, a chunk at a time; what is wrong with it is told from what is wrong here."""
    try:
        with opened() as stream:
            while chunk := stream.read(CHUNK):
                yield chunk
    except Exception as error:  # whatever the parsers say: CRC, passwords, unknown methods, …
        raise Refused(f"{archive}, {name}: damaged: {why(error)}") from error


# -- sources ---------------------------------------------------------------------------------------


@dataclass
class Source:
    """Somewhere to fetch from: links for a file, the most likely first, and archives."""

    name: str
    links: Callable[[Wanted], list[Link]] = lambda wanted: []
    archives: list[Link | Path] = field(default_factory=list)
    sums: Sums = field(default_factory=Sums)


def is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVES)


def below(base: str, key: str) -> str:
    """The URL of a file below a folder's URL."""
    parts = urlsplit(base)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{quote(key)}").geturl()


def check_url(url: str) -> str | Path:
    """An http(s) URL, or a local archive's path.

    Raises:
        InputError: for anything else.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # where urlsplit finds a port that is no number
    except ValueError as error:
        raise InputError(f"--url {url}: {error}") from error
    if parts.scheme in ("http", "https"):
        if not host or not url.isascii() or re.search(r"[\s\x00-\x1f\x7f]", url):
            raise InputError(f"--url {url}: not a URL; blanks and other signs are written as %20 …")
        if parts.username is not None:
            raise InputError(f"--url …@{host}: a name and password in a URL are not understood")
        return url
    path = Path(unquote(parts.path) if parts.scheme == "file" else url).expanduser()
    if "://" in url and parts.scheme != "file":
        raise InputError(f"--url {url}: expected http://, https:// or an archive on this disk")
    if not path.is_file() or not is_archive(path.name):
        found = "is a folder" if path.is_dir() else "is none" if path.is_file() else "no such file"
        raise InputError(
            f"--url {url}: {found}; expected http://…, https://… or an archive on this disk "
            f"({' '.join(ARCHIVES)})"
        )
    return path


def link_to(url: str) -> Link:
    """A link whose name leaves out the query: the key in it may be another one in the next run."""
    return Link(urlsplit(url)._replace(query="", fragment="").geturl(), lambda: url)


def source_at(url: str | Path, data_path: Path, retries: int) -> Source:
    """A source that the user named."""
    if isinstance(url, Path):
        return Source(str(url), archives=[url])
    link, parts = link_to(url), urlsplit(url)
    if is_archive(parts.path):
        folder = parts._replace(path=parts.path.rpartition("/")[0]).geturl()
        return Source(link.name, archives=[link], sums=fetch_sums(folder, data_path, retries))

    def links(wanted: Wanted) -> list[Link]:
        keys = [wanted.key] + [wanted.path.name] * (wanted.kind == "vocab")
        return [link_to(below(url, key)) for key in keys]

    return Source(link.name, links, sums=fetch_sums(url, data_path, retries))


def fetch_sums(base: str, data_path: Path, retries: int) -> Sums:
    """The SHA256SUMS of a folder; none if it has none."""
    link, part = link_to(below(base, "SHA256SUMS")), data_path / ".SHA256SUMS.part"

    def look(head: bytes) -> None:
        refuse_page(head, "SHA256SUMS")

    try:
        Transfer(link, part, look, retries).run()
        return Sums(part)
    except Unreachable:
        raise
    except Unavailable:
        return Sums()  # it has none; some servers have a page of their own to say so
    except LocalError:
        raise
    except InputError as error:
        print(f"warning: {link.name} is not used: {error}", file=sys.stderr)
        return Sums()
    finally:
        note_of(part).unlink(missing_ok=True)
        part.unlink(missing_ok=True)


class Kaggle:
    """What is needed of Kaggle's own client: the names of the files, and where one can be fetched.

    Raises:
        InputError: if kagglesdk is not installed, or too old.
    """

    def __init__(self, data_name: str) -> None:
        try:
            from kagglesdk import KaggleClient
            from kagglesdk.datasets.types import dataset_api_service as types
        except ImportError as error:
            raise InputError(
                f"{data_name} lies on Kaggle, and kagglesdk is not installed ({error}): "
                f"pip install -U kagglesdk, {BY_HAND}"
            ) from error
        self._types = types
        try:
            self._api = KaggleClient().datasets.dataset_api_client
        except Exception as error:  # whatever it says of its settings and credentials
            raise Unreachable(f"Kaggle's client: {why(error)}") from error

    def files(self) -> dict[str, int]:
        """{path: bytes} of all files.

        Raises:
            Unreachable: if Kaggle does not tell.
        """
        request = self._types.ApiListDatasetFilesRequest()
        request.owner_slug, request.dataset_slug = KAGGLE
        request.page_size = 200
        sizes: dict[str, int] = {}
        while True:
            try:
                page = self._api.list_dataset_files(request)
            except Exception as error:  # whatever the client and its own libraries raise
                raise Unreachable(f"Kaggle does not list its files: {why(error)}") from error
            if page.error_message:
                raise Unreachable(f"Kaggle does not list its files: {page.error_message}")
            sizes |= {file.name: file.total_bytes for file in page.dataset_files}
            if not page.next_page_token:
                return sizes
            request.page_token = page.next_page_token

    def url(self, name: str) -> str:
        """Kaggle redirects to its store: a signed URL, good for some hours.

        Raises:
            Unavailable, TryAgain: if it does not.
        """
        request = self._types.ApiDownloadDatasetRequest()
        request.owner_slug, request.dataset_slug = KAGGLE
        request.file_name = name
        try:
            with self._api.download_dataset(request) as response:
                return response.url
        except Exception as error:  # whatever the client and its own libraries raise
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status is None or status in BUSY:
                raise TryAgain(f"Kaggle: {why(error)}") from error
            raise Unavailable(f"Kaggle, {name}: {why(error)}") from error


def source_on_kaggle(data_name: str) -> Source:
    """Kaggle's copy, by the names that it lists: single files where there are any, else archives,
    those of other data sets left out and those of this one first."""
    kaggle = Kaggle(data_name)
    sizes = kaggle.files()

    def link(name: str) -> Link:
        return Link(f"kaggle:{'/'.join(KAGGLE)}/{name}", lambda: kaggle.url(name), sizes[name])

    def links(wanted: Wanted) -> list[Link]:
        names = [name for name in sizes if belongs(name, wanted)]
        return [link(name) for name in sorted(names, key=lambda name: name.count("/"))]

    short = data_name.partition("_")[0]
    others = {name.partition("_")[0] for name in IMAGES} - {short}
    archives = [
        name
        for name in sizes
        if is_archive(name) and (short in name or not any(other in name for other in others))
    ]
    archives.sort(key=lambda name: (short not in name, sizes[name]))
    return Source("/".join(("Kaggle", *KAGGLE)), links, [link(name) for name in archives])


# -- all of it -------------------------------------------------------------------------------------


class Download:
    """What is still missing, and why each source that was asked could not give it."""

    def __init__(self, missing: list[Wanted], data_path: Path, sums: Sums, retries: int) -> None:
        self.missing, self.data_path, self.sums, self.retries = missing, data_path, sums, retries
        self.reasons: dict[str, list[str]] = {wanted.key: [] for wanted in missing}

    def required(self) -> list[Wanted]:
        return [wanted for wanted in self.missing if wanted.required]

    def ask(self, sources: Iterable[Callable[[], Source]]) -> None:
        """Fetch what is missing from the first source that has it.

        Raises:
            InputError: when a file that is needed can be had from none of them.
        """
        sources = list(sources)
        for place, source in enumerate(sources, start=1):
            if not self.missing:
                break
            last = place == len(sources)
            try:
                self.ask_one(source(), last)
            except Unavailable as error:
                for wanted in self.missing:
                    self.reasons[wanted.key].append(str(error))
        if self.required():
            raise self.failure()

    def ask_one(self, source: Source, last: bool) -> None:
        absent = [w for w in self.required() if not source.links(w) and not source.archives]
        for wanted in absent:
            self.reasons[wanted.key].append(f"{source.name} has no {wanted.key}")
        if absent and last:
            return
        self.room_for_all(source)
        for wanted in list(self.missing):
            for link in source.links(wanted):
                try:
                    self.fetch(wanted, link, source)
                    break
                except Unreachable:
                    raise
                except Unavailable as error:
                    self.reasons[wanted.key].append(str(error))
                    if not wanted.required and not isinstance(error, NotThere):
                        print(f"warning: {wanted.path.name} left out: {error}", file=sys.stderr)
            if last and not source.archives and wanted in self.required():
                return
        for archive in source.archives:
            if not self.missing:
                break
            self.fetch_archive(archive, source)
        if source.archives:
            for wanted in self.required():
                self.reasons[wanted.key].append(f"{source.name} has no {wanted.key}")

    def room_for_all(self, source: Source) -> None:
        """Raises a LocalError if the disk is too small for what a source will send, as far as its
        sizes are known before."""
        need = 0
        for wanted in self.missing:
            part = part_of(wanted.path)
            size = sum(link.size for link in source.links(wanted)[:1])
            need += max(0, size - (part.stat().st_size if part.is_file() else 0))
        room_for(self.data_path, need)

    def fetch(self, wanted: Wanted, link: Link, source: Source) -> None:
        def look(head: bytes) -> int | None:
            return look_at_file(wanted, head, {other.path for other in self.missing})

        part = part_of(wanted.path)
        transfer = Transfer(link, part, look, self.retries)
        transfer.run()
        try:
            with part.open("rb") as file:
                packed = is_packed(file.read(8))
            if packed:
                unpack(part, [wanted], lambda w, path: self.keep(w, path, source))
                if wanted in self.missing:
                    raise Refused(f"{link.name}: an archive without {wanted.path.name}")
            else:
                self.keep(wanted, part, source)
        except LocalError:
            raise
        except (InputError, Refused) as error:
            transfer.discard()
            raise Refused(f"{link.name}: {error}") from error
        transfer.discard()

    def fetch_archive(self, archive: Link | Path, source: Source) -> None:
        def finish(wanted: Wanted, path: Path) -> None:
            self.keep(wanted, path, source)

        if isinstance(archive, Path):
            unpack(archive, self.missing, finish)
            return
        name = PurePosixPath(urlsplit(archive.name).path).name
        part = part_of(self.data_path / name)
        transfer = Transfer(archive, part, look_at_archive, self.retries)
        transfer.run()
        try:
            for sums in (self.sums, source.sums):
                sums.verify(name, part)
            unpack(part, self.missing, finish)
        except LocalError:
            raise
        except (InputError, Refused) as error:
            transfer.discard()
            raise Refused(f"{archive.name}: {error}") from error
        transfer.discard()

    def keep(self, wanted: Wanted, path: Path, source: Source) -> None:
        """Put a file that has come into its place, if it is whole."""
        inspect(wanted, path, {other.path for other in self.missing})
        for sums in (self.sums, source.sums):
            sums.verify(wanted.key, path)
        size = path.stat().st_size
        os.replace(path, wanted.path)
        self.missing.remove(wanted)
        print(f"{wanted.path}: {amount(size)} from {source.name}", flush=True)

    def failure(self) -> InputError:
        """What to say of the files that no source could give."""
        blamed = [wanted for wanted in self.required() if self.reasons[wanted.key]]
        first = max(blamed, key=lambda wanted: len(self.reasons[wanted.key]))
        files = f"{first.path}" + f" and {len(blamed) - 1} other files" * (len(blamed) > 1)
        reasons = "; ".join(dict.fromkeys(self.reasons[first.key]))  # each once, in their order
        alone = first.kind == "vocab" and len(blamed) == 1
        builds = "; python vocab.py builds one from the captions" * alone
        return InputError(f"{files}: not fetched: {reasons}{builds}")


def run(opt: argparse.Namespace) -> None:
    data_path, vocab_path = Path(opt.data_path), Path(opt.vocab_path)
    files = wanted_files(data_path, vocab_path, opt.data_name, opt.splits)
    urls = [check_url(url) for url in opt.url]
    sums = Sums(opt.sha256)
    if not urls and opt.data_name not in IMAGES and not opt.check:
        raise InputError(
            f"--data_name {opt.data_name}: Kaggle has {' and '.join(IMAGES)}; for another, name "
            "its source with --url"
        )
    statuses = [status_of(wanted, sums) for wanted in files]
    wrong = [status.wrong for status in statuses if status.wrong]
    missing = [status.wanted for status in statuses if not status.found]
    whole = not wrong and not any(wanted.required for wanted in missing)
    if opt.check:
        print(table(statuses))
        sys.exit(0 if whole else 1)
    if wrong and not opt.overwrite:
        raise InputError(f"{wrong[0]}; --overwrite fetches it anew")
    if not whole:
        download = Download(missing, data_path, sums, opt.retries)
        if urls:
            download.ask([lambda url=url: source_at(url, data_path, opt.retries) for url in urls])
        else:
            ask_kaggle(download, opt.data_name)
        statuses = [status_of(wanted, Sums()) for wanted in files]
    still_wrong = [status.wrong for status in statuses if status.wrong]
    if still_wrong:
        raise InputError(f"{still_wrong[0]}; no source has a better one")
    print(table(statuses))


def ask_kaggle(download: Download, data_name: str) -> None:
    try:
        download.ask([lambda: source_on_kaggle(data_name)])
    except LocalError:
        raise
    except InputError as error:
        if BY_HAND in str(error):
            raise
        raise InputError(f"{error}; try again, {BY_HAND}") from error


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data_name", default="f30k_precomp", help=f"{', '.join(IMAGES)}, or another with --url")
    add("--data_path", default="./data", help="folder of the data sets")
    add("--vocab_path", default="./vocab", help="folder of the vocabularies")
    add("--splits", default=None, nargs="+", choices=SPLITS, help="None = all of the data set")
    add("--url", default=[], action="append", help="folder or archive to fetch from; repeatable")
    add("--sha256", default=None, type=Path, metavar="FILE", help="checksums, as of sha256sum")
    add("--retries", default=5, type=at_least(0), help="attempts in a row that may bring nothing")
    add("--overwrite", default=False, action="store_true", help="replace files that are wrong")
    add("--check", default=False, action="store_true", help="only look; exit 1 if not whole")
    return parser


@one_line
def main() -> None:
    run(options().parse_args())


if __name__ == "__main__":
    main()
