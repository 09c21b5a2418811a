"""Several processes are one: the same loss, gradients, buffers, parameters, ranks; and they end
together."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDENS, ROOT, write_split
from test_commands import SMALL

import distributed
from checkpoint import load_newest, load_whole
from data import ShuffledBatches
from train import Stop
from vocab import Vocabulary

pytestmark = pytest.mark.slow
SAME = ["--embed_dropout", "0", "--pool_dropout", "0", "--warmup_epochs", "1"]


def torchrun(n, *arguments):
    """The command that starts n processes of a script."""
    return [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
            "--nproc_per_node", str(n), *map(str, arguments)]  # fmt: skip


def run_all(n, folder, *arguments, timeout=280):
    command = torchrun(n, *arguments) if n > 1 else [sys.executable, *map(str, arguments)]
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


# -- steps ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    for dtype in ("float64", "float32"):
        run_all(1, folder, ROOT / "tests/steps.py", f"{dtype}.pt", dtype)
    return folder


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("n", [2, 3])
def test_steps_are_those_of_one_process(alone, tmp_path, n, dtype, tolerance):
    """Batches of 8, 7 and 5 over 2 and 3 processes, all negatives first, then the hardest.

    In the second, captions of one image are no negatives of each other. Of the model and variants.
    """
    run_all(n, tmp_path, ROOT / "tests/steps.py", "out.pt", dtype)
    alone, together = (torch.load(f, weights_only=True) for f in (alone / f"{dtype}.pt",
                                                                  tmp_path / "out.pt"))  # fmt: skip
    if "bf16" in together:  # in float32 only
        assert_close_steps(alone.pop("bf16"), together.pop("bf16"))
    for variant in together:
        # In float32 other orders of summing show a little more in the cosines.
        times = 1 if variant == "lhsc" or dtype == "float64" else 10
        assert_same_steps(alone[variant], together[variant], times * tolerance)


def assert_close_steps(one, many):
    """Of mixed precision: what is rounded to eight bits differs, and then the hardest negatives."""
    assert many["loss"] == pytest.approx(one["loss"], rel=0.02)
    first, other = (torch.cat([g.flatten() for g in x["grad"][0].values()]) for x in (one, many))
    assert torch.cosine_similarity(first, other, dim=0) > 0.99


def assert_same_steps(one, many, tolerance):
    assert many["loss"] == pytest.approx(one["loss"], rel=tolerance)
    for ours, theirs in zip(many["grad"], one["grad"], strict=True):
        for name, grad in theirs.items():
            scale = max(float(grad.abs().max()), 1)
            assert (ours[name] - grad).abs().max() <= 10 * tolerance * scale, name
    for name, value in one["state"].items():
        scale = max(float(value.abs().max()), 1)
        assert (many["state"][name] - value).abs().max() <= tolerance * scale, name


def test_shares_are_the_whole_batch_once(monkeypatch):
    lengths = torch.randint(3, 30, (103,), generator=torch.Generator().manual_seed(0))
    whole = list(ShuffledBatches(lengths, 20, seed=1))
    for n in (2, 3, 7):
        monkeypatch.setattr(distributed, "size", lambda n=n: n)
        shares = []
        for r in range(n):
            monkeypatch.setattr(distributed, "rank", lambda r=r: r)
            shares.append(list(ShuffledBatches(lengths, 20, seed=1)))
        monkeypatch.undo()
        batches = [[*itertools.chain(*parts)] for parts in zip(*shares, strict=True)]
        # A last batch with less than one example for each is left out.
        assert batches == (whole if n <= 3 else whole[:-1])
        assert all(len(part) > 0 for parts in shares for part in parts)
    for batch in whole:
        assert lengths[batch].tolist() == sorted(lengths[batch].tolist(), reverse=True)


# -- the commands ---------------------------------------------------------------------------------


def write_data(folder):
    for split, n_images in (("train", 30), ("dev", 10), ("test", 10)):
        write_split(folder / "data" / "tiny", split, n_images)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The same run by one process and by two."""
    folders = {}
    for n in (1, 2):
        folders[n] = write_data(tmp_path_factory.mktemp(f"by{n}"))
        run_all(n, folders[n], ROOT / "train.py", *SMALL, *SAME)
    return folders


CHECKPOINT = "runs/LHSC/checkpoint/model_best.pth.tar"


