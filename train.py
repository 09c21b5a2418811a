"""Train LHSC.

    python train.py --data_name f30k_precomp
    python train.py --data_name coco_precomp --lr_update 20

writes to ./runs/LHSC/checkpoint: model_best.pth.tar (best rsum on dev), the newest
checkpoint_STEP.pth.tar (all that is needed to go on) and metrics.jsonl (one JSON object a line, the
run's arguments first); TensorBoard scalars to ./runs/LHSC/log. An earlier run found there is moved
aside.

    python train.py --resume                            # goes on where ./runs/LHSC was stopped
    python train.py --resume runs/mine/checkpoint       # or another run, or one checkpoint_STEP

    torchrun --nproc_per_node 4 train.py …              # on several GPUs: distributed.py
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

import distributed
from checkpoint import (
    MODEL_OPTIONS,
    keep_newest,
    load_newest,
    load_whole,
    random_states,
    save_checkpoint,
    set_random_states,
    step_file,
    step_files,
)
from data import Batch, PrecompDataset, find_files, train_loader
from distributed import collect, gather_rows, say, sum_gradients
from errors import InputError, one_line
from evaluation import evaluate, report, select_device
from model import CHOICES, LHSC, triplet_loss
from vocab import Vocabulary, build_from_data, vocab_file

COLLAPSED = (
    "note: the loss is that of scores all alike (2 · margin · batch): hardest negatives have "
    "collapsed the scores. If it stays there, start again with more --warmup_epochs, in which all "
    "negatives count, or a smaller --learning_rate"
)


# What --recipe sets: see the README's results for what each is worth.
RECIPES = {
    "released": {},
    "modern": {"lr_schedule": "constant", "ema": 0.999},
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of a command line; --recipe changes the defaults of some."""
    parser = options()
    parser.set_defaults(**RECIPES[parser.parse_args(arguments).recipe])
    return parser.parse_args(arguments)


