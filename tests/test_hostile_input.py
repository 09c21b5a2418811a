"""Files and options that are wrong in every way: one line, exit 2, nothing written, nothing run.

What is read all the same is read rightly. The broken files are drawn at random, the same ones in
every run.
"""

import io
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, contents, refused, write_split

import evaluation
import train
from baselines import build_model
from checkpoint import save_checkpoint
from vocab import build_from_data

OPTIONS = {
    "img_dim": 8, "num_regions": 6, "embed_size": 4, "word_dim": 3, "sim_dim": 2, "num_layers": 1,
    "bi_gru": True, "graph_layers": 1, "text_layers": 1, "drop_out": 0.0, "embed_dropout": 0.1,
    "pool_dropout": 0.1, "no_imgnorm": False, "no_txtnorm": False, "padding": "masked",
    "similarity": "lhsc",
}  # fmt: skip
DATA = {"data_path": "data", "data_name": "tiny", "vocab_path": "vocab", "val_captions": 0}
MODEL, VOCAB = "model.pth.tar", "vocab/tiny_vocab.json"
IMAGES, CAPTIONS, IDS = (f"data/tiny/test_{x}" for x in ("ims.npy", "caps.txt", "ids.txt"))


@pytest.fixture
def place(tmp_path):
    """A folder with a data set, its vocabulary and a model, all whole."""
    for split in ("train", "dev", "test"):
        write_split(tmp_path / "data/tiny", split, 6)
    vocab = build_from_data(tmp_path / "data", "tiny", threshold=2)
    vocab.save(tmp_path / VOCAB)
    opt = OPTIONS | {"vocab_size": len(vocab)}
    content = {"opt": opt | DATA, "model": build_model(**opt).state_dict()}
    save_checkpoint(content | {"vocab": vocab.fingerprint()}, tmp_path / MODEL)
    return tmp_path


def attempt(folder, main, *arguments):
    """Run a command; what it prints, or None if it refused. The folder stays as it is."""
    before = contents(folder)
    result = call(folder, main, *arguments)
    assert contents(folder) == before
    if result.returncode == 0:
        return result.stdout
    refused(result)
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()[-1]) < 1000
    return None


def evaluate(folder, *arguments):
    usual = ["--model_path", MODEL, "--device", "cpu", "--matmul", "default"]
    return attempt(folder, evaluation.main, *usual, *arguments)


def broken(content, rng):
    """`content` with one to three bytes or pieces changed, often near its start."""
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(rng.choice([min(400, len(content)), len(content)]) + 1))
        size = int(rng.integers(1, 40))
        start, piece, rest = content[:at], content[at : at + size], content[at + size :]
        flipped = bytes(byte ^ (1 << rng.integers(8)) for byte in piece[:1]) + piece[1:]
        new = [flipped, rng.bytes(size), piece + rng.bytes(size), b"", bytes(size)]
        cut = rng.integers(6) == 0
        content = start if cut else start + new[rng.integers(len(new))] + rest
    return content


@pytest.mark.parametrize("name", [MODEL, VOCAB, IMAGES, CAPTIONS, IDS])
def test_broken_files_are_refused_or_read_rightly(place, name):
    rng, whole, read = np.random.default_rng(0), (place / name).read_bytes(), 0
    assert "rsum" in (expected := evaluate(place))
    for _ in range(60):
        (place / name).write_bytes(broken(whole, rng))
        printed = evaluate(place)
        if printed is not None:
            read += 1
            # A checkpoint has checksums, and the ids do not matter here.
            assert printed == expected or name not in (MODEL, IDS)
    assert read < 60


class Trojan:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


RUNS = pickle.dumps(Trojan(), 2)


def stored(content):
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


