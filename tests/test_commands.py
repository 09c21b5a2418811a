"""The command lines as a user types them: train, evaluate, and what bad input ends in."""

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDENS, ROOT, write_split

from checkpoint import load_checkpoint, load_newest
from evaluation import evalrank, protocol
from metrics import retrieval_metrics
from vocab import Vocabulary

SMALL = [
    "--data_name", "tiny", "--embed_size", "16", "--sim_dim", "8", "--word_dim", "10",
    "--batch_size", "16", "--num_epochs", "2", "--workers", "0", "--learning_rate", "0.002",
    "--device", "cpu",
]  # fmt: skip


def run(folder, script, *arguments):
    """Run one of our scripts in `folder`, as from a shell."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )  # fmt: skip


def refused(result, *words):
    """Exit status 2, one line that says all of `words`, no traceback."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("usage:")]
    lines = [line for line in lines if line.strip() and not line.startswith("  ")]
    assert len(lines) == 1, result.stderr
    assert "error:" in lines[0]
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which `train.py` has run with its default paths."""
    folder = tmp_path_factory.mktemp("trained")
    for split, n_images in (("train", 30), ("dev", 10), ("test", 10)):
        write_split(folder / "data" / "tiny", split, n_images)
    result = run(folder, "train.py", *SMALL, "--log_step", 3, "--val_step", 7)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_training_leaves_what_it_says(trained):
    folder, output = trained
    run_folder = folder / "runs/LHSC/checkpoint"
    files = sorted(file.name for file in run_folder.iterdir())
    assert files == [
        "checkpoint_10.pth.tar", "checkpoint_20.pth.tar", "metrics.jsonl", "model_best.pth.tar",
    ]  # fmt: skip
    assert list((folder / "runs/LHSC/log").glob("events.out.tfevents.*"))
    assert "tiny_vocab.json: not found, built" in output and "released file" in output
    first, *lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    assert first["type"] == "run" and first["seed"] == 0
    assert first["arguments"]["embed_size"] == 16 and first["arguments"]["img_dim"] == 8
    assert {"versions", "commit", "hardware"} <= first.keys()
    losses = [line["loss"] for line in lines if line["type"] == "train"]
    assert losses[-1] < losses[0]
    dev = [line for line in lines if line["type"] == "dev"]
    assert [line["step"] for line in dev] == [7, 10, 14, 20]
    best = max(line["rsum"] for line in dev)
    assert load_checkpoint(run_folder / "model_best.pth.tar")["best_rsum"] == best


def test_a_checkpoint_is_plain(trained):
    folder, _ = trained
    path = folder / "runs/LHSC/checkpoint/checkpoint_20.pth.tar"
    checkpoint = torch.load(path, weights_only=True)  # without any class allowed

    def plain(value):
        if isinstance(value, dict):
            return all(plain(k) and plain(v) for k, v in value.items())
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return value is None or isinstance(value, torch.Tensor | int | float | str | bool)

    assert plain(checkpoint)
    assert {"epoch", "Eiters", "best_rsum", "opt", "model", "optimizer"} <= checkpoint.keys()


def test_evaluation_needs_no_arguments(trained):
    folder, _ = trained
    result = run(folder, "evaluation.py")
    assert result.returncode == 0, result.stderr
    assert "tiny test, 10 images (10 images, 50 captions)" in result.stdout
    assert "image to text" in result.stdout and "rsum" in result.stdout


def test_saved_sims_and_metrics_agree(trained):
    folder, _ = trained
    result = run(folder, "evaluation.py", "--save_sims", "s.npy", "--save_metrics", "m.json")
    assert result.returncode == 0, result.stderr
    sims = np.load(folder / "s.npy")
    assert sims.shape == (10, 50) and sims.dtype == np.float32
    metrics = json.loads((folder / "m.json").read_text())
    assert {"i2t", "t2i", "rsum", "n_images", "n_captions"} <= metrics.keys()
    assert metrics.pop("protocol") == "tiny test, 10 images"
    assert metrics == retrieval_metrics(sims, np.repeat(np.arange(10), 5))


def test_evalrank_returns_what_it_prints(trained, monkeypatch, capsys):
    folder, _ = trained
    monkeypatch.chdir(folder)
    metrics = evalrank("runs/LHSC/checkpoint/model_best.pth.tar", split="dev", device="cpu")
    assert f"rsum {metrics['rsum']:.1f}" in capsys.readouterr().out
    checkpoint = load_checkpoint("runs/LHSC/checkpoint/model_best.pth.tar")
    assert metrics["rsum"] == pytest.approx(checkpoint["best_rsum"])
    with pytest.raises(TypeError, match="no option splitt"):
        evalrank("x", splitt="dev")


def test_five_folds(trained):
    folder, _ = trained
    for extra in ([], ["--save_sims", "folds.npy"]):
        result = run(folder, "evaluation.py", "--fold5", "--save_metrics", "f.json", *extra)
        assert result.returncode == 0, result.stderr
        assert "mean of five folds of 2 images" in result.stdout
        metrics = json.loads((folder / "f.json").read_text())
        assert len(metrics["folds"]) == 5 and metrics["folds"][0]["n_images"] == 2
        assert metrics["rsum"] == pytest.approx(np.mean([f["rsum"] for f in metrics["folds"]]))
    sims = np.load(folder / "folds.npy")
    owners = np.repeat([0, 1], 5)
    for k, fold in enumerate(metrics["folds"]):
        block = sims[2 * k : 2 * k + 2, 10 * k : 10 * k + 10]
        assert retrieval_metrics(block, owners) == fold


def test_an_ensemble_averages_scores(trained):
    folder, _ = trained
    models = [f"runs/LHSC/checkpoint/{n}.pth.tar" for n in ("checkpoint_10", "checkpoint_20")]
    for name, paths in (("a", models[:1]), ("b", models[1:]), ("ab", models)):
        result = run(folder, "evaluation.py", "--save_sims", f"{name}.npy", "--model_path", *paths)
        assert result.returncode == 0, result.stderr
    assert "ensemble of 2" in result.stdout
    a, b, both = (np.load(folder / f"{name}.npy") for name in ("a", "b", "ab"))
    np.testing.assert_allclose(both, (a + b) / 2, rtol=1e-6)


def test_the_same_seed_gives_the_same_run(trained):
    folder, _ = trained
    arguments = [*SMALL, "--num_epochs", 1, "--model_name", "again/c", "--logger_name", "again/l"]
    runs = []
    for seed in (0, 0, 1):
        result = run(folder, "train.py", *arguments, "--seed", seed)
        assert result.returncode == 0, result.stderr
        runs.append(load_newest(folder / "again/c")[1]["model"])
    same, other = runs[1:]
    assert all(torch.equal(runs[0][name], same[name]) for name in same)
    assert not all(torch.equal(runs[0][name], other[name]) for name in other)
    # Nothing is overwritten: the earlier runs were moved aside.
    assert {p.name for p in (folder / "again").iterdir()} == {"c", "l", "c.1", "l.1", "c.2", "l.2"}


def test_released_options_train_the_released_way(trained):
    folder, _ = trained
    result = run(
        folder, "train.py", *SMALL, "--num_epochs", 1, "--padding", "released",
        "--val_captions", 23, "--deterministic", "--no-bi_gru", "--no-max_violation",
        "--no_imgnorm", "--no_txtnorm",
        "--graph_layers", 1, "--text_layers", 0, "--model_name", "r/c", "--logger_name", "r/l",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "dev 5, 23" in result.stdout
    opt = load_newest(folder / "r/c")[1]["opt"]
    assert opt["padding"] == "released" and opt["bi_gru"] is False and opt["no_imgnorm"] is True


def test_a_released_checkpoint_gives_the_released_scores(tmp_path, golden, monkeypatch):
    """The golden images and captions as files, evaluated by the path alone, to 1e-5.

    All 24 captions fit one batch of 100 in file order, as they did in the released run. Golden
    captions are any word numbers, without <start> and <end>: only this step is replaced.
    """
    folder = tmp_path / "data" / "f30k_precomp"
    folder.mkdir(parents=True)
    np.save(folder / "test_ims.npy", golden["in/images"])
    captions = [
        " ".join(f"w{i}" for i in row[:n])
        for row, n in zip(golden["in/captions"], golden["in/lengths"], strict=True)
    ]
    (folder / "test_caps.txt").write_text("\n".join(captions) + "\n")
    words = ["<pad>", "<start>", "<end>", "<unk>", *(f"w{i}" for i in range(4, 60))]
    Vocabulary(words).save(tmp_path / "vocab" / "f30k_precomp_vocab.json")
    monkeypatch.setattr(
        Vocabulary, "encode", lambda self, text: [int(word[1:]) for word in text.split()]
    )
    evalrank(
        GOLDENS / "legacy_py2_a.pth.tar", tmp_path / "data", split="test", device="cpu",
        data_name="f30k_precomp", vocab_path=tmp_path / "vocab", save_sims=tmp_path / "s.npy",
    )  # fmt: skip
    np.testing.assert_allclose(np.load(tmp_path / "s.npy"), golden["eval/sims"], rtol=0, atol=1e-5)


def test_released_padding_is_evaluated_in_batches_of_100_in_file_order(tiny, golden):
    """120 captions: the first 100 and the last 20 are each padded to their own longest."""
    from data import PrecompDataset
    from evaluation import encode_captions
    from model import LHSC

    write_split(tiny / "data" / "tiny", "test", 24)
    vocab = Vocabulary.load(tiny / "vocab" / "tiny_vocab.json")
    dataset = PrecompDataset(tiny / "data", "tiny", "test", vocab)
    sizes = {"img_dim": 8, "num_regions": 6, "embed_size": 8, "word_dim": 6, "sim_dim": 4}
    model = LHSC(len(vocab), **sizes, padding="released").eval()
    torch.nn.init.uniform_(model.text_encoder.embed.weight, -1, 1)
    encoded = encode_captions(model, dataset, torch.device("cpu"))
    ends = dataset.lengths.cumsum(0).tolist()
    with torch.no_grad():
        for start, stop in ((0, 100), (100, 120)):
            captions = torch.nn.utils.rnn.pad_sequence(
                [dataset.words(i) for i in range(start, stop)], batch_first=True
            )
            expected = model.text_encoder(captions, dataset.lengths[start:stop])
            ours = encoded.word_emb[ends[start] - dataset.lengths[start] : ends[stop - 1]]
            torch.testing.assert_close(ours, expected)


def test_protocols_have_names():
    assert protocol("f30k_precomp", "test", 1000, False) == "F30K 1K"
    assert protocol("coco_precomp", "testall", 5000, False) == "COCO 5K"
    assert protocol("coco_precomp", "testall", 5000, True).startswith("COCO 1K, mean of five")
    assert "not comparable" in protocol("coco_precomp", "test", 1000, False)


class Trojan:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def broken_checkpoint(folder, good, how):
    path = folder / f"{how.replace(' ', '_')}.pth.tar"
    checkpoint = torch.load(good, weights_only=True)
    if how == "text":
        path.write_text("hello")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(good.read_bytes()[:3000])
    elif how == "trojan":
        torch.save({"model": Trojan(str(folder / "trojan ran")), "opt": {}}, path)
    elif how == "bare pickle":
        path.write_bytes(pickle.dumps(argparse.Namespace(a=1)))
    elif how == "a tensor":
        torch.save(torch.zeros(3), path)
    elif how == "no options":
        torch.save({"model": checkpoint["model"]}, path)
    elif how == "other size":
        torch.save(checkpoint | {"opt": checkpoint["opt"] | {"embed_size": 32}}, path)
    elif how == "a weight missing":
        del checkpoint["model"]["similarity.score_fc.weight"]
        torch.save(checkpoint, path)
    elif how == "two parts":
        torch.save({"model": [{}, {}], "opt": {}}, path)
    elif how == "strange parts":
        torch.save({"model": [{"a.b": torch.zeros(1)}, {}, {}], "opt": {}}, path)
    return path


BROKEN = (
    "text", "empty", "truncated", "trojan", "bare pickle", "a tensor", "no options", "other size",
    "a weight missing", "two parts", "strange parts", "missing",
)  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_broken_checkpoints_are_refused(trained, tmp_path, how, monkeypatch, capsys):
    """In this process (one start of Python less a case); the command line's wrapper is included."""
    from evaluation import main

    folder, _ = trained
    good = folder / "runs/LHSC/checkpoint/model_best.pth.tar"
    path = broken_checkpoint(tmp_path, good, how)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["evaluation.py", "--model_path", str(path)])
    with pytest.raises(SystemExit) as exit_status:
        main()
    error = capsys.readouterr().err
    assert exit_status.value.code == 2
    assert len(error.splitlines()) == 1 and path.name in error
    assert not (tmp_path / "trojan ran").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data_name", "nowhere"], ["nowhere", "train_ims.npy", "make_scenes.py"]),
        (["--img_dim", "2048"], ["train_ims.npy", "img_dim is 8", "2048"]),
        (["--num_regions", "36"], ["train_ims.npy", "num_regions is 6", "36"]),
        (["--device", "cuda:99"], ["--device cuda:99"]),
        (["--device", "toaster"], ["--device toaster", "auto, cpu"]),
        (["--batch_size", "1"], ["--batch_size", "2 or more"]),
        (["--learning_rate", "nan"], ["--learning_rate"]),
        (["--drop_out", "1.5"], ["--drop_out"]),
        (["--padding", "none"], ["--padding", "released"]),
        (["--no_such_option"], ["--no_such_option"]),
    ],
)
def test_bad_training_input_ends_in_one_line(tiny, arguments, words):
    before = sorted(tiny.rglob("*"))
    refused(run(tiny, "train.py", *SMALL, *arguments), *words)
    assert sorted(tiny.rglob("*")) == before  # nothing written


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_without_cuda(tiny):
    refused(run(tiny, "train.py", *SMALL, "--device", "cuda"), "--device cuda", "no CUDA")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--split", "train2"], ["--split", "testall"]),
        (["--split", "testall"], ["testall_ims.npy", "data/tiny"]),
        (["--data_path", "elsewhere"], ["elsewhere/tiny"]),
        (["--vocab_path", "elsewhere"], ["elsewhere/tiny_vocab.json"]),
        (["--save_sims", "nowhere/s.npy"], ["nowhere/s.npy"]),
        (["--split", "dev", "--fold5", "--data_name", "odd"], ["--fold5", "9 images"]),
    ],
)
def test_bad_evaluation_input_ends_in_one_line(trained, arguments, words):
    folder, _ = trained
    write_split(folder / "data" / "odd", "dev", 9)
    refused(run(folder, "evaluation.py", *arguments), *words)


