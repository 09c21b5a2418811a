"""Memory: it does not grow with steps and evaluations, nor with the test set or a long caption."""

import itertools
import subprocess
import sys

import numpy as np
import torch
from conftest import ROOT, load_split
from helpers import resident

from baselines import build_model
from checkpoint import MODEL_OPTIONS, save_checkpoint
from data import train_loader
from evaluation import evaluate
from model import LHSC
from train import options, train_step
from vocab import MAX_WORDS, build_vocab


def test_memory_stays_flat_over_many_steps_and_evaluations(tiny):
    (trainset, vocab), (devset, _) = load_split(tiny, "train"), load_split(tiny, "dev")
    model = LHSC(len(vocab), img_dim=8, num_regions=6, embed_size=16, sim_dim=8, word_dim=10,
                 graph_layers=1, text_layers=1)  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = train_loader(trainset, 16, workers=0, seed=0)
    steps = itertools.chain.from_iterable(itertools.repeat(loader))
    sizes = []
    for _ in range(12):
        for batch in itertools.islice(steps, 12):
            train_step(model.train(), optimizer, batch)
        for _ in range(2):
            evaluate([model.eval()], devset, torch.device("cpu"))
        sizes.append(resident())
    assert np.median(sizes[-4:]) - np.median(sizes[2:6]) < 5, sizes


MEASURE = """
import evaluation, helpers
before = helpers.resident()
evaluation.evalrank("m.pth.tar", split="test", device="cpu", matmul="default")
print("took", helpers.resident("VmHWM") - before)
"""


def test_a_large_test_set_with_long_captions_is_evaluated_in_bounded_memory(tmp_path, monkeypatch):
    """0.9 GB of regions (a sparse file) and captions as long as are taken, in less memory."""
    shape = (600, 36, 10_000)
    (tmp_path / "data/large").mkdir(parents=True)
    ims = tmp_path / "data/large/test_ims.npy"
    np.lib.format.open_memmap(ims, "w+", np.float32, shape)[-1, -1, -1] = 1
    captions = ["a dog"] * 595 + ["dog " * MAX_WORDS] * 5
    (tmp_path / "data/large/test_caps.txt").write_text("\n".join(captions))
    vocab = build_vocab(["a dog"], threshold=1)
    vocab.save(tmp_path / "vocab/large_vocab.json")
    opt = vars(options().parse_args([])) | {"data_name": "large", "vocab_size": len(vocab)}
    opt |= {"img_dim": shape[2], "num_regions": 36, "embed_size": 8, "sim_dim": 4, "text_layers": 1}
    model = build_model(**{name: opt[name] for name in MODEL_OPTIONS})
    save_checkpoint({"opt": opt, "model": model.state_dict()}, tmp_path / "m.pth.tar")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    command = [sys.executable, "-c", MEASURE]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "600 images" in result.stdout, result.stderr
    assert float(result.stdout.split()[-1]) < 0.75 * ims.stat().st_size / 1e6
