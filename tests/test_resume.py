"""A run survives what happens to it: it goes on as if nothing had."""

import fcntl
import json
import resource
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, write_split
from test_commands import SMALL, refused, run

from checkpoint import load_checkpoint, load_newest, load_whole, save_checkpoint, step_files
from errors import InputError

OPTIONS = [*SMALL, "--log_step", "1", "--val_step", "7", "--save_step", "3"]
FOLDER = "runs/LHSC/checkpoint"
LAST = "checkpoint_20.pth.tar"


@pytest.fixture
def folder(tmp_path):
    write_data(tmp_path)
    return tmp_path


def write_data(folder):
    for split, n_images in (("train", 30), ("dev", 10)):
        write_split(folder / "data" / "tiny", split, n_images)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run nobody interrupted: 20 steps in two epochs."""
    folder = tmp_path_factory.mktemp("whole")
    write_data(folder)
    result = run(folder, "train.py", *OPTIONS)
    assert result.returncode == 0, result.stderr
    return folder / FOLDER


def start(folder, *options, before=""):
    """train.py in the background; `before` is Python that runs first."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'train.py'\n{before}\n"
    code += "import train; train.main()"
    command = [sys.executable, "-u", "-W", "ignore", "-c", code, *OPTIONS, *options]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def interrupt(folder, line, number, *options):
    """Start a run and send it a signal at its `line`-th training line."""
    process = start(folder, *options)
    seen = 0
    for text in process.stdout:
        seen += text.startswith("epoch ")
        if seen == line:
            process.send_signal(number)
            break
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def lines(folder):
    """What metrics.jsonl says of steps, without the times."""
    kept = []
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if line["type"] in ("train", "dev"):
            kept.append({k: v for k, v in line.items() if not k.endswith("_time")})
    return kept


def assert_same_run(ours, whole):
    """Bitwise: weights, optimizer, schedule, random states, best model; and the logs."""
    for name in (LAST, "model_best.pth.tar"):
        a, b = load_checkpoint(ours / name), load_checkpoint(whole / name)
        for key in ("opt", "released"):
            a.pop(key), b.pop(key)
        assert same(a, b), name
    assert lines(ours) == lines(whole)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("line", [4, 13])
