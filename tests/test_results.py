"""The tables come from logs, and the logs from ablations.py."""

import json
import shutil

import ablations
import make_scenes
import pytest
from conftest import call, refused, succeeded
from diagnose import KINDS
from PIL import Image

import results
import train

MARKS = "\n{0}:\n<!-- {0}: begin -->\nold\n<!-- {0}: end -->\n"


def write_run(folder, seed, rsum):
    """The logs of a run: 600 steps of half a second, two epochs; seed 1 was resumed for them."""
    recalls = {"r1": rsum / 10}
    arguments = {"embed_size": 8, "seed": seed, "num_epochs": 2 - seed, f"only_{seed}_has": True}
    arguments["encoders"] = f"runs/scan-s{seed}/checkpoint/model_best.pth.tar"
    lines = [{"type": "run", "seed": seed, "hardware": {"device": "a CPU"},
              "parameters": 1_230_000, "arguments": arguments}]  # fmt: skip
    for epoch in (0, 1):
        place = {"epoch": epoch, "step": 300 * (1 + epoch)}
        dev = {"rsum": rsum + 10 - epoch, "i2t": recalls, "t2i": recalls}
        lines += [{"type": "train", "batch_time": 0.5, "loss": 9.0} | place]
        lines += [{"type": "dev"} | place | dev]
    lines += [{"type": "resume", "arguments": arguments | {"num_epochs": 2}}] * seed
    test = {"i2t": recalls, "t2i": recalls, "rsum": rsum, "protocol": "F30K 1K",
            "bootstrap": {"rsum": [rsum - 5, rsum + 7]}}  # fmt: skip
    diagnosis = {kind: {"accuracy": rsum - 20} for kind in KINDS}
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "test.json").write_text(json.dumps(test))
    (folder / "test-qb.json").write_text(json.dumps(test | {"rsum": rsum + 6}))
    (folder / "diagnosis.json").write_text(json.dumps(diagnosis))
    return test


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repo's README, results and fig folders, with made-up logs."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    folder = tmp_path / "results"
    write_run(folder / "paper/f30k-s1", 1, 480.0)
    for name in ("flickr8k", "scenes"):
        for variant, seed, rsum in (("lhsc", 0, 100.0), ("lhsc", 1, 104.0), ("vse", 0, 90.0)):
            test = write_run(folder / name / f"{variant}-s{seed}", seed, rsum)
    cca = test | {"dev_rsum": 14.0, "parameters": 20_000}
    (folder / "flickr8k/cca.json").write_text(json.dumps(cca))
    (folder / "flickr8k/cca-qb.json").write_text(json.dumps(cca | {"rsum": 95.0}))
    (folder / "flickr8k/ensemble.json").write_text(json.dumps(test))
    (folder / "flickr8k/ensemble-qb.json").write_text(json.dumps(test | {"rsum": 96.0}))
    (folder / "flickr8k/vse-s0/test-qb.json").unlink()
    for variant, rsum in (("vse-modern", 95.0), ("scan-modern", 96.0), ("modern", 98.0)):
        write_run(folder / f"flickr8k/{variant}-s0", 0, rsum)
    late = {"type": "dev", "epoch": ablations.RECIPE_EPOCHS, "step": 9999, "rsum": 200.0}
    with (folder / "flickr8k/vse-modern-s0/metrics.jsonl").open("a") as log:
        log.write(json.dumps(late | {"i2t": {"r1": 1.0}, "t2i": {"r1": 1.0}}) + "\n")
    write_run(folder / "recipe/ema-s0", 0, 80.0)
    (folder / "recipe/ema-s0/test.json").unlink()
    what = "training step, batch 128, paper size (D 1024, S 256)"
    steps = [{"what": what, "way": way, "seconds": seconds}
             for way, seconds in (("official loop", 3.0), ("fp32", 1.5))]  # fmt: skip
    (folder / "speed").mkdir()
    speed = {"machine": {"device": "a CPU", "torch": "2"}, "training": steps}
    (folder / "speed/cpu.json").write_text(json.dumps(speed))
    (tmp_path / "fig").mkdir()
    (tmp_path / "README.md").write_text(f"head{MARKS.format('results')}tail\n")
    marks = map(MARKS.format, ("flickr8k", "recipe", "scenes", "paper", "speed"))
    (folder / "README.md").write_text("".join(marks))
    return tmp_path


