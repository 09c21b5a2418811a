"""The folder of a run: its state, log and lock; how it is resumed, and how it is stopped."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import distributed
from checkpoint import (
    check_options,
    is_of_type,
    load_checkpoint,
    load_latest,
    random_states,
    save_checkpoint,
    set_random_states,
    step_file,
    step_files,
)
from data import Batch
from distributed import is_main_process, print_on_main
from evaluation import report
from model import LHSC
from utils import InputError, cpu_name, write_text
from vocab import Vocabulary, vocab_file


@dataclasses.dataclass
class RunState:
    """What a run has to remember, beside its weights; saved and restored whole."""

    epoch: int = 0  # the epoch in progress
    batch: int = 0  # how many of its batches are done
    step: int = 0  # optimizer steps
    best_rsum: float = -1.0
    best_epoch: int = 0
    last_log_step: int = 0
    loss_sum: float = 0.0  # since last_log_step


# -- resuming -------------------------------------------------------------------------------------

# What a resumed run may change; everything else is the checkpoint's.
MAY_CHANGE = {
    "data_path", "vocab_path", "workers", "num_epochs", "model_name", "logger_name", "log_step",
    "val_step", "save_step", "keep", "device", "matmul", "resume", "deterministic",
}  # fmt: skip


def save_best(
    folder: Path, opt: argparse.Namespace, vocab: Vocabulary, state: RunState, model: LHSC
) -> None:
    """Write model_best.pth.tar: a model to evaluate."""
    if is_main_process():
        save_checkpoint(_contents(opt, vocab, state, model), folder / "model_best.pth.tar")


def save_latest(
    folder: Path,
    opt: argparse.Namespace,
    vocab: Vocabulary,
    state: RunState,
    model: LHSC,
    ema_model: LHSC | None,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write checkpoint_STEP.pth.tar: all that is needed to continue."""
    random = distributed.all_gather_object(random_states())
    if is_main_process():
        contents = _contents(opt, vocab, state, model) | {
            "run": dataclasses.asdict(state),
            "optimizer": optimizer.state_dict(),
            "ema_model": None if ema_model is None else ema_model.state_dict(),
            "random": random,
        }
        save_checkpoint(contents, step_file(folder, state.step))
        for older in step_files(folder)[opt.keep :]:
            older.unlink()


def _contents(opt: argparse.Namespace, vocab: Vocabulary, state: RunState, model: LHSC) -> dict:
    return {
        "epoch": state.epoch, "Eiters": state.step, "best_rsum": state.best_rsum,
        "opt": dict(vars(opt)), "vocab": vocab.fingerprint(), "model": model.state_dict(),
    }  # fmt: skip


def resume_options(opt: argparse.Namespace, given: dict) -> tuple[argparse.Namespace, dict]:
    """The options of the run to continue, and its newest whole state.

    given: the options that stand on the command line.

    Raises InputError if there is no run to resume, or a given option contradicts it.
    """
    path, saved = Path(opt.resume or opt.model_name), None
    if is_main_process() and not path.is_file():
        path, saved = load_latest(path)
    path = distributed.all_gather_object(path)[0]  # the main process's
    saved = saved or load_checkpoint(path)
    if missing := {"run", "optimizer", "random", "vocab"} - saved.keys():
        raise InputError(
            f"{path}: holds no {', '.join(sorted(missing))}: only train.py's "
            "checkpoint_STEP.pth.tar can be resumed from"
        )
    newest = step_files(path.parent)[:1]
    in_place = Path(given.get("model_name", path.parent)).resolve() == path.parent.resolve()
    if in_place and newest and newest[0].resolve() != path.resolve():
        raise InputError(
            f"{path}: the run went on to {newest[0].name}; resume from its folder, or name a new "
            "one with --model_name to branch off here"
        )
    check_options(saved["opt"], path)
    for name, value in vars(opt).items():
        old = saved["opt"].get(name, value)
        if value is not None and name != "resume" and not is_of_type(old, type(value)):
            raise InputError(f"{path}: its option {name} is {old!r}, no {type(value).__name__}")
    for name, value in given.items():
        if name not in MAY_CHANGE and saved["opt"].get(name) != value:
            raise InputError(
                f"--{name} {value}: {path} was trained with {saved['opt'].get(name)}; leave the "
                "option out, or start a new run without --resume"
            )
    now = vars(opt) | saved["opt"] | {"model_name": str(path.parent)} | given
    return argparse.Namespace(**now), saved | {"path": path}


