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
from conftest import write_split

from vocab import Vocabulary

NAME = "f30k_precomp"
VOCAB = Vocabulary(["<pad>", "<start>", "<end>", "<unk>"])


def files_in(folder):
    """{path below the folder: content}"""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def pack(files, path):
    """Write an archive of the kind that its name says."""
    is_zip = path.suffix == ".zip"
    with zipfile.ZipFile(path, "w") if is_zip else tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            if is_zip:
                archive.writestr(name, content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def npy(*shape):
    np.save(file := io.BytesIO(), np.ones(shape, np.float32))
    return file.getvalue()


@pytest.fixture
def source(tmp_path, monkeypatch):
    """The files of a small F30K: {path: content}. The working folder is an empty one."""
    monkeypatch.setitem(download_data.IMAGES, NAME, {"train": [6], "dev": [4], "test": [3]})
    monkeypatch.setattr(download_data, "REGIONS", (6, 8))
    for split, (n,) in download_data.IMAGES[NAME].items():
        write_split(tmp_path / "source/data" / NAME, split, n)
    VOCAB.save(tmp_path / f"source/vocab/{NAME}_vocab.json")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
    return files_in(tmp_path / "source")


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        """The command as typed: exit status, standard output, last line of standard error."""
        monkeypatch.setattr(sys, "argv", ["download_data.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            sys.exit(download_data.main())
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, (err.splitlines() or [""])[-1]

    return run


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


def test_kaggle_fetches_what_is_missing_and_nothing_twice(source, fetched, run, monkeypatch):
    monkeypatch.delenv("KAGGLEHUB_CACHE")  # files arrive beside the data set instead
    status, out, _ = run("--splits", "dev", "test")
    assert status == 0 and "dev      fetched  4 images (4, 6, 8), 20 captions" in out
    assert files_in(".") == {k: v for k, v in source.items() if "train" not in k}
    assert run()[0] == 0 and files_in(".") == source
    assert sorted(fetched) == sorted(source)
    Path(fetched[-1]).unlink()
    assert run()[0] == 0 and fetched[-2] == fetched[-1] and len(fetched) == len(source) + 1
    status, out, _ = run()
    assert status == 0 and out.count(" there ") == 4 and " fetched " not in out
    assert run("--check") == (0, out, "") and len(fetched) == len(source) + 1


def test_gdrive_fetches_what_is_missing(source, run, monkeypatch):
    gdown = pytest.importorskip("gdown")
    listed = [SimpleNamespace(id=f"id{i}", path=path) for i, path in enumerate(source)]
    paths = {file.id: Path(file.path) for file in listed}

    def download(id, output, **options):
        return str(write(Path(output, paths[id].name), source[paths[id].as_posix()]))

    monkeypatch.setattr(gdown, "download_folder", Mock(return_value=listed))
    monkeypatch.setattr(gdown, "download", download)
    assert run("--gdrive", "URL")[0] == 0 and files_in(".") == source


@pytest.mark.parametrize(
    ("library", "call", "options"),
    [
        ("kagglehub", "kagglesdk.KaggleClient", []),
        ("gdown", "gdown.download_folder", ["--gdrive", "https://drive.google.com/drive/folders/x"]),
    ],
)
def test_library_errors_are_one_line(source, run, monkeypatch, library, call, options):
    pytest.importorskip(library)
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers there
    assert run(*options)[2].startswith(f"error: {library}: HTTPSConnectionPool")
    monkeypatch.setattr(call, Mock(side_effect=Exception("401:\nlog in")))
    status, _, line = run(*options)
    assert status == 2 and line.startswith(f"error: {library}: 401: log in; run this again")
    monkeypatch.setitem(sys.modules, library, None)
    status, _, line = run(*options)
    assert status == 2 and f"pip install {library}" in line and "--archive FILE" in line
    assert files_in(".") == {}


@pytest.mark.parametrize("kind", [".zip", ".tgz"])
@pytest.mark.parametrize("pattern", ["{path}", "./some/f30k_precomp/{name}", "{name}"])
def test_archives_are_unpacked_by_name_and_ids_are_optional(source, run, tmp_path, kind, pattern):
    del source[f"data/{NAME}/dev_ids.txt"]
    files = {pattern.format(path=k, name=Path(k).name): v for k, v in source.items()}
    vocab = {k: files.pop(k) for k in list(files) if "vocab" in k}
    files["coco_precomp/dev_ims.npy"] = b"of another data set"
    archives = [pack(files, tmp_path / f"data{kind}"), pack(vocab, tmp_path / f"vocab{kind}")]
    status, out, line = run("--archive", archives[0])
    assert status == 2 and "vocab missing: f30k_precomp_vocab.json" in line
    assert out.count(" fetched ") == 3  # the rest is in place
    assert run("--archive", *archives)[0] == 0 and files_in(".") == source


@pytest.mark.parametrize("kind", [".zip", ".tgz"])
def test_bad_archives_are_refused(source, run, tmp_path, kind):
    archive = tmp_path / f"a{kind}"
    assert run("--archive", archive)[2].endswith(f"No such file or directory: '{archive}'")
    for path in ("../f30k_precomp/dev_ims.npy", "/f30k_precomp/dev_ims.npy"):
        status, _, line = run("--archive", pack(source | {path: b"x"}, archive))
        assert status == 2 and f"{path} leads out of the folder" in line
    content = pack(source, archive).read_bytes()
    for damaged in (content[: len(content) // 2], b"<html>"):
        status, _, line = run("--archive", write(archive, damaged))
        assert status == 2 and f"error: {archive}: not a whole .zip or .tar" in line
    assert not Path("data", NAME).exists()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("dev_ims.npy", npy(4, 6, 8)[:-8], "dev_ims.npy: not a readable .npy array"),
        ("dev_ims.npy", npy(3, 6, 8), "expected (4, 6, 8) and 20 captions, found (3, 6, 8)"),
        ("dev_ims.npy", npy(4, 6, 9), "expected (4, 6, 8) and 20 captions, found (4, 6, 9)"),
        ("dev_caps.txt", b"a dog\n" * 19, "found (4, 6, 8) and 19"),
        ("dev_caps.txt", b"a dog\n" * 19 + b"\xff", "line 20: not UTF-8"),
        ("dev_ids.txt", b"1\n2\n3\n", "3 ids do not fit 4 images"),
        (f"{NAME}_vocab.json", b"{", "not a JSON file"),
    ],
)
def test_what_is_wrong_is_not_placed_and_not_replaced(source, run, tmp_path, file, content, words):
    name = next(name for name in source if name.endswith(file))
    status, out, line = run("--archive", pack(source | {name: content}, tmp_path / "bad.zip"))
    assert status == 2 and words in line
    assert out.count(" fetched ") == 3 and not Path(name).exists()
    good = pack(source, tmp_path / "good.zip")
    assert run("--archive", good)[0] == 0 and files_in(".") == source
    write(Path(name), content)
    status, out, _ = run("--check")
    assert status == 1 and out.count(" wrong ") == 1 and words in out
    assert run("--archive", good)[0] == 2 and Path(name).read_bytes() == content


@pytest.mark.parametrize(
    ("name", "images"),
    [
        (NAME, {"train": 29_000, "dev": 1014, "test": 1000}),
        ("coco_precomp", {"dev": 5000, "test": 1000, "testall": 5000}),
        ("coco_precomp", {"test": 5000}),
    ],
)
def test_the_published_sizes_pass(run, tmp_path, monkeypatch, name, images):
    monkeypatch.chdir(tmp_path)
    VOCAB.save(Path("vocab", f"{name}_vocab.json"))
    for split, n in images.items():
        folder = write(Path("data", name, f"{split}_caps.txt"), b"a dog .\n" * 5 * n).parent
        rows = 5 * n if split == "dev" else n  # older files have each image five times
        shape = (rows, 36, 2048)  # zeros, which take no room on the disk
        np.lib.format.open_memmap(folder / f"{split}_ims.npy", "w+", np.float16, shape)
    status, out, _ = run("--check", "--data_name", name, "--splits", *images)
    assert status == 0 and out.count(" there ") == 1 + len(images), out


def test_a_full_disk_is_noticed_before(source, fetched, run, monkeypatch):
    disk = SimpleNamespace(free=13 * 6 * 8 * 4 - 1)  # a byte less than the 13 images need
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    status, _, line = run()
    assert status == 2 and "GB needed" in line and not fetched
    write(Path(os.environ["KAGGLEHUB_CACHE"], "partial"), b"x")  # that byte has come before
    assert run()[0] == 0


def test_another_disk_gets_a_whole_copy_or_none(source, fetched, run, monkeypatch, tmp_path):
    def copy(file, target):
        target.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", Mock(side_effect=OSError("Invalid cross-device link")))
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "copyfileobj", copy)
        assert run()[0] == 130 and files_in(".") == {}
    assert run()[0] == 0 and files_in(".") == files_in(tmp_path / "cache") == source


def test_a_split_that_the_data_set_does_not_have(source, run):
    status, _, line = run("--splits", "dev", "testall")
    assert status == 2 and line == "error: --splits testall: f30k_precomp has train, dev, test"
