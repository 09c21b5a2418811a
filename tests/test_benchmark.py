"""The benchmark measures what it says, at sizes at which its times mean nothing."""

import argparse
import json

import benchmark
import pytest
import torch
from conftest import call, refused, succeeded

from utils import InputError, products_are_exact

CPU = torch.device("cpu")
MACHINE = {"device": "a CPU", "torch": "2.0", "matmul": "MKL", "chosen": "onednn",
           "products": {"fp32": ["default", "onednn"], "bf16": ["bf16"]}}  # fmt: skip
QUICK = argparse.Namespace(quick=True)


@pytest.fixture
def small(monkeypatch):
    """Small models, and matrix products without end."""
    size = benchmark.Size(R=5, img_dim=12, D=16, S=8)
    monkeypatch.setattr(benchmark, "SIZES", {"paper": size, "small": size})
    monkeypatch.setattr(benchmark, "WORD_DIM", 10)
    monkeypatch.setattr(benchmark, "VOCAB_SIZE", 50)
    monkeypatch.setattr(benchmark, "rate", lambda *_: 1e15)
    use = benchmark.use
    use("onednn")
    if not products_are_exact():  # with AMX oneDNN rounds; choose_matmul does not take it there
        monkeypatch.setattr(benchmark, "use", lambda _: use("default"))
    yield size
    use("default")


@pytest.mark.parametrize("part", ["scoring", "training", "encoding"])
def test_the_loop_and_every_precision_are_measured(small, part):
    rows = benchmark.PARTS[part](QUICK, MACHINE, CPU)
    assert all(row["seconds"] > 0 for row in rows)
    expected = ["official loop", "official loop, onednn", "fp32"] + ["bf16"] * (part != "encoding")
    assert [row["way"] for row in rows] == expected * (2 if part == "training" else 1)
    assert all(row["× official loop"] == 1 for row in rows if row["way"] == "official loop")
    if part == "scoring":
        assert rows[2]["largest difference"] < 1e-5 < rows[3]["largest difference"] < 1e-1
        assert all(0 < row["% of the limit"] < 100 for row in rows)


def test_what_is_compared_takes_turns_and_more_than_the_limit_is_an_error():
    calls = []
    works = {name: lambda name=name: calls.append(name) for name in ("official loop", "fp32")}
    benchmark.compare("nothing", works, 2, CPU, {"fp32": lambda: calls.append("limit") or 0.0})
    assert calls == ["official loop", "fp32"] + 2 * ["official loop", "fp32", "limit"]
    with pytest.raises(InputError, match="% of the limit"):
        benchmark.compare("nothing", works, 1, CPU, {"fp32": lambda: 1e3})


def test_the_command_adds_to_its_file(tmp_path, monkeypatch):
    monkeypatch.setitem(benchmark.PARTS, "encoding", lambda opt, *_: [{"quick": str(opt.quick)}])
    command = [benchmark.main, "encoding", "--json", "b.json"]
    succeeded(call(tmp_path, *command))
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["encoding"] == [{"quick": "False"}]
    (tmp_path / "b.json").write_text(json.dumps(found | {"processes": [{"processes": 7}]}))
    printed = succeeded(call(tmp_path, *command, "--quick"))
    assert "| True |" in printed and "| 7 |" in printed and "| False |" not in printed
    refused(call(tmp_path, benchmark.main, "scorn"), "scorn", "scoring")
    (tmp_path / "b.json").write_text(json.dumps({"machine": MACHINE}))
    refused(call(tmp_path, *command), "b.json", "another machine")


def test_rows_with_the_same_columns_make_a_table():
    rows = [{"way": "fp32", "seconds": 0.12345}, {"way": "bf16", "seconds": 1234.5}, {"other": 1}]
    text = benchmark.markdown({"machine": MACHINE, "scoring": rows})
    assert "| way | seconds |\n| --- | --- |\n| fp32 | 0.123 |\n| bf16 | 1,234 |" in text
    assert "a CPU" in text and "| other |" in text
