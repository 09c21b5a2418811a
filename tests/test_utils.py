"""How every command writes its files, and how it ends."""

import io
import itertools
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call, refused, succeeded

import utils
from utils import InputError, atomic_write, check_targets, one_line

CPU = torch.device("cpu")


def write(path, content=b"new"):
    check_targets(path)
    atomic_write(path, lambda file: file.write(content))


@pytest.mark.parametrize("name", ["pipe", "link"])
def test_a_pipe_is_written_to_and_stays(tmp_path, name):
    pipe, link, scores = tmp_path / "pipe", tmp_path / "link", np.ones((3, 4), np.float32)
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    with ThreadPoolExecutor() as pool:
        check_targets(pipe)
        content = pool.submit(pipe.read_bytes)
        atomic_write(tmp_path / name, lambda file: np.save(file, scores))
    assert np.array_equal(np.load(io.BytesIO(content.result())), scores)
    assert pipe.is_fifo() and link.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes device nodes")
def test_a_device_is_written_to_and_stays(tmp_path):
    null = tmp_path / "null"
    os.mknod(null, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    write(null)
    assert null.is_char_device()


@pytest.mark.parametrize("name", ["/dev/stdout", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("out", ["out.txt", "/dev/null"])
def test_ones_own_output_is_written_to_and_stays(tmp_path, monkeypatch, name, out):
    """Also where it goes into a file, which must not be replaced behind the shell's back."""
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("/dev/stdout")
    before = os.dup(1)
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
    try:
        os.write(1, b"table\n")
        write(name)
    finally:
        os.dup2(before, 1)
    assert Path("link").is_symlink() and Path("/dev/stdout").is_symlink()
    assert out == "/dev/null" or Path(out).read_text() == "table\nnew"


def test_a_file_is_replaced_whole_through_a_link_beside_foreign_files(tmp_path):
    path, link, foreign = tmp_path / "m.json", tmp_path / "link", tmp_path / "m.json.tmp"
    path.write_text("old")
    foreign.write_text("mine")
    link.symlink_to("m.json")
    write(link)
    assert link.is_symlink() and path.read_text() == "new" and foreign.read_text() == "mine"

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fail)
    assert path.read_text() == "new" and len(list(tmp_path.iterdir())) == 3


def test_many_may_write_the_same_file(tmp_path):
    path, contents = tmp_path / "m.json", [bytes([k]) * 200_000 for k in range(24)]
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(write, path, content) for content in contents]:
            done.result()
            assert path.read_bytes() in contents
    assert [file.name for file in tmp_path.iterdir()] == ["m.json"]


@pytest.mark.parametrize("name", ["x" * 254, "日" * 85])
def test_long_names_can_be_written(tmp_path, name):
    write(tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"new"


def test_what_cannot_be_written_is_noticed_before(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    locked = tmp_path / "locked/x" if os.geteuid() else "/sys/x"  # which even root cannot write
    for path in (tmp_path, "", tmp_path / ("x" * 300), tmp_path / "nowhere/x", locked):
        with pytest.raises(InputError, match=r"is a folder|cannot be written: \w+"):
            check_targets(None, tmp_path / "good", path)
    (tmp_path / "link").symlink_to("good")
    with pytest.raises(InputError, match="two outputs"):
        check_targets(tmp_path / "good", tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "locked"]


def raising(error):
    def main():
        raise error

    return one_line(main)


@pytest.mark.parametrize("error", [
    InputError("bad\nfile"), OSError(28, "bad file"), MemoryError("bad file"),
    InputError("Traceback of a loader process …\nutils.InputError: bad file"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: bad file"),
])  # fmt: skip
def test_mistakes_end_in_one_line(tmp_path, error):
    result = call(tmp_path, raising(error))
    refused(result, "bad file")
    assert "Traceback" not in result.stderr


def test_bugs_keep_their_traceback_and_ctrl_c_has_its_status(tmp_path):
    for error in (RuntimeError("a bug"), KeyError("a bug")):
        with pytest.raises(type(error), match="a bug"):
            call(tmp_path, raising(error))
    assert call(tmp_path, raising(KeyboardInterrupt())).returncode == 130
    assert succeeded(call(tmp_path, one_line(lambda: print("done")))) == "done\n"


FULL = "error: [Errno 28] No space left on device\n"
# How many lines are printed, the options, which stream ends where -> the status, what stderr gets.
ENDS = [
    (1, [], 1, "gone", 141, ""),  # the line waits in the buffer until the end
    (100_000, [], 1, "gone", 141, ""),  # more than a pipe holds
    (1, [], 1, "full", 2, FULL),
    (1, ["--help"], 1, "full", 2, FULL),
    (1, ["--unknown"], 2, "full", 2, ""),
]
PROGRAM = """
import argparse, os, sys
from utils import one_line

def main():
    argparse.ArgumentParser().parse_args()
    for i in range(lines):
        print(i)

reader, gone = os.pipe()  # a reader that went away
os.close(reader)
full = os.open("/dev/full", os.O_WRONLY)
for k, (lines, options, stream, end, *_) in enumerate(ENDS):
    if os.fork() == 0:  # a process with an end of its own, without the time of a start
        sys.argv[1:] = options
        os.dup2(os.open(f"stderr{k}", os.O_WRONLY | os.O_CREAT, 0o600), 2)
        os.dup2(full if end == "full" else gone, stream)
        one_line(main)()
        sys.exit()
    print(os.waitstatus_to_exitcode(os.wait()[1]), end=" ", flush=True)
"""


def test_output_that_nobody_takes_ends_quietly_or_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    command = [sys.executable, "-c", f"ENDS = {ENDS}\n{PROGRAM}"]
    result = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=60)
    statuses = [int(status) for status in succeeded(result).split()]
    said = [(tmp_path / f"stderr{k}").read_text() for k in range(len(ENDS))]
    assert [*zip(statuses, said, strict=True)] == [end[4:] for end in ENDS]


def test_a_faster_exact_library_is_kept_and_a_slower_one_is_not(switch, monkeypatch):
    monkeypatch.setattr(utils, "products_are_exact", lambda: switch.fp32_precision == "bf16")
    before, times = switch.fp32_precision, []
    monkeypatch.setattr(utils.timeit, "timeit", lambda *_, **__: next(times))
    times = itertools.cycle([1.0, 0.9])  # of the default, of oneDNN
    assert utils.choose_matmul(CPU) == "default" and switch.fp32_precision == before
    times = itertools.cycle([1.0, 0.5])
    assert utils.choose_matmul(CPU) == "onednn" and switch.fp32_precision == "bf16"
    switch.fp32_precision = before
    assert utils.choose_matmul(CPU, "default") == "default" and switch.fp32_precision == before
    assert utils.choose_matmul(torch.device("cuda")) == "default"


@pytest.mark.parametrize("bits", [16, 13])  # that bfloat16 and tf32 drop
@pytest.mark.parametrize("form", ["__matmul__", "linear", "baddbmm"])
def test_a_lossy_library_is_rejected(switch, monkeypatch, form, bits):
    owner = {"__matmul__": torch.Tensor, "linear": utils.F, "baddbmm": torch}[form]
    exact = getattr(owner, form)

    def rounded(x):
        if x.dtype != torch.float32 or switch.fp32_precision != "bf16":
            return x
        return (x.contiguous().view(torch.int32) >> bits << bits).view(torch.float32)

    monkeypatch.setattr(owner, form, lambda *tensors: exact(*map(rounded, tensors)))
    before = switch.fp32_precision
    assert utils.products_are_exact()
    assert utils.choose_matmul(CPU, "onednn") == "default"
    assert switch.fp32_precision == before
