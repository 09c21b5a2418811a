"""train.py and evaluation.py as a user types them: what they write, print and return."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    GOLDENS,
    ROOT,
    RUN,
    SMALL,
    call,
    contents,
    load_split,
    log_of,
    refused,
    refuses,
    succeeded,
)

import evaluation
import run
import train
from checkpoint import load_checkpoint, load_latest
from evaluation import evalrank, evaluate, protocol
from metrics import qb_norm, retrieval_metrics
from model import LHSC
from scripts import export_model
from vocab import Vocabulary

BEST = RUN / "model_best.pth.tar"
OFFICIAL = GOLDENS / "legacy_py2_a.pth.tar"


def evaluated(trained, *arguments):
    """What evaluation.py prints in the folder of a trained model."""
    return succeeded(call(trained[0], evaluation.main, *arguments))


def test_training_leaves_what_it_says(trained):
    folder, output = trained
    assert sorted(file.name for file in (folder / RUN).iterdir()) == [
        "checkpoint_10.pth.tar", "checkpoint_20.pth.tar", "metrics.jsonl", "model_best.pth.tar",
    ]  # fmt: skip
    assert list((folder / "runs/LHSC/log").glob("events.out.tfevents.*"))
    assert "tiny_vocab.json: not found, built" in output and "official file" in output
    first = log_of(folder)[0]
    assert first["type"] == "run" and first["seed"] == 0
    assert first["arguments"]["embed_size"] == 16 and first["arguments"]["img_dim"] == 8
    assert {"versions", "commit", "hardware", "parameters"} <= first.keys()
    training, dev = log_of(folder, "train"), log_of(folder, "dev")
    assert training[-1]["loss"] < training[0]["loss"]
    assert [line["step"] for line in dev] == [7, 10, 14, 20]
    assert load_checkpoint(folder / BEST)["best_rsum"] == max(line["rsum"] for line in dev)


def test_a_checkpoint_is_plain(trained):
    """torch.load reads it without any class allowed."""
    checkpoint = torch.load(trained[0] / RUN / "checkpoint_20.pth.tar", weights_only=True)
    assert {"epoch", "Eiters", "best_rsum", "opt", "model", "optimizer"} <= checkpoint.keys()


def test_evaluation_as_a_program_needs_no_arguments(trained):
    command = [sys.executable, ROOT / "evaluation.py"]
    output = succeeded(subprocess.run(command, cwd=trained[0], capture_output=True, text=True))
    assert "tiny test, 10 images (10 images, 50 captions)" in output
    assert "image to text" in output and "rsum" in output


def test_saved_scores_and_metrics_agree_and_intervals_hold_them(trained, tmp_path):
    sims_file, metrics_file = tmp_path / "s.npy", tmp_path / "m.json"
    files = ["--save_sims", sims_file, "--save_metrics", metrics_file]
    output = evaluated(trained, *files, "--bootstrap", 200)
    sims, metrics = np.load(sims_file), json.loads(metrics_file.read_text())
    assert sims.shape == (10, 50) and sims.dtype == np.float32
    assert metrics.pop("protocol") == "tiny test, 10 images" and metrics.pop("qb_norm") == 0
    intervals = metrics.pop("bootstrap")
    low, high = intervals["rsum"]
    assert low <= metrics["rsum"] <= high and intervals["samples"] == 200
    assert f"rsum {low:.1f} – {high:.1f}" in output
    assert metrics == retrieval_metrics(sims, np.repeat(np.arange(10), 5))


def test_evalrank_returns_what_it_prints(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained[0])
    metrics = evalrank(BEST, split="dev", device="cpu")
    assert f"rsum {metrics['rsum']:.1f}" in capsys.readouterr().out
    assert metrics["rsum"] == pytest.approx(load_checkpoint(BEST)["best_rsum"])
    with pytest.raises(TypeError, match="no option splitt"):
        evalrank("x", splitt="dev")


def test_five_folds_with_and_without_the_whole_matrix(trained, tmp_path):
    metrics = []
    for extra in ([], ["--save_sims", tmp_path / "s.npy"]):
        output = evaluated(trained, "--fold5", "--save_metrics", tmp_path / "m.json", *extra)
        assert "mean of five folds of 2 images" in output
        metrics.append(json.loads((tmp_path / "m.json").read_text()))
    assert metrics[0] == metrics[1]


def test_qb_norm_takes_its_queries_from_the_training_split(trained, tmp_path, monkeypatch):
    """Here the training split is the test split, so that the bank's scores are the scores."""
    shutil.copytree(trained[0] / "data", tmp_path / "data")
    for file in (tmp_path / "data/tiny").glob("test*"):
        shutil.copy(file, file.with_name(file.name.replace("test", "train")))
    monkeypatch.setattr(evaluation, "BANK_CAPTIONS", 30)  # of 50; of ten images the first six
    files = ["--save_sims", tmp_path / "s.npy", "--save_metrics", tmp_path / "m.json"]
    for fold5, n in (([], 10), (["--fold5"], 2)):
        output = evaluated(
            trained, "--data_path", tmp_path / "data", "--qb_norm", 9, *files, *fold5
        )
        assert "QB-Norm 9" in output
        sims, metrics = np.load(tmp_path / "s.npy"), json.loads((tmp_path / "m.json").read_text())
        for k in range(10 // n):
            i, c = slice(k * n, k * n + n), slice(5 * k * n, 5 * (k * n + n))
            i2t = qb_norm(sims[i, c], sims[:6, c], 9)
            t2i = qb_norm(sims[i, c].T, sims[i, :30].T, 9).T
            expected = retrieval_metrics(i2t, np.arange(5 * n) // 5, t2i)
            found = metrics["folds"][k] if fold5 else {name: metrics[name] for name in expected}
            assert found == expected


def test_an_ensemble_averages_scores(trained, tmp_path):
    models = [RUN / f"checkpoint_{step}.pth.tar" for step in (10, 20)]
    for name, paths in (("a", models[:1]), ("b", models[1:]), ("ab", models)):
        out = evaluated(trained, "--save_sims", tmp_path / f"{name}.npy", "--model_path", *paths)
    assert "ensemble of 2" in out
    a, b, both = (np.load(tmp_path / f"{name}.npy") for name in ("a", "b", "ab"))
    np.testing.assert_allclose(both, (a + b) / 2, rtol=1e-6)


def test_the_same_seed_gives_the_same_run_and_nothing_is_overwritten(tiny):
    arguments = [*SMALL, "--num_epochs", 1, "--model_name", "again/c", "--logger_name", "again/l"]
    runs = []
    for seed in (0, 0, 1):
        succeeded(call(tiny, train.main, *arguments, "--seed", seed))
        runs.append(load_latest(tiny / "again/c")[1]["model"])
    first, same, other = runs
    assert all(torch.equal(first[name], same[name]) for name in same)
    assert not all(torch.equal(first[name], other[name]) for name in other)
    assert {p.name for p in (tiny / "again").iterdir()} == {"c", "l", "c.1", "l.1", "c.2", "l.2"}


@pytest.mark.parametrize("model, log", [("run", "run"), ("run", "run/log"), ("log/run", "log")])
def test_the_folders_of_a_run_may_lie_in_one_another(tiny, model, log):
    arguments = [*SMALL, "--num_epochs", 1, "--model_name", model, "--logger_name", log]
    for _ in range(2):
        succeeded(call(tiny, train.main, *arguments))
    assert (tiny / model / BEST.name).is_file()
    assert len([*tiny.rglob(BEST.name)]) == len([*tiny.rglob("events*")]) == 2


def test_only_runs_are_moved_aside_and_only_after_all_checks(tiny):
    for name, text in (("home/thesis.txt", "seven years"), ("old/model_best.pth.tar", "earlier")):
        (tiny / name).parent.mkdir()
        (tiny / name).write_text(text)
    vocab = tiny / "vocab/tiny_vocab.json"
    before = contents(tiny)
    for name in ("home", "data", "data/tiny", "vocab", ".", "..", "/", "", str(vocab)):
        for option, other in (("model_name", "logger_name"), ("logger_name", "model_name")):
            names = [f"--{option}", name, f"--{other}", "old"]
            refuses(tiny, train.main, *SMALL, *names, words=[str((tiny / name).resolve())])
    for wrong in (["--img_dim", "9"], ["--embed_size", "10000000"], ["--batch_size", "1"]):
        refuses(tiny, train.main, *SMALL, "--model_name", "old", *wrong)
    vocab.unlink()  # it would be built, but the folder is refused first
    refused(call(tiny, train.main, *SMALL, "--model_name", "home"), "holds thesis.txt")
    vocab.write_text("{}")
    refused(call(tiny, train.main, *SMALL, "--model_name", "old"), "tiny_vocab.json")
    assert contents(tiny).keys() == before.keys()


def test_official_options_train_the_official_way(tiny):
    output = succeeded(call(
        tiny, train.main, *SMALL, "--num_epochs", 1, "--padding", "official",
        "--val_captions", 23, "--no-bi_gru", "--no-max_violation", "--no_imgnorm", "--no_txtnorm",
        "--graph_layers", 1, "--text_layers", 0,
    ))  # fmt: skip
    assert "dev 5, 23" in output
    opt = load_latest(tiny / RUN)[1]["opt"]
    assert opt["padding"] == "official" and opt["bi_gru"] is False and opt["no_imgnorm"] is True


def test_an_official_checkpoint_gives_the_official_scores(tmp_path, golden, monkeypatch):
    """The golden images and captions as files, evaluated by the path alone, to 1e-5.

    All 24 captions fit one batch of 100 in file order, as they did in the official run. Golden
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
    monkeypatch.setattr(Vocabulary, "encode", lambda _, text: [int(w[1:]) for w in text.split()])
    where = {"data_name": "f30k_precomp", "vocab_path": tmp_path / "vocab", "device": "cpu"}
    evalrank(OFFICIAL, tmp_path / "data", split="test", save_sims=tmp_path / "s.npy", **where)
    assert load_checkpoint(OFFICIAL)["official"]
    np.testing.assert_allclose(np.load(tmp_path / "s.npy"), golden["eval/sims"], rtol=0, atol=1e-5)


def test_scores_all_alike_are_reported_with_a_warning(tiny, capsys):
    devset, vocab = load_split(tiny, "dev")
    sizes = {"img_dim": 8, "num_regions": 6, "embed_size": 8, "word_dim": 6, "sim_dim": 4}
    model = LHSC(len(vocab), **sizes).eval()
    torch.nn.init.zeros_(model.similarity.score_fc.weight)
    evaluate([model], devset, torch.device("cpu"))
    assert "the model has collapsed" in capsys.readouterr().err


def test_protocols_have_names():
    assert protocol("f30k_precomp", "test", 1000, False) == "F30K 1K"
    assert protocol("coco_precomp", "testall", 5000, False) == "COCO 5K"
    assert protocol("coco_precomp", "testall", 5000, True).startswith("COCO 1K, mean of five")
    assert "not comparable" in protocol("coco_precomp", "test", 1000, False)


def test_an_exported_model_needs_nothing_else(trained, tmp_path):
    checkpoint = load_checkpoint(trained[0] / BEST)
    large = "image_encoder.graph.layers.0.bn.running_var"  # which half precision cannot hold
    checkpoint["model"][large].mul_(1e7)
    torch.save(checkpoint, tmp_path / "large.pth.tar")
    succeeded(call(trained[0], export_model.main, tmp_path / "large.pth.tar", tmp_path / "large"))
    exported = load_checkpoint(tmp_path / "large/model.pth.tar")["model"][large]
    assert torch.equal(exported, checkpoint["model"][large])
    succeeded(call(trained[0], export_model.main, BEST, tmp_path / "mine"))
    model, data = tmp_path / "mine/model.pth.tar", trained[0] / "data"
    evaluated(trained, "--save_sims", tmp_path / "before.npy")
    options = ["--model_path", model, "--data_path", data, "--save_sims", "after.npy"]
    succeeded(call(tmp_path, evaluation.main, *options))
    before, after = (np.load(tmp_path / f"{name}.npy") for name in ("before", "after"))
    assert 0 < np.abs(before - after).max() < 1e-3  # half precision
    assert {x.dtype for x in torch.load(model)["model"].values()} == {torch.float16, torch.int64}
    refused(call(trained[0], export_model.main, "nothing", tmp_path / "mine"), "nothing")
    del checkpoint["vocab"]  # as in the authors' own
    torch.save(checkpoint, tmp_path / "large.pth.tar")
    other = call(trained[0], export_model.main, tmp_path / "large.pth.tar", tmp_path / "other")
    refused(other, "holds no vocab")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name, data", [("f30k", "f30k_precomp"), ("coco", "coco_precomp")])
def test_the_papers_commands_are_real(tmp_path, name, data):
    """Its options are understood: `python` is a program that only notes what it was given."""
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/commands\n')
    (tmp_path / "python").chmod(0o700)
    (tmp_path / f"runs/{name}-s1/checkpoint").mkdir(parents=True)
    (tmp_path / f"runs/{name}-s1/checkpoint/metrics.jsonl").touch()
    script = shutil.copytree(ROOT / "scripts", tmp_path / "scripts") / "reproduce.sh"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", script, name, "--seed", "1"], env=environment, check=True)
    commands = [line.split() for line in (tmp_path / "commands").read_text().splitlines()]
    (training,) = (options for program, *options in commands if program == "train.py")
    opt = train.parse(training)
    assert (opt.data_name, opt.num_epochs, opt.seed) == (data, 50, 1)
    for options in (options for program, *options in commands if program == "evaluation.py"):
        model = evaluation.options().parse_args(options).model_path
        assert model == [f"{opt.model_name}/model_best.pth.tar"]


@pytest.mark.parametrize("error", ["ImportError", "TypeError"])
def test_training_does_without_tensorboard(tmp_path, monkeypatch, capsys, error):
    """Without its package, or where something else has loaded protobuf in another way before."""
    (tmp_path / "tensorboard_logger.py").write_text(f"raise {error}('no such thing\\nand more')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorboard_logger", raising=False)
    assert run.tensorboard_logger(str(tmp_path)) is None
    assert capsys.readouterr().err == "note: no TensorBoard scalars (no such thing)\n"
