"""The README's tables come from logs."""

import json

import pytest
from conftest import ROOT
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
    readme = tmp_path / "README.md"
    readme.write_text(
        "head\n<!-- results: begin -->\nold\n<!-- results: end -->\nbetween\n"
        "<!-- speed: begin -->\nold\n<!-- speed: end -->\n"
        "<!-- distributed: begin -->\nold\n<!-- distributed: end -->\n"
        "<!-- search: begin -->\nold\n<!-- search: end -->\ntail\n"
    )
    return tmp_path


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
    assert command(results, "--check").returncode == 0


def test_a_run_without_its_logs_is_refused(results):
    (results / "results" / "a run" / "test.json").unlink()
    refused(command(results, "--check"), "a run", "test.json")


def test_what_is_no_benchmark_is_refused(results):
    (results / "results" / "speed" / "cpu.json").write_text("{}")
    refused(command(results, "--check"), "speed", "machine")


def test_this_readme_and_these_logs_agree():
    result = run(ROOT, "scripts/results.py", "--check")
    assert result.returncode == 0, result.stderr