def test_another_vocabulary_is_refused(trained, tmp_path):
    folder, _ = trained
    shutil.copytree(folder / "vocab", tmp_path / "vocab")
    path = tmp_path / "vocab" / "tiny_vocab.json"
    vocab = Vocabulary.load(path)
    words = list(vocab.word2idx)
    Vocabulary([*words[:4], *reversed(words[4:])]).save(path)  # as many words, other numbers
    refused(run(folder, "evaluation.py", "--vocab_path", tmp_path / "vocab"), "not the vocabulary")


def test_intervals_are_printed_and_saved_and_runs_compared(trained):
    folder, _ = trained
    arguments = (
        "evaluation.py",
        "--bootstrap",
        200,
        "--save_metrics",
        "m.json",
        "--save_sims",
        "s.npy",
    )
    result = run(folder, *arguments)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((folder / "m.json").read_text())
    low, high = metrics["bootstrap"]["rsum"]
    assert low <= metrics["rsum"] <= high and metrics["bootstrap"]["samples"] == 200
    assert f"rsum {low:.1f} – {high:.1f}" in result.stdout
    np.save(folder / "worse.npy", -np.load(folder / "s.npy"))
    result = run(folder, "scripts/compare.py", "worse.npy", "s.npy", "--data_name", "tiny")
    assert result.returncode == 0, result.stderr
    first, second, difference = result.stdout.splitlines()
    rsums = [float(line.split()[-1]) for line in (first, second)]
    assert rsums[1] == pytest.approx(metrics["rsum"], abs=0.06)
    assert float(difference.split()[1].rstrip(",")) == pytest.approx(rsums[1] - rsums[0], abs=0.11)
    refused(run(folder, "evaluation.py", "--bootstrap", 1), "--bootstrap")
    refused(run(folder, "scripts/compare.py", "s.npy", "m.json", "--data_name", "tiny"), "m.json")


