"""Shared by all tests: the path, repeatable numbers, small data, commands, a browser."""

import contextlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # here and in the processes started here: the same rounding
os.environ["PYTHONWARNINGS"] = "ignore"
os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"  # as run.py has it

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = Path(__file__).resolve().parent / "goldens"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

import train
from data import PrecompDataset
from vocab import build_from_data, vocab_file


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def switch():
    """What chooses the library that multiplies on a CPU; afterwards it is as before."""
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    yield switch
    switch.fp32_precision = before


@pytest.fixture(scope="session")
def golden():
    """Numbers from the official code on a small random model, by name."""
    with np.load(GOLDENS / "released_a.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def chromium():
    """A browser without a window (Playwright's); skips where there is none."""
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("no Chromium")
    from playwright.sync_api import sync_playwright

    arguments = ["--headless", "--no-sandbox", "--disable-gpu"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield browser
        browser.close()


COLOURS = ("red", "green", "blue", "black", "white")
THINGS = ("dog", "cat", "car", "tree", "boat")


def write_split(folder, split, n_images, num_regions=6, img_dim=8, repeat=1):
    """A split in SCAN's layout whose captions can be told from the features."""
    generator = np.random.default_rng(len(split))
    folder.mkdir(parents=True, exist_ok=True)
    codes = generator.normal(size=(len(COLOURS) * len(THINGS), img_dim))
    kinds = generator.integers(len(codes), size=n_images)
    noise = generator.normal(size=(n_images, num_regions, img_dim))
    images = (codes[kinds][:, None] + 0.3 * noise).astype(np.float32)
    np.save(folder / f"{split}_ims.npy", np.repeat(images, repeat, axis=0))
    captions = []
    for i, kind in enumerate(kinds):
        colour, thing = COLOURS[kind // len(THINGS)], THINGS[kind % len(THINGS)]
        captions += [
            f"A {colour} {thing} .",
            f"there is a {thing} , it is {colour}",
            f"one {colour} {thing} in picture {i}",
            f"look at the {colour} {thing}",
            f"{thing}",
        ]
    (folder / f"{split}_caps.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    (folder / f"{split}_ids.txt").write_text("".join(f"{split}{i}\n" for i in range(n_images)))


def write_tiny(folder):
    """A data set `tiny` of three splits and its vocabulary, as a user's would be."""
    for split, n_images in (("train", 30), ("dev", 10), ("test", 10)):
        write_split(folder / "data" / "tiny", split, n_images)
    build_from_data(folder / "data", "tiny").save(vocab_file(folder / "vocab", "tiny"))
    return folder


@pytest.fixture
def tiny(tmp_path):
    return write_tiny(tmp_path)


def load_split(folder, split, data_name="tiny", **options):
    """A split of a data set below folder/data, and the vocabulary of its captions."""
    vocab = build_from_data(folder / "data", data_name)
    return PrecompDataset(folder / "data", data_name, split, vocab, **options), vocab


def contents(folder):
    """The files below a folder with their bytes, and the folders, by their path there."""
    found = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*")}
    return {name: path.is_dir() or path.read_bytes() for name, path in found.items()}


SMALL = [
    "--data_name", "tiny", "--embed_size", "16", "--sim_dim", "8", "--word_dim", "10",
    "--batch_size", "16", "--num_epochs", "2", "--workers", "0", "--learning_rate", "0.002",
    "--device", "cpu", "--matmul", "default",
]  # fmt: skip
RUN = Path("runs/LHSC/checkpoint")  # where train.py writes by default


def log_of(folder, *types):
    """What the log of a run in `folder` says, or its lines of some types."""
    lines = map(json.loads, (folder / RUN / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["type"] in types or not types]


def call(folder, main, *arguments):
    """Run a script's main() in `folder` as from a shell, but in this process, which is faster."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *map(str, arguments)])
        patch.chdir(folder)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def at_step(patch, number, act):
    """Let a training in this process do something at its number-th step."""
    counter, step = itertools.count(1), train.train_step

    def train_step(*args):
        if next(counter) == number:
            act()
        return step(*args)

    patch.setattr(train, "train_step", train_step)


def succeeded(result):
    """Its output, if it ended well."""
    assert result.returncode == 0, result.stderr
    return result.stdout


def refused(result, *words):
    """Exit status 2, and one line on stderr that says all of `words`; argparse adds its usage."""
    assert result.returncode == 2, result.stderr
    lines = [x for x in result.stderr.splitlines() if not x.startswith(("usage:", " ", "note: "))]
    assert len(lines) == 1 and "error: " in lines[0], result.stderr
    for word in words:
        assert word in lines[0], lines[0]


def refuses(folder, main, *arguments, words=()):
    """The command is refused, and leaves the folder as it was."""
    before = contents(folder)
    refused(call(folder, main, *arguments), *words)
    assert contents(folder) == before


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder in which train.py has run with its default paths, and what it printed."""
    folder = write_tiny(tmp_path_factory.mktemp("trained"))
    (folder / "vocab/tiny_vocab.json").unlink()
    result = call(folder, train.main, *SMALL, "--log_step", 3, "--val_step", 7)
    return folder, succeeded(result)