def test_tables_and_figures_are_written_and_checked(root):
    assert call(root, results.main, "--check").returncode == 1
    succeeded(call(root, results.main, "--write"))
    succeeded(call(root, results.main, "--check"))
    short, text = (root / "README.md").read_text(), (root / "results/README.md").read_text()
    assert short.startswith("head\n") and short.endswith("tail\n")
    assert "old" not in short + text and text.count("begin -->") == 5
    row = "| LHSC, official recipe | 2 | 10.2 ± 0.3 | 10.2 ± 0.3 | **102.0 ± 2.8** | 108.0 ± 2.8 |"
    assert f"{row}\n" in short
    for row in (
        "| linear CCA, mean region and words | – | 9.0 | 9.0 | 14.0 | **90.0** "
        "| 85.0 – 97.0 | 95.0 | – | 0.02 M | – | – |",
        "| LHSC, `--recipe modern`, ensemble of two seeds | – | 9.0 | 9.0 | – | **90.0** "
        "| 85.0 – 97.0 | 96.0 | – | – | – | – |",
        "| LHSC, official recipe | 2 | 10.2 ± 0.3 | 10.2 ± 0.3 | 112.0 ± 2.8 | **102.0 ± 2.8** "
        "| 97.0 – 109.0 | 108.0 ± 2.8 | 2 | 1.23 M | 5.0 min | a CPU |",
        "| LHSC | 2 |" + 5 * " 82.0 ± 2.8 |" + " 102.0 ± 2.8 | 1.23 M | 5.0 min | a CPU |",
        "| 85.0 – 97.0 | – | 2 | 1.23 M | 5.0 min | a CPU |",
        "| VSE++ | 1 |" + 5 * " 70.0 |" + " 90.0 | 1.23 M | 5.0 min | a CPU |",
        "| f30k-s1: F30K 1K | 1 | 48.0 | 48.0 | 490.0 | **480.0** | 475.0 – 487.0 |",
        "| VSE++, `--recipe modern` | 1 | 9.5 | 9.5 | 200.0 | **95.0** "
        f"| 90.0 – 102.0 | 101.0 | {ablations.RECIPE_EPOCHS + 1} | 1.23 M | 5.0 min | a CPU |",
        "| 93.0 – 105.0 | 104.0 | 4 | 1.23 M | 10.0 min | a CPU |",  # with that of the encoders
        "| the whole recipe | 1 | 105.0 |",  # by as many epochs as the other has
        "| without averaged weights | 1 | 90.0 |",
        "| on | precision | a step | Flickr30K, 56,650 steps | MS-COCO, 221,300 steps |",
        "| a CPU | fp32 | 1.50 s | 24 h | 92 h |",
        "| training step, batch 128, paper size (D 1024, S 256) | fp32 | 1.5 |",
    ):
        assert f"{row}\n" in text
    for name in ("flickr8k", "scenes"):
        with Image.open(root / f"fig/{name}.png") as picture:
            assert min(picture.size) > 100


def test_what_is_not_measured_is_said(root):
    shutil.rmtree(root / "results/flickr8k")
    succeeded(call(root, results.main, "--write"))
    assert "begin -->\nNot measured yet.\n<!-- results: end" in (root / "README.md").read_text()
    (root / "results/scenes/vse-s0/test.json").unlink()
    refused(call(root, results.main, "--write"), "vse-s0: no test.json")


@pytest.mark.parametrize("name, old, new, words", [
    ("flickr8k/lhsc-s1/metrics.jsonl", '"embed_size": 8', '"embed_size": 9', ["--embed_size"]),
    ("flickr8k/lhsc-s1/metrics.jsonl", '"dev"', "dev", ["metrics.jsonl, line 3"]),
    ("README.md", "scenes: end", "", ["README.md", "scenes: end"]),
])  # fmt: skip
def test_logs_that_cannot_be_used_are_named(root, name, old, new, words):
    path = root / "results" / name
    path.write_text(path.read_text().replace(old, new))
    refused(call(root, results.main, "--write"), *words)


def test_the_tables_of_this_repo_are_those_of_its_logs(tmp_path):
    succeeded(call(tmp_path, results.main, "--check"))


def test_ablations_go_on_where_they_were(tmp_path):
    """The commands are real, the logs are kept, and what is done is left out."""
    make_scenes.make_scenes(tmp_path / "data", 0, {"train": 14, "dev": 4, "test": 4})
    ablate = [tmp_path, ablations.main, "scenes", "--results", "results", "--only"]
    listed = succeeded(call(*ablate, "vse", "--seeds", 4, "--list"))
    assert "--similarity vse" in listed and "--seed 4" in listed and "--resume" not in listed
    modern = [tmp_path, ablations.main, "flickr8k", "--only=modern", "--seeds=4"]
    listed = succeeded(call(*modern, "--list"))
    assert "--encoders runs/ablations/flickr8k/scan-modern-s4/checkpoint/model_best" in listed
    assert "modern-s4: needs runs/ablations/flickr8k/scan-modern-s4" in call(*modern).stderr
    done = call(*ablate, "vse", "--seeds", 4)
    assert done.returncode == 0, (tmp_path / "runs/ablations/scenes/vse-s4/output.txt").read_text()
    kept = tmp_path / "results/scenes/vse-s4"
    assert {p.name for p in kept.iterdir()} == {"metrics.jsonl", "test.json", "diagnosis.json"}
    assert json.loads((kept / "test.json").read_text())["bootstrap"]["samples"] == 1000
    assert "0 of 0 runs" in succeeded(call(*ablate, "vse", "--seeds", 4))
    (kept / "test.json").unlink()  # as if stopped here
    assert "--resume" in succeeded(call(*ablate, "vse", "--seeds", 4, "--list"))
    refused(call(*ablate, "sgr"), "sgr", "lhsc")


def test_a_run_that_fails_without_data_is_named(tmp_path):
    result = call(tmp_path, ablations.main, "scenes", "--only=vse", "--seeds=0", "--results=logs")
    assert result.returncode == 1 and "0 of 1 runs done" in result.stdout
    assert "vse-s0: failed, see runs/ablations/scenes/vse-s0/output.txt" in result.stderr


@pytest.mark.parametrize("name", ablations.SETS)
def test_every_variant_is_a_command_of_train(name):
    """Its options are understood by train.py."""
    a_set = ablations.SETS[name]
    for _, options in a_set.variants.values():
        train.options().parse_args([*a_set.common.split(), *options.split()])