def restore(
    saved: dict,
    model: LHSC,
    ema_model: LHSC | None,
    optimizer: torch.optim.Optimizer,
    vocab: Vocabulary,
    opt: argparse.Namespace,
) -> RunState:
    """Put a saved run back in place.

    Raises InputError if the vocabulary is another one, or the state is not that of such a run.
    """
    if saved["vocab"] != vocab.fingerprint():
        file = vocab_file(opt.vocab_path, opt.data_name)
        raise InputError(f"{file}: not the vocabulary the run began with")
    try:
        state = RunState(**saved["run"])
        for field in dataclasses.fields(RunState):
            if type(getattr(state, field.name)).__name__ != field.type:
                raise TypeError(f"{field.name} is {getattr(state, field.name)!r}")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if ema_model is not None:
            ema_model.load_state_dict(saved["ema_model"])
        if len(saved["random"]) == distributed.world_size():
            set_random_states(saved["random"][distributed.rank()])
        else:
            print_on_main(
                f"saved by {len(saved['random'])} processes, continued with "
                f"{distributed.world_size()}: dropout draws other numbers"
            )
            seed_rank(opt.seed, state.step)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{saved['path']}: not the state of this run: {reason}") from error
    print_on_main(f"continuing {saved['path']}: epoch {state.epoch}, batch {state.batch}")
    return state


def seed_rank(seed: int, step: int) -> None:
    """Each of several processes draws its own dropout; a single one continues as it is."""
    if distributed.world_size() > 1:
        torch.manual_seed((seed * 1_000_003 + step) * 1_009 + 1 + distributed.rank())


# -- the folder of a run, its log, and signals ----------------------------------------------------


@contextlib.contextmanager
def open_run(opt: argparse.Namespace, state: RunState, resumed: bool) -> Iterator[RunLog]:
    """The folders of a run, locked, with an earlier run moved aside; gives its log.

    Raises InputError if another process trains into the folder, or it holds something else.
    """
    if not is_main_process():
        yield RunLog()
        return
    earlier = earlier_runs(opt)
    folder = Path(opt.model_name).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder}: another run is training into it; give this one another --model_name"
            ) from None
        try:
            if not resumed or not step_file(folder, state.step).is_file():  # new, or a branch
                for path in earlier:
                    backup_run(path)
            folder.mkdir(parents=True, exist_ok=True)
            log = RunLog(folder, opt.logger_name, state.step if resumed else 0)
            with contextlib.closing(log):
                yield log
        finally:
            Path(lock.name).unlink(missing_ok=True)


def earlier_runs(opt: argparse.Namespace) -> list[Path]:
    """Those of the two folders a run writes into that hold an earlier run.

    Raises InputError if one holds something else: nothing but a run is ever moved aside.
    """
    folders = [Path(opt.model_name).resolve(), Path(opt.logger_name).resolve()]
    return [folder for folder in folders if holds_run(folder)]


def holds_run(folder: Path) -> bool:
    """Whether a run has written into a folder; InputError if it holds something else."""
    if Path.cwd().is_relative_to(folder):
        raise InputError(f"{folder}: this command runs in there; name a folder of the run's own")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; name a folder for the run")
    found = folder.iterdir() if folder.is_dir() else ()
    names = [path.name for path in found if not path.name.startswith(".")]
    runs = ("metrics.jsonl", "checkpoint_", "model_best", "events.out.tfevents")
    if names and not any(name.startswith(runs) for name in names):
        raise InputError(f"{folder}: holds {min(names)}, and no run; name a new or an empty folder")
    return bool(names)


def backup_run(folder: Path) -> None:
    """Nothing of an earlier run is overwritten: its folder gets a number behind its name."""
    if not folder.exists():  # it lay in the other folder, and went with it
        return
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(target)
    print(f"{folder} holds an earlier run: moved to {target}", flush=True)


