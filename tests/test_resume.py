"""A run survives what happens to it: it continues as if nothing had.

What ends a process without a word is tried on a process of its own. The rest runs in this one,
where a step of the training is replaced by one that does the damage.
"""

import fcntl
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import RUN, SMALL, at_step, call, log_of, refused, refuses, succeeded, write_tiny

import train
from checkpoint import load_checkpoint, save_checkpoint, step_files

OPTIONS = [*SMALL, "--graph_layers", "1", "--text_layers", "1", "--log_step", "1",
           "--val_step", "7", "--save_step", "3"]  # fmt: skip
AVERAGED = ["--ema", "0.9", "--workers", "1"]
LAST = "checkpoint_20.pth.tar"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nobody interrupted, by their options: 20 steps in two epochs."""
    runs = {}
    for options in ([], AVERAGED):
        folder = write_tiny(tmp_path_factory.mktemp("whole"))
        succeeded(call(folder, train.main, *OPTIONS, *options))
        runs[bool(options)] = folder
    return runs


@pytest.fixture
def folder(tmp_path, whole):
    return shutil.copytree(whole[False], tmp_path / "copy")


# What happens to a training, which runs in a process of its own.
KILL_AT_STEP_5 = """
import conftest, pytest
conftest.at_step(pytest.MonkeyPatch(), 5, lambda: os.kill(os.getpid(), signal.SIGKILL))
"""
KILL_IN_SECOND_FILE = """
import io, torch
save, files = torch.save, iter(range(1, 100))
def half(state, file):
    if next(files) < 2:
        return save(state, file)
    save(state, buffer := io.BytesIO())
    file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
