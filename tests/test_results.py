"""The README's tables come from logs."""

import json

import pytest
from conftest import ROOT
from diagnose import KINDS
from PIL import Image
from test_commands import refused, run


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "a run"
    folder.mkdir(parents=True)
    lines = [
        {"type": "run", "seed": 3, "hardware": {"device": "a CPU", "threads": 2}},
        {"type": "train", "epoch": 0, "step": 100, "batch_time": 18.0},
        {"type": "dev", "epoch": 0, "step": 100, "rsum": 100.0},
        {"type": "train", "epoch": 1, "step": 150, "batch_time": 36.0},
        {"type": "dev", "epoch": 1, "step": 150, "rsum": 90.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ranks = {"r1": 10.04, "r5": 20.0, "r10": 30.0, "medr": 5.0, "meanr": 9.0}
    test = {"i2t": ranks, "t2i": ranks, "rsum": 120.08, "protocol": "X 1K"}
    (folder / "test.json").write_text(json.dumps(test))
    part = {"seconds": 1.5, "saved_activations": 4e9, "peak_memory": None}
    figures = {
        "machine": {"device": "a CPU", "threads": 2, "torch": "2.0"},
        "training": {"batch": 128, "ratio": 2.5, "loop": part | {"seconds": 3.75}, "ours": part},
    }
    (tmp_path / "results" / "speed").mkdir()
    (tmp_path / "results" / "speed" / "cpu.json").write_text(json.dumps(figures))
    seconds = {"all": 0.034, "encode": 0.004, "candidates": 0.01}
    timed = {"n_images": 9000, "bytes": 2e9, "build_seconds": 7, "seconds": seconds}
    ways = {way: {"10": {"r1": 1.0, "r10": 2.0, "top10_kept": 30}} for way in ("product", "cosine")}
    recall = {"data": "X test", "all": {"r1": 3.0, "r10": 4.0}} | ways
    searched = {"machine": {"device": "a CPU", "threads": 2}, "recall": [recall], "time": [timed]}
    (tmp_path / "results" / "search").mkdir()
    (tmp_path / "results" / "search" / "cpu.json").write_text(json.dumps(searched))
    shared = {"machine": {"device": "a CPU", "cpu": True, "torch": "2.0"}, "batch_size": 64,
              "runs": [{"processes": n, "seconds": 8.0 / n} for n in (1, 2)]}  # fmt: skip
    (tmp_path / "results" / "distributed").mkdir()
    (tmp_path / "results" / "distributed" / "cpu.json").write_text(json.dumps(shared))
    for variant, seed, rsum in (("lhsc", 0, 100.0), ("lhsc", 1, 104.0), ("vse", 0, 90.0)):
        write_variant(tmp_path / "results", variant, seed, rsum)
    readme = tmp_path / "README.md"
    readme.write_text(
        "head\n<!-- results: begin -->\nold\n<!-- results: end -->\nbetween\n"
        "<!-- speed: begin -->\nold\n<!-- speed: end -->\n"
        "<!-- distributed: begin -->\nold\n<!-- distributed: end -->\n"
        "<!-- search: begin -->\nold\n<!-- search: end -->\n"
        "<!-- flickr8k: begin -->\nold\n<!-- flickr8k: end -->\n"
        "<!-- scenes: begin -->\nold\n<!-- scenes: end -->\n"
        "<!-- experiments: begin -->\nold\n<!-- experiments: end -->\ntail\n"
    )
    return tmp_path


def write_variant(results, variant, seed, rsum):
    """A run of ablations.py on both of its data sets."""
    header = {"type": "run", "seed": seed, "hardware": {"device": "a CPU", "threads": 1},
              "parameters": 1_230_000, "arguments": {"embed_size": 8, "seed": seed}}  # fmt: skip
    lines = [header, {"type": "train", "epoch": 0, "step": 600, "batch_time": 0.5},
             {"type": "dev", "epoch": 0, "step": 600, "rsum": rsum + 10}]  # fmt: skip
    ranks = {"r1": rsum / 10, "r5": 20.0, "r10": 30.0, "medr": 5.0, "meanr": 9.0}
    test = {"i2t": ranks, "t2i": ranks, "rsum": rsum, "protocol": "X",
            "bootstrap": {"samples": 100, "rsum": [rsum - 5, rsum + 7]}}  # fmt: skip
    kinds = {kind: {"accuracy": rsum - 20, "questions": 9} for kind in KINDS}
    for name in ("flickr8k", "scenes"):
        folder = results / name / f"{variant}-s{seed}"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        (folder / "test.json").write_text(json.dumps(test))
    (folder / "diagnosis.json").write_text(json.dumps(kinds))


def command(folder, *arguments):
    return run(folder, "scripts/results.py", "--results", "results", "--readme", "README.md",
               *arguments)  # fmt: skip


def test_the_table_is_written_and_checked(results):
    assert command(results, "--check").returncode == 1
    assert command(results, "--write").returncode == 0
    text = (results / "README.md").read_text()
    assert text.startswith("head\n") and text.endswith("tail\n") and "old" not in text
    assert "\nbetween\n" in text
    assert "| training step, batch 128, here | 1.50 s | 2.50× | 4.00 GB saved" in text
    assert "| 2 | 4.00 s | 2.00× | 100% |" in text
    assert "| 9,000 | 2.00 GB | 7 s | 34 ms | 4 ms | 10 ms | 20 ms |" in text
    assert "| 1.0 / 2.0 (30 %) | – | – | – | – | 3.0 / 4.0 |" in text
    assert ("| a run | X 1K | 10.0 / 20.0 / 30.0 | 10.0 / 20.0 / 30.0 | **120.1** | 100.0 "
            "| 2, 1.1 h | a CPU, 2 threads | 3 |") in text  # fmt: skip
    assert ("| LHSC | 2 | 10.2 ± 0.3 | 10.2 ± 0.3 | 112.0 ± 2.8 | **102.0 ± 2.8** | 97.0 – 109.0 "
            "| 1.23 M | 5.0 min |") in text  # fmt: skip
    assert "| VSE++ | 1 | 9.0 | 9.0 | 100.0 | **90.0** | 85.0 – 97.0 | 1.23 M | 5.0 min |" in text
    assert ("| LHSC | 2 | 82.0 ± 2.8 | 82.0 ± 2.8 | 82.0 ± 2.8 | 82.0 ± 2.8 | 82.0 ± 2.8 "
            "| 102.0 ± 2.8 | 1.23 M | 5.0 min |") in text  # fmt: skip
    assert "| Flickr30K | `bash scripts/train_f30k.sh` |" in text and "56,650" in text
    assert "Flickr30K 24 h" in text  # 1.5 s a step
    assert command(results, "--check").returncode == 0
    for name in ("scenes.png", "flickr8k.png"):
        with Image.open(results / "fig" / name) as picture:
            assert min(picture.size) > 100


def test_seeds_of_a_variant_differ_in_nothing_else(results):
    path = results / "results/flickr8k/lhsc-s1/metrics.jsonl"
    path.write_text(path.read_text().replace('"embed_size": 8', '"embed_size": 9'))
    refused(command(results, "--write"), "lhsc", "different options")


def test_a_log_older_than_an_option_has_its_default(results):
    path = results / "results/flickr8k/lhsc-s1/metrics.jsonl"
    text = path.read_text()
    path.write_text(text.replace('"embed_size": 8', '"embed_size": 8, "precision": "fp32"'))
    assert command(results, "--write").returncode == 0
    path.write_text(text.replace('"embed_size": 8', '"embed_size": 8, "precision": "bf16"'))
    refused(command(results, "--write"), "lhsc", "different options")


def test_the_linear_floor_is_the_last_row(results):
    path = results / "results/flickr8k/cca.json"
    ranks = {"r1": 1.0, "r5": 2.0, "r10": 3.0}
    found = {"i2t": ranks, "t2i": ranks, "rsum": 12.0, "dev_rsum": 14.0, "parameters": 20_000}
    path.write_text(json.dumps(found | {"bootstrap": {"rsum": [11, 13]}}))
    assert command(results, "--write").returncode == 0
    row = ("| linear CCA, mean region and words | – | 1.0 | 1.0 | 14.0 | **12.0** | 11.0 – 13.0 "
           "| 0.02 M | closed form |")  # fmt: skip
    assert f"{row}\n<!-- flickr8k: end -->" in (results / "README.md").read_text()
    path.write_text("{}")
    refused(command(results, "--check"), "cca.json")


def test_a_variant_without_its_diagnosis_is_refused(results):
    (results / "results/scenes/vse-s0/diagnosis.json").unlink()
    refused(command(results, "--write"), "vse-s0", "diagnosis.json")


def test_a_run_without_its_logs_is_refused(results):
    (results / "results" / "a run" / "test.json").unlink()
    refused(command(results, "--check"), "a run", "test.json")


def test_what_is_no_benchmark_is_refused(results):
    (results / "results" / "speed" / "cpu.json").write_text("{}")
    refused(command(results, "--check"), "speed", "training")


def test_this_readme_and_these_logs_agree():
    result = run(ROOT, "scripts/results.py", "--check")
    assert result.returncode == 0, result.stderr
