"""Shared by all tests: the repo's root on the path, repeatable numbers, the goldens."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = Path(__file__).resolve().parent / "goldens"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def golden():
    """Numbers from the released code on a small random model, by name."""
    with np.load(GOLDENS / "released_a.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