def test_killed_at_some_step_it_goes_on_bitwise(folder, whole, line):
    code, _, _ = interrupt(folder, line, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (folder / FOLDER / LAST).exists()
    again = run(folder, "train.py", "--resume")
    assert again.returncode == 0, again.stderr
    assert "going on from" in again.stdout
    assert_same_run(folder / FOLDER, whole)


@pytest.mark.slow
def test_killed_with_loader_workers_and_again(folder, whole):
    interrupt(folder, 5, signal.SIGKILL, "--workers", "2")
    code, _, _ = interrupt(folder, 5, signal.SIGKILL, "--workers", "2", "--resume")
    assert code == -signal.SIGKILL
    again = run(folder, "train.py", "--resume", FOLDER, "--workers", "1")
    assert again.returncode == 0, again.stderr
    assert_same_run(folder / FOLDER, whole)


@pytest.mark.slow
@pytest.mark.parametrize("nth", [2, 5])
def test_killed_while_a_checkpoint_is_written(folder, whole, nth):
    """Half of the nth file is on the disk when the process dies."""
    before = f"""
import io, os, signal, torch
whole_save, calls = torch.save, 0
def save(state, file):
    global calls
    calls += 1
    if calls < {nth}:
        return whole_save(state, file)
    buffer = io.BytesIO()
    whole_save(state, buffer)
    file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
"""
    process = start(folder, before=before)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert list((folder / FOLDER).glob("*.tmp"))
    again = run(folder, "train.py", "--resume")
    assert again.returncode == 0, again.stderr
    assert_same_run(folder / FOLDER, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_saves(folder, whole, number, status):
    code, output, errors = interrupt(folder, 8, number)
    assert code == status, errors
    assert "Traceback" not in errors and "stopping after this step" in errors
    assert "train.py --resume" in output
    saved = load_whole(step_files(folder / FOLDER)[0])
    assert saved["Eiters"] >= 8 and f"stopped at step {saved['Eiters']}" in output
    again = run(folder, "train.py", "--resume")
    assert again.returncode == 0, again.stderr
    assert_same_run(folder / FOLDER, whole)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_passed_over(folder, damage):
    interrupt(folder, 8, signal.SIGKILL)
    newest, older = step_files(folder / FOLDER)
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 16  # in the middle of some tensor: torch.load would not tell
    newest.write_bytes(
        content if damage == "flipped" else content[: len(content) // 3 * (damage == "cut")]
    )
    again = run(folder, "train.py", "--resume")
    assert again.returncode == 0, again.stderr
    assert f"warning: {newest.relative_to(folder)}: damaged" in again.stderr
    assert f"going on from {older.relative_to(folder)}" in again.stdout
    assert newest.with_name(newest.name + ".damaged").is_file()


def test_no_checkpoint_to_resume_from_is_said(folder):
    refused(run(folder, "train.py", "--resume"), FOLDER, "no whole checkpoint_N.pth.tar")
    assert not (folder / "runs").exists()


def test_a_model_without_its_optimizer_cannot_be_resumed(folder, whole):
    best = whole / "model_best.pth.tar"
    refused(run(folder, "train.py", "--resume", best), "model_best", "optimizer", "checkpoint_STEP")


def test_a_resumed_run_keeps_its_options(folder):
    interrupt(folder, 8, signal.SIGKILL)
    refused(run(folder, "train.py", "--resume", "--margin", "0.3"), "--margin 0.3", "with 0.2")
    again = run(folder, "train.py", "--resume", "--num_epochs", "3", "--val_step", "100")
    assert again.returncode == 0, again.stderr
    assert load_checkpoint(folder / FOLDER / "checkpoint_30.pth.tar")["opt"]["sim_dim"] == 8


def test_an_older_checkpoint_can_be_branched_off(folder, whole):
    """Never in place, where newer checkpoints would be lost."""
    (folder / "runs").mkdir()
    (folder / "runs/old").symlink_to(whole)
    older = "runs/old/checkpoint_18.pth.tar"
    refused(run(folder, "train.py", "--resume", older), older, LAST, "--model_name")
    branched = run(folder, "train.py", "--resume", older, "--model_name", "runs/branch",
                   "--logger_name", "runs/log")  # fmt: skip
    assert branched.returncode == 0, branched.stderr
    a, b = (load_checkpoint(f / LAST)["model"] for f in (folder / "runs/branch", whole))
    assert same(a, b)
    assert [file.name for file in step_files(whole)] == [LAST, "checkpoint_18.pth.tar"]


def test_only_the_newest_checkpoints_are_kept(whole):
    assert [file.name for file in step_files(whole)] == [LAST, "checkpoint_18.pth.tar"]


def test_two_runs_into_one_folder(folder):
    (folder / "runs/LHSC").mkdir(parents=True)
    with (folder / "runs/LHSC/.checkpoint.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(run(folder, "train.py", *OPTIONS), FOLDER, "another run", "--model_name")
    assert not (folder / FOLDER).exists()


def test_a_full_disk_leaves_the_checkpoints_there(folder):
    """A quota that the logs stay under and a checkpoint does not."""
    interrupt(folder, 8, signal.SIGKILL)
    kept = {file: file.read_bytes() for file in step_files(folder / FOLDER)}
    size = min(map(len, kept.values())) // 2

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    command = [sys.executable, "-W", "ignore", str(ROOT / "train.py"), "--resume"]
    full = subprocess.run(command, cwd=folder, capture_output=True, text=True, preexec_fn=limit)
    refused(full, "checkpoint_", "could not be written", "as they were")
    assert {file: file.read_bytes() for file in step_files(folder / FOLDER)} == kept
    assert not list((folder / FOLDER).glob("*.tmp"))


def test_a_failing_writer_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.pth.tar"
    save_checkpoint({"model": {}, "opt": {}}, path)
    before = path.read_bytes()

    def fail(state, file):
        file.write(b"half")
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="could not be written"):
        save_checkpoint({"model": {}, "opt": {}}, path)
    assert path.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["x.pth.tar"]


def test_a_loss_that_is_no_number_stops_the_run(folder):
    result = run(folder, "train.py", *OPTIONS, "--learning_rate", "1e30")
    refused(result, "step ", "learning rate 1.0e+30", "not_finite.json")
    report = json.loads((folder / FOLDER / "not_finite.json").read_text())
    assert report["lr"] == 1e30 and len(report["caption_index"]) == 16
    assert len(report["image_index"]) == 16 and report["step"] >= 2


def test_the_newest_whole_file_is_found(tmp_path, capsys):
    for step in (9, 10, 100):
        save_checkpoint(
            {"model": {}, "opt": {}, "step": step}, tmp_path / f"checkpoint_{step}.pth.tar"
        )
    (tmp_path / "checkpoint_x.pth.tar").write_text("no step")
    assert load_newest(tmp_path)[1]["step"] == 100
    (tmp_path / "checkpoint_100.pth.tar").write_bytes(b"")
    assert load_newest(tmp_path)[1]["step"] == 10
    assert "checkpoint_100.pth.tar: damaged" in capsys.readouterr().err
    with pytest.raises(InputError, match="no whole"):
        load_newest(tmp_path / "nowhere")