def log_of(folder):
    lines = (folder / "runs/LHSC/checkpoint/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_training_by_two_is_training_by_one(trained):
    one, two = (log_of(trained[n]) for n in (1, 2))
    assert [(x["type"], x.get("step")) for x in one] == [(x["type"], x.get("step")) for x in two]
    for a, b in zip(one, two, strict=True):
        if a["type"] == "train":
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
    files = [
        sorted(p.name for p in (trained[n] / "runs/LHSC/checkpoint").iterdir()) for n in (1, 2)
    ]
    assert files[0] == files[1]
    assert len(list((trained[2] / "runs/LHSC/log").iterdir())) == 1  # one of them logs


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("others", [[], ["--fold5"], ["--split", "dev"]])
def test_evaluation_gives_the_same_metrics_to_the_last_digit(trained, tmp_path, n, others):
    arguments = ["--model_path", CHECKPOINT, "--device", "cpu", *others]
    for k in (1, n):
        out = run_all(
            k, trained[1], ROOT / "evaluation.py", *arguments, "--save_metrics",
            tmp_path / f"{k}.json", "--save_sims", tmp_path / f"{k}.npy",
        )  # fmt: skip
        assert out.count("rsum") == 1
    assert (tmp_path / "1.json").read_text() == (tmp_path / f"{n}.json").read_text()
    one, many = (np.load(tmp_path / f"{k}.npy") for k in (1, n))
    assert np.abs(one - many).max() < 1e-6


def test_a_released_checkpoint_keeps_its_batches_of_captions(tmp_path):
    """With the released padding an embedding depends on its batch of 100: shares keep those."""
    write_split(tmp_path / "data" / "f30k_precomp", "test", 45, num_regions=36, img_dim=48)
    opt = torch.load(GOLDENS / "legacy_py2_a.pth.tar", weights_only=False)["opt"]
    words = ["<pad>", "<start>", "<end>", "<unk>", *(f"w{k}" for k in range(opt.vocab_size - 4))]
    words[4:9] = ["red", "dog", "green", "there", "look"]
    Vocabulary(words).save(tmp_path / "vocab" / "f30k_precomp_vocab.json")
    for n in (1, 2):
        run_all(
            n, tmp_path, ROOT / "evaluation.py", "--model_path", GOLDENS / "legacy_py2_a.pth.tar",
            "--data_path", "data", "--vocab_path", "vocab", "--device", "cpu",
            "--save_sims", f"{n}.npy",
        )  # fmt: skip
    assert np.abs(np.load(tmp_path / "1.npy") - np.load(tmp_path / "2.npy")).max() < 1e-6


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    write_data(tmp_path)
    options = [*SMALL, *SAME]
    run_all(2, tmp_path, ROOT / "train.py", *options)
    out = run_all(3, tmp_path, ROOT / "train.py", "--resume", "--num_epochs", 3)
    assert "saved by 2 processes, going on with 3" in out
    log = log_of(tmp_path)
    assert [x["step"] for x in log if x["type"] == "dev"][-1] == 30
    out = run_all(1, tmp_path, ROOT / "train.py", "--resume", "--num_epochs", 4)
    assert "going on with 1" in out


def test_more_processes_than_examples_in_a_batch_are_refused(tmp_path):
    write_data(tmp_path)
    result = subprocess.run(
        torchrun(3, ROOT / "train.py", *SMALL, "--batch_size", 2), cwd=tmp_path,
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode != 0
    assert "--batch_size 2: fewer examples than the 3 processes" in result.stderr
    assert not (tmp_path / "runs").exists()


# -- ends -----------------------------------------------------------------------------------------


def children(pid):
    """The processes that torchrun has started, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_text().split("\0") if parent == pid else []
        except OSError:
            continue  # it has ended meanwhile
        ranks = [v.partition("=")[2] for v in variables if v.startswith("RANK=")]
        found |= {int(r): int(folder.name) for r in ranks}
    return found


@pytest.fixture
def running(tmp_path):
    """A run of two processes that has written a checkpoint and goes on."""
    write_data(tmp_path)
    options = [*SMALL, "--num_epochs", "5000", "--save_step", "3", "--log_step", "1"]
    process = subprocess.Popen(
        torchrun(2, ROOT / "train.py", *options), cwd=tmp_path, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("epoch 1 "):
            break
    workers = children(process.pid)
    yield tmp_path, process
    process.kill()
    for pid in workers.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the processes in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_stops_all(running, victim):
    folder, process = running
    os.kill(children(process.pid)[victim], signal.SIGKILL)
    start = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - start < 60
    assert not children(process.pid)
    assert "another process of this run is gone" in errors or "SIGKILL" in errors
    path, saved = load_newest(folder / "runs/LHSC/checkpoint")
    assert saved["Eiters"] > 0 and load_whole(path)


def test_a_signal_that_comes_while_the_others_are_asked_is_not_lost(monkeypatch):
    stop = Stop()

    def ask(number, device):
        stop.signal = signal.SIGTERM
        return number

    monkeypatch.setattr(distributed, "largest", ask)
    assert stop.agreed(torch.device("cpu")) == 0
    assert stop.agreed(torch.device("cpu")) == signal.SIGTERM


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the processes in /proc")
def test_sigterm_stops_all_after_the_same_step(running):
    folder, process = running
    os.kill(children(process.pid)[1], signal.SIGTERM)
    process.communicate(timeout=60)
    _, saved = load_newest(folder / "runs/LHSC/checkpoint")
    lines = log_of(folder)
    assert saved["Eiters"] == lines[-1]["step"] if lines[-1]["type"] == "train" else True
    assert len(saved["random"]) == 2
