"""scripts/download_data.py: each source with its library replaced at the boundary; the checks."""

import io
import os
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import download_data
import numpy as np
import pytest
from conftest import call, contents, refused, succeeded, write_split

from vocab import Vocabulary

NAME = "f30k_precomp"
VOCAB = Vocabulary(["<pad>", "<start>", "<end>", "<unk>"])


def run(*arguments):
    return call(".", download_data.main, *arguments)


def files_in(folder):
    return {name: data for name, data in contents(folder).items() if data is not True}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def pack(files, path):
    """Write an archive of the kind that its name says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz") as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def npy(*shape):
    np.save(file := io.BytesIO(), np.ones(shape, np.float32))
    return file.getvalue()


@pytest.fixture
def source(tmp_path, monkeypatch):
    """The files of a small F30K: {path: content}; dev has each image five times, as older files."""
    monkeypatch.setitem(download_data.IMAGES, NAME, {"train": [6], "dev": [4], "test": [3]})
    monkeypatch.setattr(download_data, "REGIONS", (6, 8))
    for split, (n,) in download_data.IMAGES[NAME].items():
        write_split(tmp_path / "source/data" / NAME, split, n, repeat=5 if split == "dev" else 1)
    VOCAB.save(tmp_path / f"source/vocab/{NAME}_vocab.json")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
    return files_in(tmp_path / "source")


@pytest.fixture
def fetched(source, monkeypatch):
    """What kagglehub is asked for. Kaggle lists these files and another, on two pages."""
    kagglehub, fetched = pytest.importorskip("kagglehub"), []
    from kagglesdk.datasets.services.dataset_api_service import DatasetApiClient

    files = [SimpleNamespace(name=name) for name in [*source, "coco_precomp/dev_ims.npy"]]
    pages = {"": (files[:5], "page 2"), "page 2": (files[5:], "")}

    def list_dataset_files(self, request):
        assert (request.owner_slug, request.dataset_slug) == ("kuanghueilee", "scan-features")
        files, more = pages[request.page_token]
        return SimpleNamespace(dataset_files=files, next_page_token=more)

    def dataset_download(handle, path):
        fetched.append(path)
        return str(write(Path(os.environ["KAGGLEHUB_CACHE"], path), source[path]))

    monkeypatch.setattr(DatasetApiClient, "list_dataset_files", list_dataset_files)
    monkeypatch.setattr(kagglehub, "dataset_download", dataset_download)
    return fetched


def test_kaggle_fetches_what_is_missing_and_nothing_twice(source, fetched, monkeypatch):
    monkeypatch.delenv("KAGGLEHUB_CACHE")  # files arrive beside the data set instead
    printed = succeeded(run("--splits", "dev", "test"))
    assert "dev      fetched  4 images (20, 6, 8), 20 captions" in printed
    assert files_in(".") == {k: v for k, v in source.items() if "train" not in k}
    succeeded(run())
    assert files_in(".") == source and sorted(fetched) == sorted(source)
    Path(fetched[-1]).unlink()
    succeeded(run())
    assert fetched[-2] == fetched[-1] and len(fetched) == len(source) + 1
    printed = succeeded(run())
    assert printed.count(" there ") == 4 and " fetched " not in printed
    assert succeeded(run("--check")) == printed and len(fetched) == len(source) + 1


def test_gdrive_fetches_what_is_missing(source, monkeypatch):
    gdown = pytest.importorskip("gdown")
    listed = [SimpleNamespace(id=path, path=path) for path in source]

    def download(id, output, **options):
        return str(write(Path(output, Path(id).name), source[id]))

    monkeypatch.setattr(gdown, "download_folder", Mock(return_value=listed))
    monkeypatch.setattr(gdown, "download", download)
    succeeded(run("--gdrive", "URL"))
    assert files_in(".") == source


@pytest.mark.parametrize("library, function, options", [
    ("kagglehub", "kagglesdk.KaggleClient", []),
    ("gdown", "gdown.download_folder", ["--gdrive", "https://drive.google.com/drive/folders/x"]),
])  # fmt: skip
def test_library_errors_are_one_line(source, monkeypatch, library, function, options):
    pytest.importorskip(library)
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers there
    assert f"error: {library}: HTTPSConnectionPool" in run(*options).stderr
    monkeypatch.setattr(function, Mock(side_effect=Exception("401:\nlog in")))
    refused(run(*options), f"error: {library}: 401: log in; run this again")
    monkeypatch.setitem(sys.modules, library, None)
    refused(run(*options), f"pip install {library}", "--archive FILE")
    assert files_in(".") == {}


@pytest.mark.parametrize("kind", [".zip", ".tgz"])
@pytest.mark.parametrize("pattern", ["{path}", "./some/f30k_precomp/{name}", "{name}"])
def test_archives_are_unpacked_by_name_and_ids_are_optional(source, tmp_path, kind, pattern):
    del source[f"data/{NAME}/dev_ids.txt"]
    files = {pattern.format(path=k, name=Path(k).name): v for k, v in source.items()}
    vocab = {k: files.pop(k) for k in list(files) if "vocab" in k}
    files["coco_precomp/dev_ims.npy"] = b"of another data set"
    archives = [pack(files, tmp_path / f"data{kind}"), pack(vocab, tmp_path / f"vocab{kind}")]
    result = run("--archive", archives[0])
    assert "vocab missing: f30k_precomp_vocab.json" in result.stderr
    assert result.returncode == 2 and result.stdout.count(" fetched ") == 3  # the rest is in place
    succeeded(run("--archive", *archives))
    assert files_in(".") == source


@pytest.mark.parametrize("kind", [".zip", ".tgz"])
def test_archives_write_where_they_should_or_are_refused(source, tmp_path, kind):
    archive = tmp_path / f"a{kind}"
    refused(run("--archive", archive), f"No such file or directory: '{archive}'")
    content = pack(source, archive).read_bytes()
    for damaged in (content[: len(content) // 2], b"<html>"):
        write(archive, damaged)
        assert f"error: {archive}: not a whole .zip or .tar" in run("--archive", archive).stderr
    assert not Path("data", NAME).exists()
    name = f"data/{NAME}/dev_ims.npy"
    outside = {"/f30k_precomp/x.npy": b"x", f"../../{NAME}/dev_ims.npy": source.pop(name)}
    succeeded(run("--archive", pack(source | outside, archive)))
    assert files_in(".") == source | {name: outside.popitem()[1]}
    assert {path.name for path in tmp_path.iterdir()} == {"source", "here", archive.name}


@pytest.mark.parametrize("file, content, words", [
    ("dev_ims.npy", npy(4, 6, 8)[:-8], "dev_ims.npy: not a readable .npy array"),
    ("dev_ims.npy", npy(3, 6, 8), "expected (4, 6, 8) and 20 captions, found (3, 6, 8)"),
    ("dev_caps.txt", b"a dog\n" * 19, "found (20, 6, 8) and 19"),
    ("dev_caps.txt", b"a dog\n" * 19 + b"\xff", "line 20: not UTF-8"),
    ("dev_ids.txt", b"1\n2\n3\n", "3 ids do not fit 4 images"),
    (f"{NAME}_vocab.json", b"{", "not SCAN's"),
])  # fmt: skip
def test_what_is_wrong_is_not_placed_and_not_replaced(source, tmp_path, file, content, words):
    name = next(name for name in source if name.endswith(file))
    result = run("--archive", pack(source | {name: content}, tmp_path / "bad.zip"))
    assert result.returncode == 2 and words in result.stderr
    assert result.stdout.count(" fetched ") == 3 and not Path(name).exists()
    good = pack(source, tmp_path / "good.zip")
    succeeded(run("--archive", good))
    assert files_in(".") == source
    write(Path(name), content)
    checked = run("--check")
    assert checked.returncode == 1 and checked.stdout.count(" wrong ") == 1
    assert words in checked.stdout
    refused(run("--archive", good), words)
    assert Path(name).read_bytes() == content


def test_another_disk_gets_a_whole_copy_or_none(source, fetched, monkeypatch, tmp_path):
    def copy(file, target):
        target.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", Mock(side_effect=OSError("Invalid cross-device link")))
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "copyfileobj", copy)
        assert run().returncode == 130 and files_in(".") == {}
    succeeded(run())
    assert files_in(".") == files_in(tmp_path / "cache") == source


def test_a_split_that_the_data_set_does_not_have(source):
    refused(run("--splits", "testall"), "--splits testall: f30k_precomp has train, dev, test")
