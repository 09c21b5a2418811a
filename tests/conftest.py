"""Shared by all tests: the repo's root on the path, repeatable numbers, the goldens."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = Path(__file__).resolve().parent / "goldens"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]


def pytest_terminal_summary(terminalreporter):
    """What tests wish to say at the end (record_property "told")."""
    for report in terminalreporter.getreports("passed"):
        for name, line in report.user_properties:
            if name == "told":
                terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def golden():
    """Numbers from the released code on a small random model, by name."""
    with np.load(GOLDENS / "released_a.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


COLOURS = ("red", "green", "blue", "black", "white")
THINGS = ("dog", "cat", "car", "tree", "boat")


def write_split(folder, split, n_images, num_regions=6, img_dim=8, dtype=np.float32, repeat=1):
    """A split in SCAN's layout whose captions can be told from the features."""
    generator = np.random.default_rng(len(split))
    folder.mkdir(parents=True, exist_ok=True)
    codes = generator.normal(size=(len(COLOURS) * len(THINGS), img_dim))
    kinds = generator.integers(len(codes), size=n_images)
    noise = generator.normal(size=(n_images, num_regions, img_dim))
    images = (codes[kinds][:, None] + 0.3 * noise).astype(dtype)
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
    return captions


@pytest.fixture
def tiny(tmp_path):
    """A folder with a data set `tiny` of three splits and its vocabulary, as a user's would be."""
    for split, n_images in (("train", 30), ("dev", 10), ("test", 10)):
        write_split(tmp_path / "data" / "tiny", split, n_images)
    from vocab import build_from_data, vocab_file

    build_from_data(tmp_path / "data", "tiny").save(vocab_file(tmp_path / "vocab", "tiny"))
    return tmp_path
