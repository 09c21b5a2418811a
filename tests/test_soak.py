"""Long runs, and runs with a limb torn off."""

import itertools
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_split
from test_resume import FOLDER, folder, start  # noqa: F401 (a fixture)

from checkpoint import load_whole, step_files
from data import PrecompDataset, train_loader
from evaluation import evaluate
from model import LHSC
from train import train_step
from vocab import build_from_data


@pytest.fixture
def parts(tmp_path):
    """A small data set, a loader and a model."""
    for split in ("train", "dev"):
        write_split(tmp_path / "tiny", split, 20)
    vocab = build_from_data(tmp_path, "tiny", threshold=1)
    trainset, devset = (PrecompDataset(tmp_path, "tiny", s, vocab) for s in ("train", "dev"))
    model = LHSC(len(vocab), img_dim=8, num_regions=6, embed_size=16, sim_dim=8, word_dim=10)
    return model, train_loader(trainset, 16, workers=0, seed=0), devset


def resident():
    """Megabytes."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) / 1024


@pytest.mark.slow
def test_memory_stays_flat_over_two_thousand_steps_and_two_hundred_evaluations(parts):
    model, loader, devset = parts
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    steps = itertools.chain.from_iterable(itertools.repeat(loader))
    sizes = []
    for _ in range(20):
        model.train()
        for batch in itertools.islice(steps, 100):
            train_step(model, optimizer, batch)
        for _ in range(10):
            evaluate([model.eval()], devset, torch.device("cpu"))
        sizes.append(resident())
    early, late = np.median(sizes[2:8]), np.median(sizes[-6:])
    assert late - early < 20, sizes


def test_scores_all_alike_are_reported_with_a_warning(parts, capsys):
    model, _, devset = parts
    torch.nn.init.zeros_(model.similarity.score_fc.weight)
    metrics, _ = evaluate([model.eval()], devset, torch.device("cpu"))
    assert "the model has collapsed" in capsys.readouterr().err
    chance = 100 * 5 / len(devset)
    assert metrics["i2t"]["r1"] <= chance and metrics["t2i"]["r1"] <= chance


@pytest.mark.slow
def test_a_killed_loader_process_ends_the_run_in_one_line(folder):  # noqa: F811
    process = start(folder, "--workers", "2", "--num_epochs", "500")
    for line in process.stdout:
        if line.startswith("epoch 0 [8/"):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGKILL)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert "Traceback" not in errors and errors.count("error:") == 1
    assert "a loader process died" in errors and "--resume" in errors
    assert load_whole(step_files(folder / FOLDER)[0])["Eiters"] >= 3