def options() -> argparse.ArgumentParser:
    """The released flags under their released names; the defaults are the paper's F30K run."""
    switch = argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(
        description="Train LHSC.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("data").add_argument
    add("--data_path", default="./data", help="folder of the data sets")
    add("--data_name", default="f30k_precomp", help="its folder in data_path")
    add("--vocab_path", default="./vocab", help="folder of the vocabularies")
    add("--workers", default=min(4, os.cpu_count() or 1), type=at_least(0), help="loader processes")
    add(
        "--val_captions",
        default=0,
        type=at_least(0),
        help="dev captions to validate on, 0 = all (the released code: 5000)",
    )

    add = parser.add_argument_group("model").add_argument
    add("--img_dim", default=None, type=at_least(1), help="width of a region; None = the file's")
    add("--num_regions", default=None, type=at_least(1), help="of an image; None = the file's")
    add("--word_dim", default=300, type=at_least(1), help="word embedding")
    add("--embed_size", default=1024, type=at_least(1), help="joint size D")
    add("--sim_dim", default=256, type=at_least(1), help="similarity size S")
    add("--num_layers", default=1, type=at_least(1), help="GRU layers")
    add("--graph_layers", default=4, type=at_least(0), help="region graph layers")
    add("--text_layers", default=4, type=at_least(0), help="word self-attention layers")
    add(
        "--similarity",
        default="lhsc",
        choices=CHOICES["similarity"],
        help="scan: attended regions' cosines; vse: VSE++'s cosine of means, for comparison",
    )
    add(
        "--alignment",
        default="both",
        choices=CHOICES["alignment"],
        help="which alignments LHSC's score is made of",
    )
    add(
        "--global_image",
        default="regions",
        choices=CHOICES["global_image"],
        help="what the global image vector is pooled from; attended: the regions that the caption "
        "attends to, as in the paper's figure; regions: as in the released code",
    )
    add("--bi_gru", default=True, action=switch, help="GRU in both directions")
    add("--no_imgnorm", default=False, action=switch, help="regions are not l2-normalised")
    add("--no_txtnorm", default=False, action=switch, help="words are not l2-normalised")
    add("--drop_out", default=0.0, type=below_one, help="dropout in word self-attention")
    add("--embed_dropout", default=0.4, type=below_one, help="dropout of word embeddings")
    add("--pool_dropout", default=0.4, type=below_one, help="dropout in global pooling")
    add(
        "--padding",
        default="masked",
        choices=CHOICES["padding"],
        help="released: <pad> words take part in self-attention, as in the released code",
    )

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", default=128, type=at_least(2), help="captions (and images) a step")
    add("--num_epochs", default=50, type=at_least(1), help="passes over the captions")
    add("--learning_rate", default=2e-4, type=positive, help="of Adam")
    add(
        "--lr_schedule", default="step", choices=["step", "cosine", "constant"], help="cosine: to 0"
    )
    add("--lr_update", default=30, type=at_least(1), help="step: epochs between those of ×0.1")
    add("--lr_warmup", default=0, type=at_least(0), help="first steps, with a rising learning rate")
    add("--weight_decay", default=0.0, type=not_negative, help="decoupled (AdamW), of all weights")
    add(
        "--ema",
        default=0.0,
        type=below_one,
        help="decay of averaged weights; 0 = none, or e.g. 0.999",
    )
    add(
        "--precision",
        default="fp32",
        choices=["fp32", "bf16"],
        help="bf16: large matrix products in bfloat16, weights and sums in float32",
    )
    add("--grad_clip", default=2.0, type=not_negative, help="gradient norm; 0 = no clipping")
    add("--margin", default=0.2, type=not_negative, help="of the hinge loss")
    add("--max_violation", default=True, action=switch, help="only the hardest negative counts")
    add(
        "--same_image",
        default="negative",
        choices=["negative", "ignored"],
        help="what another caption of a batch's own image is: ignored, it is no negative",
    )
    add(
        "--warmup_epochs",
        default=0,
        type=at_least(0),
        help="first epochs in which all negatives count, against collapse (released: 0)",
    )

    add(
        "--recipe",
        default="released",
        choices=[*RECIPES],
        help="modern: other defaults for the options above (README, Results); those given win",
    )

    add = parser.add_argument_group("run").add_argument
    add("--model_name", default="./runs/LHSC/checkpoint", help="folder for checkpoints, metrics")
    add("--logger_name", default="./runs/LHSC/log", help="folder for TensorBoard")
    add("--log_step", default=10, type=at_least(1), help="steps between log lines")
    add("--val_step", default=1000, type=at_least(1), help="steps between validations")
    add("--save_step", default=500, type=at_least(1), help="steps between checkpoints")
    add("--keep", default=2, type=at_least(1), help="how many of them are kept")
    add(
        "--resume",
        default=None,
        nargs="?",
        const="",
        metavar="PATH",
        help="go on with the run in --model_name, or the one at PATH (folder or checkpoint)",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--seed", default=0, type=at_least(0), help="of weights, dropout and batches")
    add(
        "--deterministic",
        default=False,
        action=switch,
        help="bitwise repeatable on CUDA too, where that is slower; a CPU always is",
    )
    return parser  # fmt: skip


def at_least(least: int):
    def integer(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: should be {least} or more")
        return int(text)

    return integer


def not_negative(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: should be a number from 0 up")
    return float(text)


def positive(text: str) -> float:
    if not_negative(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: should be above 0")
    return float(text)


def below_one(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: should be at least 0 and below 1")
    return float(text)


def reseed(seed: int, step: int) -> None:
    """Of several processes each draws dropout of its own; one alone goes on as it is."""
    if distributed.size() > 1:
        torch.manual_seed((seed * 1_000_003 + step) * 1_009 + 1 + distributed.rank())


class NotFinite(ArithmeticError):
    """The loss or the gradient of a step is infinite or not a number; nothing was updated."""


def train_step(
    model: LHSC,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    margin: float = 0.2,
    max_violation: bool = True,
    grad_clip: float = 2.0,
    same_image: str = "negative",
) -> float:
    """One optimizer step; returns the loss, summed over the batch.

    same_image: "ignored", another caption of the same image is no negative.

    Raises:
        NotFinite: before the weights are touched.
    """
    sims = collect(model(batch.images, batch.captions, batch.lengths))  # (B, B)
    index = gather_rows(batch.image_index) if same_image == "ignored" else None
    loss = triplet_loss(sims, margin, max_violation, index)
    optimizer.zero_grad()
    loss.backward()
    sum_gradients(model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or float("inf"))
    if not torch.isfinite(loss + norm):
        raise NotFinite(f"loss {loss.item()}, gradient norm {norm.item()}")
    optimizer.step()
    return loss.item()


def collapsed(loss: float, opt: argparse.Namespace, hardest: bool) -> bool:
    """Whether a loss is that of scores all alike: 2 · margin · batch with hardest negatives.

    Training with hardest negatives from the first step can settle there; see --warmup_epochs.
    """
    return hardest and opt.margin > 0 and abs(loss / (2 * opt.margin * opt.batch_size) - 1) < 0.01


def learning_rate(opt: argparse.Namespace, epoch: int, step: int, steps_an_epoch: int) -> float:
    """Of optimizer step `step` of the run, counted from 0.

    Released: ×0.1 every lr_update epochs. With lr_schedule "cosine" it falls to 0 over the run,
    with "constant" it does not. Over the first lr_warmup steps it rises.
    """
    rate = opt.learning_rate
    if opt.lr_schedule == "cosine":
        rate *= (1 + math.cos(math.pi * step / (opt.num_epochs * steps_an_epoch))) / 2
    elif opt.lr_schedule == "step":
        rate *= 0.1 ** (epoch // opt.lr_update)
    return rate * min(1.0, (step + 1) / (opt.lr_warmup + 1))


@torch.no_grad()
def update_average(average: LHSC, model: LHSC, decay: float, step: int) -> None:
    """average ← decay · average + (1 − decay) · model, buffers too; of the first steps faster.

    step: counted from 1; the decay is at most (1 + step) / (10 + step), so that the random
    initial weights are soon forgotten.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    states = average.state_dict().values(), model.state_dict().values()
    for old, new in zip(*states, strict=True):
        if old.is_floating_point():
            old.lerp_(new, weight)
        else:
            old.copy_(new)


class RunLog:
    """What a run says: lines for people, metrics.jsonl for scripts, scalars for TensorBoard."""

    def __init__(self, folder: Path, logger_name: str, header: dict, after: int = 0) -> None:
        """A run that is resumed after step `after` keeps its lines up to there."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its protobuf files are old
            import tensorboard_logger

        self._tensorboard = tensorboard_logger.Logger(logger_name, flush_secs=5)
        self._said: set[str] = set()
        path = folder / "metrics.jsonl"
        lines = [json.dumps({"type": "run"} | header)]
        if after and path.is_file():
            again = {"type": "resume", "step": after} | header
            lines = [*self._up_to(path, after), json.dumps(again)]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    @staticmethod
    def _up_to(path: Path, step: int) -> list[str]:
        """The lines of steps not after `step`; what was cut off in the middle is left out."""
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line).get("step", 0) <= step:
                    kept.append(line)
            except ValueError:
                print(f"warning: {path}: left out an unfinished line", file=sys.stderr)
        return kept

    def once(self, note: str) -> None:
        """A line for people, the first time."""
        if note not in self._said:
            self._said.add(note)
            print(note, flush=True)

    def _write(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _scalars(self, scalars: dict[str, float], step: int) -> None:
        for tag, value in scalars.items():
            self._tensorboard.log_value(tag, value, step)

    def train(self, line: dict, where: str) -> None:
        """A training line: epoch, step, loss, lr, batch_time and data_time (seconds a step)."""
        self._write({"type": "train"} | line)
        tags = {"loss": "Loss", "step": "Eit"}
        self._scalars({tags.get(k, k): v for k, v in line.items()}, line["step"])
        print(
            f"{where}  loss {line['loss']:.3f}  lr {line['lr']:.1e}  "
            f"{line['batch_time']:.3f} s/step, {line['data_time']:.3f} of them data",
            flush=True,
        )

    def dev(self, epoch: int, step: int, metrics: dict, best: bool) -> None:
        """A validation line, under the released tags (t2i has an i behind, as in VSE++)."""
        self._write({"type": "dev", "epoch": epoch, "step": step, "best": best} | metrics)
        i2t, t2i = metrics["i2t"], {f"{k}i": v for k, v in metrics["t2i"].items()}
        self._scalars(i2t | t2i | {"rsum": metrics["rsum"]}, step)
        print(report(metrics) + "  (dev, best so far)" * best, flush=True)


def describe(opt: argparse.Namespace, device: torch.device) -> dict:
    """What is needed to repeat a run: arguments, versions, commit, hardware, seed."""
    root = Path(__file__).resolve().parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # not a git checkout
    cuda = device.type == "cuda"
    return {
        "arguments": vars(opt),
        "seed": opt.seed,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "numpy", "nltk")},
        "commit": commit,
        "hardware": {
            "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
            "threads": torch.get_num_threads(),
        },
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def model_size(model: LHSC) -> int:
    """How many numbers are learned."""
    return sum(parameter.numel() for parameter in model.parameters())


def move_aside(folder: Path) -> None:
    """Nothing of an earlier run is overwritten: its folder gets a number behind its name."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(target)
    say(f"{folder} holds an earlier run: moved to {target}")


def load_vocabulary(opt: argparse.Namespace) -> Vocabulary:
    """The data set's vocabulary, built and saved if there is none."""
    path = vocab_file(opt.vocab_path, opt.data_name)
    if path.is_file():
        return Vocabulary.load(path)
    vocab = build_from_data(opt.data_path, opt.data_name)
    if distributed.is_first():
        vocab.save(path)
    say(f"{path}: not found, built from the train and dev captions ({len(vocab)} words) and "
        f"saved; a released checkpoint needs the released file instead")  # fmt: skip
    return vocab


# What a resumed run may change; everything else is the checkpoint's.
MAY_CHANGE = {
    "data_path", "vocab_path", "workers", "num_epochs", "model_name", "logger_name", "log_step",
    "val_step", "save_step", "keep", "device", "resume", "deterministic",
}  # fmt: skip


def resumed(opt: argparse.Namespace, given: dict) -> tuple[argparse.Namespace, dict]:
    """The options of the run to go on with, and its newest whole state.

    given: the options that stand on the command line.

    Raises:
        InputError: if there is no run to resume, or an option given contradicts it.
    """
    path, saved = Path(opt.resume or opt.model_name), None
    if distributed.is_first():
        path, saved = (path, load_whole(path)) if path.is_file() else load_newest(path)
    path = Path(str(distributed.from_first(str(path))))
    saved = saved or load_whole(path)
    if missing := {"optimizer", "random", "batch", "vocab"} - saved.keys():
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
    old = saved["opt"]
    for name, value in given.items():
        shapes = name not in MAY_CHANGE or (
            name == "num_epochs" and old.get("lr_schedule") == "cosine"
        )
        if shapes and old.get(name) != value:
            raise InputError(
                f"--{name} {value}: {path} was trained with {old.get(name)}; leave the option out, "
                "or start a new run without --resume"
            )
    now = vars(opt) | old | given
    if "model_name" not in given:
        now["model_name"] = str(path.parent)
    say(f"going on from {path}: epoch {saved['epoch']}, batch {saved['batch']}")
    return argparse.Namespace(**now), saved


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One run a folder.

    Raises:
        InputError: if another process trains into it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder}: another run is training into it; give this one another --model_name"
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


class Stop:
    """Notes SIGINT and SIGTERM, so that a step can end and be saved; a second one is heeded."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> Stop:
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def agreed(self, device: torch.device) -> int:
        """The signal that any process has had: they stop after the same step. (0: none.)

        What arrives while the others are asked stays noted for the next step.
        """
        return distributed.largest(self.signal, device)

    def _note(self, number: int, frame: object) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        print(f"{signal.Signals(number).name}: stopping after this step", file=sys.stderr)

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def train(opt: argparse.Namespace, saved: dict | None = None) -> dict:
    """A whole run, or the rest of one from the state `saved`; returns the best dev metrics.

    Raises:
        InputError: for anything wrong with the files or the options, before anything is written.
        SystemExit: 130 after SIGINT, 143 after SIGTERM, when the step is done and saved.
    """
    device = distributed.start(select_device(opt.device))
    if opt.batch_size < distributed.size():
        raise InputError(
            f"--batch_size {opt.batch_size}: fewer examples than the {distributed.size()} processes"
        )
    if opt.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    for split in ("train", "dev"):
        find_files(opt.data_path, opt.data_name, split)
    vocab = load_vocabulary(opt)
    if saved and saved["vocab"] != vocab.fingerprint():
        raise InputError(
            f"{vocab_file(opt.vocab_path, opt.data_name)}: not the vocabulary the run began with"
        )
    trainset = PrecompDataset(
        opt.data_path, opt.data_name, "train", vocab, opt.img_dim, opt.num_regions
    )
    opt.img_dim, opt.num_regions = trainset.regions.img_dim, trainset.regions.num_regions
    opt.vocab_size = len(vocab)
    devset = PrecompDataset(
        opt.data_path, opt.data_name, "dev", vocab, opt.img_dim, opt.num_regions, opt.val_captions
    )
    processes = f"; {distributed.size()} processes" if distributed.size() > 1 else ""
    say(f"{opt.data_name}: train {trainset.n_images:,} images, {len(trainset):,} captions; "
        f"dev {devset.n_images:,}, {len(devset):,}; {opt.num_regions} regions × {opt.img_dim}; "
        f"{len(vocab):,} words{processes}")  # fmt: skip

    random.seed(opt.seed)
    np.random.seed(opt.seed)
    torch.manual_seed(opt.seed)
    try:
        model = LHSC(**{name: getattr(opt, name) for name in MODEL_OPTIONS}).to(device)
    except ValueError as error:  # options that do not go together
        raise InputError(str(error)) from error
    if opt.precision == "bf16":
        model.mixed_precision()
    average = copy.deepcopy(model).requires_grad_(False) if opt.ema else None
    # Without weight decay AdamW is Adam.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=opt.learning_rate, weight_decay=opt.weight_decay
    )
    loader = train_loader(
        trainset, opt.batch_size, opt.workers, opt.seed, pin_memory=device.type == "cuda"
    )
    if not len(loader):
        raise InputError(f"{opt.data_path}/{opt.data_name}: {len(trainset)} captions make no batch")

    reseed(opt.seed, 0)
    first_epoch, first_batch, step, validated, losses, logged = 0, 0, 0, 0, 0.0, 0
    best: dict = {"rsum": -1.0}
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if average is not None:
            average.load_state_dict(saved["average"])
        if len(saved["random"]) == distributed.size():
            set_random_states(saved["random"][distributed.rank()])
        else:
            say(f"saved by {len(saved['random'])} processes, going on with {distributed.size()}: "
                "dropout draws other numbers than it would have")  # fmt: skip
            reseed(opt.seed, saved["Eiters"])
        first_epoch, first_batch, step = saved["epoch"], saved["batch"], saved["Eiters"]
        validated, losses, logged = saved["validated"], saved["loss_sum"], saved["logged"]
        best = {"rsum": saved["best_rsum"]}

    folder = Path(opt.model_name)
    first = distributed.is_first()  # it alone writes
    with lock(folder) if first else contextlib.nullcontext(), Stop() as stop:
        if first and (not saved or not step_file(folder, step).is_file()):  # new, or a branch
            move_aside(folder)
            move_aside(Path(opt.logger_name))
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            header = describe(opt, device) | {"parameters": model_size(model)}
            log = RunLog(folder, opt.logger_name, header, after=step)

        def state(epoch: int, **others: object) -> dict:
            return {
                "epoch": epoch, "Eiters": step, "best_rsum": best["rsum"], "opt": dict(vars(opt)),
                "vocab": vocab.fingerprint(), "model": model.state_dict(),
            } | others  # fmt: skip

        def save(epoch: int, batch: int) -> None:
            """All that is needed to go on from here."""
            going_on = {
                "optimizer": optimizer.state_dict(),
                "random": distributed.of_all(random_states()), "batch": batch,
                "validated": validated, "loss_sum": losses, "logged": logged,
            }  # fmt: skip
            if average is not None:
                going_on["average"] = average.state_dict()
            if first:
                save_checkpoint(state(epoch, **going_on), step_file(folder, step))
                keep_newest(folder, opt.keep)

        def validate(epoch: int) -> None:
            nonlocal best, validated
            if validated == step:
                return
            validated = step
            metrics, _ = evaluate([(average or model).eval()], devset, device)
            model.train()
            is_best = metrics["rsum"] > best["rsum"]
            best = metrics if is_best else best
            if first:
                log.dev(epoch, step, metrics, is_best)
            if first and is_best:
                weights = (average or model).state_dict()
                save_checkpoint(state(epoch, model=weights), folder / "model_best.pth.tar")

        for epoch in range(first_epoch, opt.num_epochs):
            loader.batch_sampler.set_epoch(epoch, first_batch)
            model.train()
            clock = end = time.perf_counter()
            waited, timed = 0.0, step
            hardest = opt.max_violation and epoch >= opt.warmup_epochs
            for i, batch in enumerate(batches(loader), start=1 + first_batch):
                waited += time.perf_counter() - end
                rate = learning_rate(opt, epoch, step, len(loader))
                for group in optimizer.param_groups:
                    group["lr"] = rate
                batch = batch.to(device)
                try:
                    loss = train_step(
                        model, optimizer, batch, opt.margin, hardest, opt.grad_clip, opt.same_image
                    )
                except NotFinite as error:
                    stop_at(batch, folder, epoch, step, rate, error)
                step += 1
                if average is not None:
                    update_average(average, model, opt.ema, step)
                losses += loss
                end = time.perf_counter()
                if step % opt.log_step == 0 or i == len(loader):
                    mean = losses / (step - logged)
                    if first:
                        log.train(
                            {
                                "epoch": epoch, "step": step, "loss": mean,
                                "lr": rate,
                                "batch_time": (end - clock) / (step - timed),
                                "data_time": waited / (step - timed),
                            },
                            f"epoch {epoch} [{i}/{len(loader)}]",
                        )  # fmt: skip
                    if first and i < len(loader) and collapsed(mean, opt, hardest):
                        log.once(COLLAPSED)
                    losses, logged, waited, timed = 0.0, step, 0.0, step
                    clock = time.perf_counter()
                if step % opt.val_step == 0:
                    validate(epoch)
                stopping = stop.agreed(device)
                if stopping or (step % opt.save_step == 0 and i < len(loader)):
                    save(epoch, i)
                if stopping:
                    say(f"stopped at step {step}; to go on: python train.py --resume {folder}")
                    sys.exit(128 + stopping)
                if step % opt.val_step == 0 or step % opt.save_step == 0:
                    waited, timed = 0.0, step
                    clock = end = time.perf_counter()
            first_batch = 0
            validate(epoch)
            save(epoch + 1, 0)
            stopping = stop.agreed(device)
            if stopping:
                say(f"stopped at step {step}; to go on: python train.py --resume {folder}")
                sys.exit(128 + stopping)
    say(f"best dev rsum {best['rsum']:.1f}: {folder / 'model_best.pth.tar'}")
    return best


def batches(loader: Iterable[Batch]) -> Iterator[Batch]:
    """The loader's batches; a loader process that was killed ends the run in one line.

    Raises:
        InputError: if a loader process died.
    """
    try:
        iterator = iter(loader)
        # PyTorch's handler would raise in the middle of whatever is being done, and again while
        # that is being told; waiting for a batch, it notices the death within five seconds anyway.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from iterator
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"a loader process died ({reason}), for want of memory perhaps: "
            "go on with --resume, and fewer --workers"
        ) from error


def stop_at(
    batch: Batch, folder: Path, epoch: int, step: int, lr: float, error: NotFinite
) -> NoReturn:
    """Say what is needed to replay a step that came to nothing, and end the run."""
    report = {
        "error": str(error), "epoch": epoch, "step": step + 1, "lr": lr,
        "image_index": gather_rows(batch.image_index).tolist(),
        "caption_index": gather_rows(batch.caption_index).tolist(),
    }  # fmt: skip
    path = folder / "not_finite.json"
    if distributed.is_first():
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    raise InputError(
        f"step {step + 1} (epoch {epoch}, learning rate {lr:.1e}): {error}; its images "
        f"and captions are named in {path}, the weights were left alone. Try a smaller "
        "--learning_rate"
    )


def given_options(arguments: list[str] | None = None) -> dict:
    """The options that stand on the command line."""
    parser = options()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(arguments))


@one_line
def main() -> None:
    opt, saved = parse(), None
    with distributed.together():
        distributed.start(select_device(opt.device))
        if opt.resume is not None:
            opt, saved = resumed(opt, given_options())
        train(opt, saved)


if __name__ == "__main__":
    sys.exit(main())
