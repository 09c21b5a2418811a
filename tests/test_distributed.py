"""Several processes are one: the same losses, gradients, weights, scores; and they end together."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import steps
import torch
from conftest import ROOT, RUN, SMALL, at_step, call, log_of, refuses, succeeded, write_split
from torch.testing import assert_close

import distributed
import run
import train
from checkpoint import load_checkpoint, load_latest
from data import ShuffledBatches
from metrics import retrieval_metrics
from vocab import Vocabulary

pytestmark = pytest.mark.slow


def torchrun(folder, n, script, *arguments):
    """Start n processes of a script."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    return subprocess.Popen(
        [*command, str(n), str(ROOT / script), *map(str, arguments)], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory):
    """A folder with a trained model, data for it and for an official one, and what one makes."""
    folder = shutil.copytree(trained[0], tmp_path_factory.mktemp("alone") / "copy")
    write_split(folder / "data" / "f30k_precomp", "test", 45, num_regions=36, img_dim=48)
    official = load_checkpoint(ROOT / "tests/goldens/legacy_py2_a.pth.tar")["opt"]
    words = ["<pad>", "<start>", "<end>", "<unk>", "red", "dog", "green", "there", "look"]
    words += (f"w{k}" for k in range(official["vocab_size"] - len(words)))
    Vocabulary(words).save(folder / "vocab" / "f30k_precomp_vocab.json")
    (folder / "by1").mkdir()
    assert succeeded(call(folder, steps.main, "by1")).count("rsum") == 4
    return folder


@pytest.mark.parametrize("n", [2, 3])
def test_steps_and_evaluations_are_those_of_one_process(alone, n):
    """Batches of 8, 7 and 5; every similarity. Scores agree to 1e-6, so close ranks may differ.

    Two end well. Of three the first dies at the end, and the others say so in one line.
    """
    (alone / f"by{n}").mkdir()
    process = torchrun(alone, n, "tests/steps.py", f"by{n}", *(["0"] if n == 3 else []))
    output, errors = process.communicate(timeout=280)
    told = re.findall("^error: .*", errors, re.M)
    assert (process.returncode == 0) == (n == 2) == (not told), errors
    assert all("another process is gone" in line for line in told)
    assert errors.count("Traceback") == (n == 3)  # torchrun's own report
    assert output.count("rsum") == 4
    one, many = (torch.load(alone / f"by{k}/steps.pt", weights_only=True) for k in (1, n))
    assert_close_steps(one.pop("bf16"), many.pop("bf16"))
    assert_close(many, one, rtol=1e-10, atol=1e-9)
    for name in steps.EVALUATIONS:
        a, b = (np.load(alone / f"by{k}/{name}.npy") for k in (1, n))
        assert np.abs(a - b).max() < 1e-6
        found = json.loads((alone / f"by{n}/{name}.json").read_text())
        folds = found.get("folds", [found])
        rows, columns = (size // len(folds) for size in b.shape)
        for k, fold in enumerate(folds):
            block = b[k * rows :][:rows, k * columns :][:, :columns]
            expected = retrieval_metrics(block, np.arange(columns) // (columns // rows))
            assert fold | expected == fold


def assert_close_steps(one, many):
    """Of mixed precision: what is rounded to eight bits differs, and then the hardest negatives."""
    assert many["loss"] == pytest.approx(one["loss"], rel=0.02)
    first, other = (torch.cat([g.flatten() for g in x["grad"][0].values()]) for x in (one, many))
    assert torch.cosine_similarity(first, other, dim=0) > 0.99


def test_shares_are_the_whole_batch_once(monkeypatch):
    lengths = torch.randint(3, 30, (103,), generator=torch.Generator().manual_seed(0))
    whole = list(ShuffledBatches(lengths, 20, seed=1))
    for n in (2, 3, 7):
        monkeypatch.setattr(distributed, "world_size", lambda n=n: n)
        shares = []
        for r in range(n):
            monkeypatch.setattr(distributed, "rank", lambda r=r: r)
            shares.append(list(ShuffledBatches(lengths, 20, seed=1)))
        monkeypatch.undo()
        batches = [[*itertools.chain(*parts)] for parts in zip(*shares, strict=True)]
        # A last batch with less than one example for each is left out.
        assert batches == (whole if n <= 3 else whole[:-1])
        assert all(len(part) > 0 for parts in shares for part in parts)


def test_a_run_by_one_then_two_then_one_is_that_of_one(tiny, tmp_path_factory, monkeypatch):
    """Stopped by a signal, continued by two, stopped by a signal to one of them, and continued."""
    options = [*SMALL, "--embed_dropout", "0", "--pool_dropout", "0", "--warmup_epochs", "4",
               "--log_step", "1", "--save_step", "7", "--num_epochs", "4"]  # fmt: skip
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("parts") / "copy")
    succeeded(call(tiny, train.main, *options))
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert call(folder, train.main, *options).returncode == 130

    process, output = torchrun(folder, 2, "train.py", "--resume"), ""
    while not output.count("epoch 0 ["):
        output += process.stdout.readline()
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[1]), signal.SIGTERM)
    rest, errors = process.communicate(timeout=120)
    _, saved = load_latest(folder / RUN)
    assert process.returncode != 0 and "SIGTERM: stopping after this step" in errors
    assert "saved by 1 processes, continued with 2" in output
    assert f"stopped at step {saved['Eiters']}" in rest and 3 < saved["Eiters"] < 40
    assert len(saved["random"]) == 2 and log_of(folder)[-1]["step"] == saved["Eiters"]

    output = succeeded(call(folder, train.main, "--resume"))
    assert "saved by 2 processes, continued with 1" in output
    for a, b in zip(*(log_of(path, "train", "dev") for path in (folder, tiny)), strict=True):
        assert (a["type"], a["step"]) == (b["type"], b["step"])
        if a["type"] == "train":
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    names = [{file.name for file in (path / RUN).iterdir()} for path in (tiny, folder)]
    assert names[0] == names[1]
    assert len(list((folder / "runs/LHSC/log").iterdir())) == 3  # one of two wrote


def test_a_mistake_is_told_once(tmp_path):
    """torchrun adds a report of its own, in any case."""
    _, errors = torchrun(tmp_path, 2, "evaluation.py", "--device", "cpu").communicate(timeout=120)
    (told,) = re.findall("^error: .*", errors, re.M)
    assert "model_best.pth.tar: no checkpoint here" in told


def test_more_processes_than_examples_in_a_batch_are_refused(tiny, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    words = ["--batch_size 2: fewer examples than processes"]
    refuses(tiny, train.main, *SMALL, "--batch_size", 2, words=words)


def test_a_signal_that_comes_while_the_others_are_asked_is_not_lost(monkeypatch):
    stop = run.StopSignal()

    def ask(number, device):
        stop.signal = signal.SIGTERM
        return number

    monkeypatch.setattr(distributed, "all_reduce_max", ask)
    assert stop.agreed(torch.device("cpu")) == 0
    assert stop.agreed(torch.device("cpu")) == signal.SIGTERM
