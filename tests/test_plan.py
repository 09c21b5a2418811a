"""The plan counts the operations that PyTorch counts, and adds up."""

import json

import benchmark_distributed
import plan
import pytest
import torch
from test_commands import refused, run
from torch.utils.flop_counter import FlopCounterMode

from model import LHSC


def full_size():
    with torch.device("meta"):
        return LHSC(8481, plan.IMG_DIM, plan.R, embed_size=plan.D, sim_dim=plan.S)


def counted(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_the_operations_of_the_image_encoder_are_those_pytorch_counts():
    model, n = full_size().train(), 16
    images = torch.empty(n, plan.R, plan.IMG_DIM, device="meta")

    def forward():
        model.similarity.region_pooling(model.image_encoder(images))

    work = plan.Work.of(n)
    assert (work.images + work.products) / 3 == pytest.approx(counted(forward), rel=0.02)


def test_a_step_is_forward_and_twice_that_backward():
    model, n = full_size().train(), 16
    images = torch.empty(n, plan.R, plan.IMG_DIM, device="meta")

    def step():
        model.similarity.region_pooling(model.image_encoder(images)).sum().backward()

    work = plan.Work.of(n)
    # The pictures themselves need no gradient, which saves a product that the plan counts.
    saved = 2 * n * plan.R * plan.IMG_DIM * plan.D
    assert work.images + work.products - saved == pytest.approx(counted(step), rel=0.05)


def test_parameters_are_the_models():
    assert plan.parameters(8481) == sum(p.numel() for p in full_size().parameters())


def test_dividing_divides_what_can_be_divided_and_nothing_else():
    one, many = (plan.plan(n, 128, 8481, 1e12, 1e9, 1e9) for n in (1, 8))
    assert many.divided == pytest.approx(one.divided / 8) and many.products == one.products
    assert one.traffic == 0 and many.traffic > 2 * 7 / 8 * 4 * plan.parameters(8481)
    assert one.memory - many.memory == pytest.approx(7 / 8 * 1e9)


def test_the_command_reads_a_benchmarks_figures(tmp_path):
    figures = {
        "machine": {"device": "a GPU", "threads": 1},
        "training": {"batch": 128, "ours": {"seconds": 0.1, "saved_activations": 1e9}},
    }
    (tmp_path / "speed.json").write_text(json.dumps(figures))
    result = run(tmp_path, "scripts/plan.py", "--speed", "speed.json", "--processes", 1, 4)
    assert result.returncode == 0, result.stderr
    assert "| F30K | 1 | 100 ms |" in result.stdout and "| COCO | 4 |" in result.stdout
    (tmp_path / "speed.json").write_text("{}")
    refused(run(tmp_path, "scripts/plan.py", "--speed", "speed.json"), "speed.json")
    refused(run(tmp_path, "scripts/plan.py", "--speed", "none.json"), "none.json")


def test_the_table_of_several_processes():
    runs = [{"processes": 1, "seconds": 8.0}, {"processes": 2, "seconds": 5.0}]
    machine = {"device": "a CPU", "cpu": True, "torch": "2.0"}
    text = benchmark_distributed.markdown({"machine": machine, "batch_size": 64, "runs": runs})
    assert "| 2 | 5.00 s | 1.60× | 80% |" in text