class RunLog:
    """What a run reports: lines for people, metrics.jsonl for scripts, scalars for TensorBoard.

    Without a folder, which only the main process has, nothing is written or printed.
    """

    def __init__(self, folder: Path | None = None, tensorboard: str = "", step: int = 0) -> None:
        """A run that is resumed after `step` keeps its lines up to there."""
        self.data_time, self._start, self._collapsed = 0.0, time.perf_counter(), False
        self._file, self._tensorboard = None, None
        self._type: dict = {"type": "run"}
        if folder is None:
            return
        path = folder / "metrics.jsonl"
        if step and path.is_file():
            self._type = {"type": "resume", "step": step}
            write_text(path, "".join(lines_up_to(path, step)))
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = tensorboard_logger(tensorboard)

    def close(self) -> None:
        self._file.close()

    def _write(self, line: dict, scalars: dict[str, float], step: int = 0) -> None:
        """A line of metrics.jsonl, and its numbers for TensorBoard."""
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            for tag, value in scalars.items():
                self._tensorboard.log_value(tag, value, step)

    def header(self, opt: argparse.Namespace, model: LHSC, device: torch.device) -> None:
        """What is needed to repeat a run: arguments, versions, commit, hardware, seed."""
        git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        try:
            here = Path(__file__).resolve().parent
            commit = subprocess.check_output(git, cwd=here, stderr=subprocess.DEVNULL, text=True)
        except (OSError, subprocess.CalledProcessError):
            commit = ""  # not a git checkout
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
        versions = {name: version(name) for name in ("torch", "numpy", "nltk")}
        self._write(self._type | {
            "arguments": vars(opt),
            "seed": opt.seed,
            "versions": {"python": platform.python_version()} | versions,
            "commit": commit.strip() or None,
            "hardware": {"device": name, "threads": torch.get_num_threads()},
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }, {})  # fmt: skip

    def train(self, state: RunState, lr: float, n_batches: int, collapsed_loss: float) -> None:
        """A training line: the means since the last one; times are seconds a step.

        collapsed_loss: that of scores all alike with hardest negatives, 2 · margin · batch.
        """
        steps = state.step - state.last_log_step
        loss, state.loss_sum, state.last_log_step = state.loss_sum / steps, 0.0, state.step
        batch_time = (time.perf_counter() - self._start) / steps
        data_time = self.data_time / steps
        shared = {"lr": lr, "batch_time": batch_time, "data_time": data_time}
        self._write(
            {"type": "train", "epoch": state.epoch, "step": state.step, "loss": loss} | shared,
            {"epoch": state.epoch, "Eit": state.step, "Loss": loss} | shared,
            state.step,
        )
        print_on_main(
            f"epoch {state.epoch} [{state.batch}/{n_batches}]  loss {loss:.3f}  lr {lr:.1e}  "
            f"{batch_time:.3f} s/step, {data_time:.3f} of them data"
        )
        if collapsed_loss and abs(loss / collapsed_loss - 1) < 0.01 and not self._collapsed:
            self._collapsed = True
            print_on_main(
                "note: this is the loss of scores that are all alike (2 · margin · batch): hardest "
                "negatives have collapsed them. If it stays, start again with more "
                "--warmup_epochs, in which all negatives count, or a smaller --learning_rate"
            )
        self.data_time, self._start = 0.0, time.perf_counter()

    def dev(self, state: RunState, metrics: dict, is_best: bool) -> None:
        """A validation line, under the official tags (t2i has an i behind, as in VSE++)."""
        line = {"type": "dev", "epoch": state.epoch, "step": state.step, "best": is_best}
        t2i = {f"{name}i": value for name, value in metrics["t2i"].items()}
        scalars = metrics["i2t"] | t2i | {"rsum": metrics["rsum"]}
        self._write(line | metrics, scalars, state.step)
        print_on_main(report(metrics) + "  (dev, best so far)" * is_best)
        self._start = time.perf_counter()


def lines_up_to(path: Path, step: int) -> list[str]:
    """The lines of a metrics.jsonl up to a step; a line cut off in the middle is left out."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line).get("step", 0) <= step:
                kept.append(line)
        except ValueError:
            print(f"warning: {path}: left out an unfinished line", file=sys.stderr)
    return kept


def tensorboard_logger(folder: str) -> object | None:
    """A writer of TensorBoard scalars, None if it cannot be had.

    Its protobuf files are old. The pure Python implementation of protobuf reads them, which has to
    be chosen before protobuf is imported for the first time.
    """
    if "google.protobuf" not in sys.modules:
        os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
    try:
        import tensorboard_logger
    except (ImportError, TypeError) as error:  # TypeError: protobuf was imported otherwise before
        reason = str(error).partition("\n")[0]
        print(f"note: no TensorBoard scalars ({reason})", file=sys.stderr)
        return None
    return tensorboard_logger.Logger(folder, flush_secs=5)


class StopSignal:
    """Notes SIGINT and SIGTERM, so that a step can end and be saved; a second one stops at once."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> StopSignal:
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def agreed(self, device: torch.device) -> int:
        """The signal that any process has had, 0 for none: all stop after the same step."""
        return distributed.all_reduce_max(self.signal, device)

    def _note(self, number: int, frame: object) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        print(f"{signal.Signals(number).name}: stopping after this step", file=sys.stderr)

    def __exit__(self, *exc: object) -> None:
        for stop, handler in self._before.items():
            signal.signal(stop, handler)


def batches(loader: DataLoader, log: RunLog) -> Iterator[Batch]:
    """The loader's batches; the time spent waiting for them goes into the log.

    Raises InputError if a loader process died.
    """
    iterator = iter(loader)
    # PyTorch's handler would raise in the middle of a step; next() notices a dead process too.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while True:
        start = time.perf_counter()
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise InputError(
                f"a loader process died ({reason}), perhaps for lack of memory: "
                "continue with --resume and fewer --workers"
            ) from error
        log.data_time += time.perf_counter() - start
        yield batch
