"""What every command shares: errors in one line, whole files, progress, devices, option types."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import importlib
import io
import json
import os
import platform
import re
import sys
import time
import timeit
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, TextIO

import torch
import torch.distributed as dist
import torch.nn.functional as F

# -- errors ---------------------------------------------------------------------------------------


class InputError(ValueError):
    """What the user gave (file, option, checkpoint) cannot be used; the message says it all."""

    def __str__(self) -> str:
        # A DataLoader worker's error arrives as the text of its traceback: keep the message.
        return super().__str__().rpartition("InputError: ")[2].strip()


def one_line(main: Callable[..., None]) -> Callable[..., None]:
    """Run a command line so that a user's mistake prints one line and exits with status 2.

    Bugs still raise with their traceback. Ctrl-C exits with 130 and a closed output (`| head`)
    with 141, the shell's numbers for SIGINT and SIGPIPE.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        try:
            try:
                main(*args, **kwargs)
            finally:  # a full disk is reported here, not by Python's own exit
                sys.stdout.flush()
                sys.stderr.flush()
        except BrokenPipeError:
            _silence(sys.stdout)
            _silence(sys.stderr)
            sys.exit(141)
        except (InputError, OSError) as error:
            _exit_with(str(error))
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            _exit_with(f"this does not fit into memory: {error}")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return run


def _out_of_memory(error: Exception) -> bool:
    # PyTorch's allocator for CPUs raises a plain RuntimeError, which only its text tells apart.
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "can't allocate memory" in str(error)


def _exit_with(message: str) -> None:
    for stream, text in ((sys.stderr, f"error: {' '.join(message.split())}\n"), (sys.stdout, "")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            _silence(stream)
    sys.exit(2)


def _silence(stream: TextIO) -> None:
    """Keep Python's exit from writing, and failing, once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def import_extra(name: str) -> ModuleType:
    """Import a package of requirements-extra.txt. Raises InputError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{error}; pip install -r requirements-extra.txt") from error


# -- files ----------------------------------------------------------------------------------------


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all: `write(file)` fills it.

    `path` holds its old content or all of the new, whatever happens. Links are followed. A device,
    a pipe or this command's own output is opened and written to.

    Raises OSError if it cannot be written; what was there is left as it was.
    """
    if _is_stream(path):
        content = io.BytesIO()  # np.save asks for its position in the file, which a pipe has not
        write(content)
        with open(path, "ab") as file:
            file.write(content.getbuffer())
        return
    target = Path(os.path.realpath(path))
    temporary = _temporary(target)
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """atomic_write of UTF-8 text."""
    atomic_write(path, lambda file: file.write(text.encode()))


def write_json(path: str | Path, value: object) -> None:
    """atomic_write of a value as indented JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def check_targets(*paths: str | Path | None) -> None:
    """Try the files that a command will write, before its work starts. None is passed over.

    Raises InputError if two are the same file, one is a folder or cannot be written.
    """
    targets = [Path(path) for path in paths if path is not None]
    files = [os.path.realpath(path) for path in targets if not _is_stream(path)]
    for path in targets:
        if os.path.isdir(path):
            raise InputError(f"{path}: is a folder; name a file to write")
        if files.count(os.path.realpath(path)) > 1:
            raise InputError(f"{path}: named for two outputs; give each a file of its own")
        try:
            if os.path.exists(path) and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            if not _is_stream(path):
                with contextlib.suppress(FileNotFoundError):
                    os.stat(path)  # OSError for a name that is too long
                temporary = _temporary(Path(os.path.realpath(path)))
                temporary.open("xb").close()
                temporary.unlink()
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def _is_stream(path: str | Path) -> bool:
    """Whether a path is a device, a pipe, or where this command prints to: never replaced."""
    if not os.path.exists(path) or os.path.isdir(path):
        return False
    own = [stream.fileno() for stream in (sys.__stdout__, sys.__stderr__) if stream is not None]
    return not os.path.isfile(path) or any(os.path.samefile(path, number) for number in own)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name[:50]}.{uuid.uuid4().hex[:12]}.tmp")


# -- progress, devices ----------------------------------------------------------------------------


