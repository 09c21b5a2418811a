"""The benchmark measures what it says; at sizes at which the figures themselves mean nothing."""

import json

import benchmark
import pytest
import torch
from conftest import ROOT
from test_commands import refused, run, trained  # noqa: F401 (a fixture)

CPU = torch.device("cpu")
MACHINE = {"machine": {"device": "a CPU", "threads": 2, "torch": "2.0"}}


@pytest.fixture(scope="module")
def small():
    """The two models at a small size."""
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"R": 5, "IMG_DIM": 12, "D": 16, "S": 8, "WORD_DIM": 10, "VOCAB": 50}
        for name, size in sizes.items():
            patch.setattr(benchmark, name, size)
        yield benchmark.models(CPU)


def test_both_models_have_the_same_weights(small):
    released, ours = small
    captions, lengths = torch.randint(4, 50, (3, 6)), torch.tensor([6, 6, 6])
    images = torch.randn(4, 5, 12)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(images, captions, lengths), released(images, captions, lengths)
        )


def test_scoring(small):
    result = benchmark.scoring(*small, CPU, quick=True)
    assert {"loop", "fp32", "bf16", "matmul"} <= result.keys()
    assert result["fp32"]["largest_difference"] < 1e-5 and result["fp32"]["same_rank_order"]
    assert 0 < result["bf16"]["largest_difference"] < 1e-2
    assert result["loop"]["ratio"] == 1 and result["fp32"]["ratio"] > 0


def test_operations_count_the_matrix_products(monkeypatch):
    for name, size in {"R": 36, "D": 1024, "S": 256}.items():
        monkeypatch.setattr(benchmark, name, size)
    lengths = torch.tensor([3, 5])
    per_word, per_caption = 4 * 36 * 1024 + 2 * 1024 * 256, 2 * 1024 * 256
    assert benchmark.operations(10, lengths) == 10 * (8 * per_word + 2 * per_caption)


def test_training_and_encoding(small, monkeypatch):
    monkeypatch.setattr(
        benchmark, "random_dataset", lambda n, _, f=benchmark.random_dataset: f(8, 40)
    )
    training = benchmark.training(*small, CPU, quick=True)
    assert training["saved_ratio"] > 1 and training["ratio"] > 0
    assert training["bf16"]["saved_activations"] < training["ours"]["saved_activations"]
    assert "`--precision bf16`" in benchmark.markdown({"training": training} | MACHINE)
    assert not small[1].similarity.mixed  # as it was
    encoding = benchmark.encoding(*small, CPU, quick=True)
    assert encoding["memory_ratio"] > 3
    assert small[1].text_encoder.padding == "released"  # as it was


def test_evaluation_is_timed_in_its_own_process(small, monkeypatch):
    monkeypatch.setattr(benchmark, "N_EVALUATION", 12)
    result = benchmark.evaluation(*small, CPU, quick=False)
    assert result["seconds"] > result["encode_seconds"] + result["score_seconds"] > 0
    assert result["peak_memory"] > 50e6


def test_saved_bytes_are_those_kept_for_the_backward_pass():
    layer, x = torch.nn.Linear(10, 10), torch.randn(100, 10)
    saved = benchmark.saved_bytes(lambda: layer(x).tanh().sum(), layer)
    assert saved == 2 * x.nbytes  # the input of the layer and what tanh gave


def test_order_is_the_same_up_to_ties():
    a = torch.tensor([[0.1, 0.3, 0.2], [0.5, 0.5, 0.4]])
    b = torch.tensor([[1.0, 3.0, 2.0], [5.1, 5.0, 4.0]])
    assert benchmark.same_order(a, b) and not benchmark.same_order(a, -b)


def test_caption_lengths_are_those_of_flickr30k():
    lengths = benchmark.caption_lengths(20000).float()
    assert 15 < lengths.mean() < 16.2 and lengths.min() >= 5 and 50 < lengths.max() <= 81


def test_the_command_writes_figures_and_a_table(tmp_path):
    made = run(tmp_path, "scripts/benchmark.py", "--only", "loading", "--json", "b.json")
    assert made.returncode == 0, made.stderr
    assert json.loads((tmp_path / "b.json").read_text())["loading"]["seconds_per_batch"] > 0
    again = run(tmp_path, "scripts/benchmark.py", "--table", "b.json")
    assert again.stdout == made.stdout and "loading a batch of 128" in again.stdout


def test_precisions_are_compared_on_a_trained_model(trained):  # noqa: F811
    folder, _ = trained
    checkpoint = "runs/LHSC/checkpoint/model_best.pth.tar"
    made = run(folder, "scripts/benchmark.py", "--only", "--checkpoints", checkpoint, "--json",
               "p.json")  # fmt: skip
    assert made.returncode == 0, made.stderr
    (compared,) = json.loads((folder / "p.json").read_text())["precision"]
    assert 0 < compared["largest_difference"] < 0.1 * compared["spread"]
    assert compared["t2i"]["top10_shared"] > 90
    assert "| bf16 |" in made.stdout


def test_bad_arguments_end_in_one_line(tmp_path):
    refused(run(tmp_path, "scripts/benchmark.py", "--json", "no/where.json"), "no/where.json")
    (tmp_path / "x.json").write_text("[]")
    refused(run(tmp_path, "scripts/benchmark.py", "--table", "x.json"), "x.json")
    assert (ROOT / "scripts" / "benchmark.py").is_file()