"""


def lines(folder):
    """What metrics.jsonl says of steps, without the times."""
    found = log_of(folder, "train", "dev")
    return [{k: v for k, v in line.items() if not k.endswith("_time")} for line in found]


def assert_same_run(ours, whole):
    """Bitwise: weights, averaged weights, optimizer, random states, best model; and the logs."""
    for name in (LAST, "model_best.pth.tar"):
        a, b = (load_checkpoint(folder / RUN / name) for folder in (ours, whole))
        assert same(a | {"opt": 0}, b | {"opt": 0}), name
    assert lines(ours) == lines(whole)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("patch, options, number, status", [
    (KILL_AT_STEP_5, [], signal.SIGINT, 130),
    (KILL_IN_SECOND_FILE, AVERAGED, signal.SIGTERM, 143),
])  # fmt: skip
def test_killed_and_stopped_it_continues_bitwise(
    tiny, whole, monkeypatch, patch, options, number, status
):
    """Killed in an epoch or while a file is half written, then stopped by a signal in a step."""
    code = f"import os, signal, train\n{patch}\ntrain.main()"
    command = [sys.executable, "-c", code, *OPTIONS, *options]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    killed = subprocess.run(command, cwd=tiny, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [file.name for file in step_files(tiny / RUN)] == ["checkpoint_3.pth.tar"]
    at_step(monkeypatch, 9, lambda: os.kill(os.getpid(), number))
    result = call(tiny, train.main, "--resume")
    assert "continuing" in result.stdout and "epoch 0, batch 3" in result.stdout
    assert result.returncode == status and "stopping after this step" in result.stderr
    assert "Traceback" not in result.stderr and "error" not in result.stderr
    assert "stopped at step 12" in result.stdout and "--resume" in result.stdout
    succeeded(call(tiny, train.main, "--resume", RUN, "--workers", "0"))
    assert_same_run(tiny, whole[bool(options)])
    assert [f.name for f in step_files(tiny / RUN)] == [LAST, "checkpoint_18.pth.tar"]


def test_a_killed_loader_process_ends_the_run_in_one_line(tiny, monkeypatch):
    at_step(monkeypatch, 8, lambda: multiprocessing.active_children()[0].kill())
    result = call(tiny, train.main, *OPTIONS, "--workers", "2", "--num_epochs", "500")
    refused(result, "a loader process died", "--resume", "--workers")
    assert load_checkpoint(step_files(tiny / RUN)[0])["Eiters"] >= 6


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_passed_over(folder, whole, damage):
    newest, older = step_files(folder / RUN)
    weight = load_checkpoint(newest)["model"]["image_encoder.fc.weight"]
    content = bytearray(newest.read_bytes())
    if damage == "flipped":  # torch.load would not notice
        content[content.index(weight.numpy().tobytes())] ^= 16
    else:
        content = content[: len(content) // 3 * (damage == "cut")]
    newest.write_bytes(content)
    result = call(folder, train.main, "--resume")
    assert f"continuing {RUN / older.name}" in succeeded(result)
    assert result.stderr.startswith(f"warning: {RUN / newest.name}: damaged")
    assert len(result.stderr.splitlines()) == 1
    assert newest.with_name(newest.name + ".damaged").is_file()
    assert_same_run(folder, whole[False])


def test_what_cannot_be_resumed_is_refused(folder):
    (folder / "empty").mkdir()
    older = str(RUN / "checkpoint_18.pth.tar")  # in place, newer checkpoints would be lost
    for options, *words in (
        (["empty"], "empty: no whole checkpoint_N.pth.tar"),
        ([RUN / "model_best.pth.tar"], "model_best", "checkpoint_STEP"),
        (["--margin", "0.3"], "--margin 0.3", "with 0.2"),
        ([older], older, LAST, "--model_name"),
    ):
        refuses(folder, train.main, "--resume", *options, words=words)


def test_states_of_wrong_types_are_refused(tmp_path, whole):
    """Every part of a state, and every option and counter, replaced by what it cannot be."""
    folder = shutil.copytree(whole[True], tmp_path / "copy")
    path = folder / RUN / LAST
    state = load_checkpoint(path)
    parts = ("vocab", "model", "opt", "run", "optimizer", "random", "ema_model")
    wrong = [{part: value} for part in parts for value in (3, {"a": 1})]
    for part in ("run", "opt", "optimizer"):
        wrong += [{part: state[part] | {name: [0]}} for name in state[part] if name != "resume"]
    wrong.append({"random": [state["random"][0] | {"torch": "x"}]})
    wrong += [{"opt": state["opt"] | change} for change in ({"drop_out": 2.5}, {"padding": "x"})]
    for change in wrong:
        save_checkpoint(state | change, path)
        refuses(folder, train.main, "--resume", path, "--num_epochs", "3")


def test_a_resumed_run_may_be_longer_and_says_when_nothing_is_left(folder):
    longer = call(folder, train.main, "--resume", "--num_epochs", "3", "--val_step", "100")
    assert "epoch 2, batch 0" in succeeded(longer)
    opt = load_checkpoint(folder / RUN / "checkpoint_30.pth.tar")["opt"]
    assert (opt["sim_dim"], opt["val_step"]) == (8, 100)
    again = succeeded(call(folder, train.main, "--resume"))
    assert "all 3 epochs are done, nothing is left to do" in again
    assert step_files(folder / RUN)[0].name == "checkpoint_30.pth.tar"


def test_an_older_checkpoint_can_be_branched_off(folder, whole):
    branch = ["--model_name", "branch", "--logger_name", "log"]
    succeeded(call(folder, train.main, "--resume", RUN / "checkpoint_18.pth.tar", *branch))
    a, b = (load_checkpoint(run / LAST) for run in (folder / "branch", whole[False] / RUN))
    assert same(a["model"], b["model"])
    assert [f.name for f in step_files(folder / RUN)] == [LAST, "checkpoint_18.pth.tar"]


def test_two_runs_into_one_folder(folder):
    with (folder / RUN).with_name(".checkpoint.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for options in (OPTIONS, ["--resume"]):
            words = str(RUN), "another run", "--model_name"
            refuses(folder, train.main, *options, words=words)


def test_a_full_disk_leaves_the_checkpoints_there(folder):
    """A quota that the logs stay under and a checkpoint does not."""
    kept = {file: file.read_bytes() for file in (folder / RUN).glob("*.tar")}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(map(len, kept.values())) // 2, before[1]))
    try:
        result = call(folder, train.main, "--resume", "--num_epochs", "3")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refused(result, "could not be written", "as they were")
    assert {file: file.read_bytes() for file in (folder / RUN).glob("*.tar")} == kept
    assert not list((folder / RUN).glob(".*"))


def test_a_loss_that_is_no_number_ends_the_run(folder, monkeypatch):
    monkeypatch.setattr(train, "triplet_loss", lambda sims, *_: sims.sum() * float("nan"))
    result = call(folder, train.main, "--resume", "--num_epochs", "3")
    refused(result, "loss nan", "this step was not taken", "--resume", "--learning_rate")
    assert step_files(folder / RUN)[0].name == LAST