@pytest.mark.parametrize("script, missing", [
    ("train_f30k.sh", "f30k_precomp"), ("train_coco.sh", "coco_precomp"),
    ("eval_f30k.sh", "runs/f30k"), ("eval_coco.sh", "runs/coco"),
])  # fmt: skip
def test_the_papers_commands_are_real(tmp_path, script, missing):
    """Their options are understood; what they lack here is the data, or the model."""
    apart = shutil.ignore_patterns(".*", "tests", "runs", "data", "vocab")
    shutil.copytree(ROOT, tmp_path / "repo", ignore=apart)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", tmp_path / "repo/scripts" / script], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PATH": path, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    refused(result, missing)


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize("n_lines", [1, 100_000])  # left in the buffer, and more than a pipe holds
def test_a_reader_that_goes_away_ends_the_command_quietly(tmp_path, n_lines):
    """`| head` has read enough: status 141, as of a program that SIGPIPE ended, and no message."""
    (tmp_path / "lines.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from errors import one_line\n"
        "@one_line\n"
        "def main():\n"
        "    sys.stdin.read()  # until the reader has gone\n"
        f"    for i in range({n_lines}): print(i)\n"
        "main()\n"
    )
    command = subprocess.Popen(
        [sys.executable, "lines.py"], cwd=tmp_path, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=BUFFERED,
    )  # fmt: skip
    command.stdout.close()
    command.stdout = None
    _, told = command.communicate(timeout=60)
    assert (command.returncode, told) == (141, "")


def test_output_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "lines.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from errors import one_line\n"
        "one_line(lambda: print('a result'))()\n"
    )
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "lines.py"], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE,
            text=True, timeout=60, env=BUFFERED,
        )  # fmt: skip
    refused(result, "No space left")