def trojan_archive(content):
    """A whole checkpoint but for its pickle, which would run code."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(stored(content))) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, RUNS if name.endswith("data.pkl") else old.read(name))
    return target.getvalue()


def wrong_models(raw):
    """Checkpoints that are whole files, and yet no such models."""
    opt, weights = raw["opt"], raw["model"]
    first = min(weights)
    yield from (b"hello", RUNS, trojan_archive(raw))
    yield from map(stored, (torch.ones(3), [1, 2], {"opt": opt}, {"model": weights}))
    for change in (
        {"more": Trojan()}, {"opt": 3}, {"model": 3}, {"model": {}}, {"model": [{}, {}]},
        {"model": [{}, {}, {}]}, {"model": [weights] * 3}, {"model": [{"a.b": torch.ones(1)}] * 3},
        {"model": {name: weights[name] for name in weights if name != first}},
        {"model": weights | {"x": torch.ones(1)}}, {"model": weights | {first: 3}},
        {"vocab": "of others"},
    ):  # fmt: skip
        yield stored(raw | change)
    for change in (torch.complex64, torch.int64, torch.bool, torch.Tensor.to_sparse):
        convert = change if callable(change) else lambda x, kind=change: x.to(kind)
        yield stored(raw | {"model": {name: convert(x) for name, x in weights.items()}})
    for name, value in opt.items():
        values = [10**9, 10**12, 0, -1] if type(value) is int and name != "val_captions" else []
        for wrong in (None, [value], b"x", 2.5j, *values, *([7.0] if type(value) is float else [])):
            yield stored(raw | {"opt": opt | {name: wrong}})
        if name in OPTIONS:
            yield stored(raw | {"opt": {x: opt[x] for x in opt if x != name}})
    for change in ({"similarity": "sgr"}, {"padding": "none"}):
        yield stored(raw | {"opt": opt | change})


def test_wrong_models_are_refused_and_never_run(place):
    for content in wrong_models(torch.load(place / MODEL, weights_only=True)):
        (place / MODEL).write_bytes(content)
        assert evaluate(place) is None


BAD_TRAINING = {
    "num_epochs batch_size embed_size sim_dim word_dim num_layers log_step val_step save_step keep "
    "img_dim num_regions": ["0", "-3", "x", "1.5", "", str(2**70)],
    "drop_out embed_dropout pool_dropout ema learning_rate margin grad_clip": ["-1", "nan", "inf"],
    "seed": ["-1", "x", "1e3", str(2**64 + 1)], "device": ["tpu", "cuda:x", "cuda:99", "", "meta"],
    "data_name": ["nothing", "", "../x", "a\nb", "ü", " "], "data_path": ["nowhere", IMAGES, ""],
    "model_name": ["data", ".", MODEL, f"{MODEL}/below"], "resume": ["nowhere", MODEL, "data"],
    "embed_size": ["10000000", str(2**62)], "sim_dim": [str(10**12)], "learning_rate": ["1e300"],
    "workers": ["-1"], "img_dim": ["9"], "num_regions": ["5"], "padding": ["none"],
    "batch_size": ["1"], "embed unknown": ["1"], "ema drop_out": ["1"], "lr_update": ["-1"],
    "recipe": ["best"], "similarity": ["sgr"],
}  # fmt: skip
BAD_EVALUATION = {
    "model_path": ["nowhere", "data", "", VOCAB], "split": ["train", "", "testall"],
    "data_name": ["nothing"], "data_path": ["nowhere"], "vocab_path": ["nowhere", "data"],
    "device": ["tpu"], "precision": ["fp8"], "fold5": ["yes"], "bootstrap": ["-1", "x"],
    "qb_norm": ["-1", "x"],
    "save_sims": ["no/where.npy", "data", "x" * 300], "save_metrics": ["no/where.json", ".", ""],
    "unknown": ["1"],
}  # fmt: skip


def pairs(table):
    return [(f"--{name}", v) for names, values in table.items() for name in names.split()
            for v in values]  # fmt: skip


def test_bad_options_are_refused(place):
    usual = ["--data_name", "tiny", "--workers", "0", "--device", "cpu", "--matmul", "default"]
    for pair in pairs(BAD_TRAINING):
        assert attempt(place, train.main, *usual, *pair) is None, pair
    for pair in pairs(BAD_EVALUATION):
        assert evaluate(place, *pair) is None, pair
    assert evaluate(place, "--save_sims", "x", "--save_metrics", "x") is None
    assert evaluate(place, "--fold5") is None  # of six images


@pytest.mark.parametrize("name", ["with space", "ünï©ødé", "日本", "-dash", "a'b\"c", "x" * 200])
def test_strange_paths_work(place, name):
    (place / name).mkdir()
    shutil.copy(place / MODEL, place / name)
    for link in ("data", "vocab"):
        (place / name / link).symlink_to(place / link)
    paths = ["--data_path", f"{place / name}/data", "--vocab_path", f"{place / name}/vocab"]
    assert "6 images" in evaluate(place, "--model_path", place / name / MODEL, *paths)
