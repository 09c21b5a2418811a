"""Long runs, and runs with a limb torn off."""

import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_split
from test_resume import FOLDER, folder, start  # noqa: F401 (a fixture)

from checkpoint import load_whole, save_checkpoint, step_files
from data import PrecompDataset, train_loader
from evaluation import evaluate
from model import LHSC
from train import train_step
from vocab import build_from_data, build_vocab


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
def test_evaluation_of_a_test_set_larger_than_its_memory(tmp_path):
    """2.9 GB of regions (a sparse file), gone through in less than half of that."""
    shape = (1000, 36, 20_000)
    (tmp_path / "data/large").mkdir(parents=True)
    ims = tmp_path / "data/large/test_ims.npy"
    np.lib.format.open_memmap(ims, "w+", np.float32, shape)[-1, -1, -1] = 1
    (tmp_path / "data/large/test_caps.txt").write_text("a dog\n" * shape[0])
    vocab = build_vocab(["a dog"], threshold=1)
    vocab.save(tmp_path / "vocab/large_vocab.json")
    sizes = {
        "img_dim": shape[2], "num_regions": shape[1], "embed_size": 4, "sim_dim": 4, "word_dim": 4,
        "vocab_size": len(vocab), "num_layers": 1, "bi_gru": True, "graph_layers": 1,
        "text_layers": 1, "drop_out": 0.0, "embed_dropout": 0.0, "pool_dropout": 0.0,
        "no_imgnorm": False, "no_txtnorm": False, "padding": "masked",
    }  # fmt: skip
    state = LHSC(**sizes).state_dict()
    opt = sizes | {"data_path": "data", "data_name": "large", "vocab_path": "vocab"}
    save_checkpoint({"opt": opt, "model": state}, tmp_path / "m.pth.tar")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import evaluation; "
        "evaluation.evalrank('m.pth.tar', split='test', device='cpu'); "
        "print(*(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "1,000 images" in result.stdout, result.stderr
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", result.stdout)[1])
    assert peak < ims.stat().st_size / 2


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