def progress(items: Iterable, total: int, what: str) -> Iterator:
    """A bar on a terminal; elsewhere a plain line at every quarter of work over 10 seconds."""
    if dist.is_initialized() and dist.get_rank() > 0:
        yield from items
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=what, leave=False)
        return
    start, reported = time.monotonic(), 0
    for done, item in enumerate(items, start=1):
        yield item
        quarter, elapsed = 4 * done // max(total, 1), time.monotonic() - start
        if quarter > reported and elapsed > 10:
            reported = quarter
            print(f"{what}: {done}/{total}, {elapsed:.0f} s", file=sys.stderr, flush=True)


def select_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1`.

    Raises InputError if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


def cpu_name() -> str:
    """The processor's name as Linux tells it, elsewhere as Python does."""
    try:
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        name = None
    return name[1] if name else platform.processor() or platform.machine()


# -- types of options -----------------------------------------------------------------------------


def number(least: float, below: float = float("inf"), kind: type = float) -> Callable:
    """argparse type: a number, least <= x < below."""

    def convert(text: str) -> float:
        if not least <= kind(text) < below:
            raise ValueError
        return kind(text)

    limits = f"from {least:g} up" + f" and below {below:g}" * (below < 1e18)
    convert.__name__ = f"{kind.__name__} {limits}"  # argparse: "invalid int from 1 up value"
    return convert


def at_least(least: int, below: int = 2**63) -> Callable:
    """argparse type: an integer from `least` up."""
    return number(least, below, int)


# -- the processor --------------------------------------------------------------------------------


def choose_matmul(device: torch.device, choice: str = "auto") -> str:
    """Let oneDNN multiply float32 matrices on the CPU, where that is exact and clearly faster.

    PyTorch's default library, MKL, does not use AVX-512 on AMD processors; oneDNN does. The switch
    that sends products there also *allows* bfloat16 inside, so exactness is tried first.

    choice: "auto", "default" (leave it off) or "onednn" (on without timing, if it is exact).
    Returns what multiplies: "default" or "onednn". Takes about 0.1 s.
    """
    switch = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9 and newer have it
    if device.type != "cpu" or choice == "default" or not hasattr(switch, "fp32_precision"):
        return "default"
    x, before, threads = torch.full((512, 512), 0.5), switch.fp32_precision, torch.get_num_threads()
    seconds: dict[str, list[float]] = {before: [], "bf16": []}
    torch.set_num_threads(1)  # processor time of one thread: a busy machine changes it little
    for _ in range(8):
        for setting, times in seconds.items():
            switch.fp32_precision = setting
            times.append(timeit.timeit(lambda: x @ x, timer=time.process_time, number=1))
    torch.set_num_threads(threads)
    faster = choice == "onednn" or min(seconds["bf16"]) < 0.75 * min(seconds[before])
    if faster and products_are_exact():
        return "onednn"
    switch.fp32_precision = before
    return "default"


def products_are_exact() -> bool:
    """Whether float32 products keep float32's precision, in all forms that training uses.

    1 + 2⁻¹² needs more bits than tf32 or bfloat16 have. Sums of 96 such products are compared with
    double precision: float32 is wrong by less than 1e-4, tf32 by more than 1e-2.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (1 + 2.0**-12 * torch.randint(1, 9, (3, 96, 96), generator=generator) for _ in range(2))
    for x in (a, a.transpose(1, 2)):
        for y in (b, b.transpose(1, 2)):
            products = [x @ y, torch.baddbmm(torch.zeros(1), x, y)]
            products += [torch.stack([m @ n for m, n in zip(x, y, strict=True)])]
            products += [torch.stack([F.linear(m, n.T) for m, n in zip(x, y, strict=True)])]
            exact = x.double() @ y.double()
            if any((product - exact).abs().max() > 1e-3 for product in products):
                return False
    return True


def reuse_freed_memory(reuse: bool = True) -> None:
    """Keep large freed blocks for the next step instead of giving them back to the system.

    glibc returns every block over 32 MB, so each training step would have to fault its pages in
    again. Other C libraries have no mallopt; then nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 2**30 if reuse else 2**25)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1 if reuse else 2**26)  # M_TRIM_THRESHOLD
