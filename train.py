"""Train LHSC.

    python train.py --data_name f30k_precomp
    python train.py --data_name coco_precomp --num_epochs 20 --lr_update 10

writes to ./runs/LHSC/checkpoint: model_best.pth.tar (best rsum on dev), checkpoint.pth.tar (the
last epoch, with the optimizer) and metrics.jsonl (one JSON object a line, the run's arguments
first); TensorBoard scalars to ./runs/LHSC/log. An earlier run found there is moved aside.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from checkpoint import MODEL_OPTIONS, save_checkpoint
from data import Batch, PrecompDataset, find_files, train_loader
from errors import InputError, one_line
from evaluation import evaluate, report, select_device
from model import LHSC, triplet_loss
from vocab import Vocabulary, build_from_data, vocab_file

COLLAPSED = (
    "note: the loss is that of scores all alike (2 · margin · batch): hardest negatives have "
    "collapsed the scores. If it stays there, start again with more --warmup_epochs, in which all "
    "negatives count, or a smaller --learning_rate"
)


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
    add("--bi_gru", default=True, action=switch, help="GRU in both directions")
    add("--no_imgnorm", default=False, action=switch, help="regions are not l2-normalised")
    add("--no_txtnorm", default=False, action=switch, help="words are not l2-normalised")
    add("--drop_out", default=0.0, type=rate, help="dropout in word self-attention")
    add("--embed_dropout", default=0.4, type=rate, help="dropout of word embeddings")
    add("--pool_dropout", default=0.4, type=rate, help="dropout in global pooling")
    add(
        "--padding",
        default="masked",
        choices=["masked", "released"],
        help="released: <pad> words take part in self-attention, as in the released code",
    )

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", default=128, type=at_least(2), help="captions (and images) a step")
    add("--num_epochs", default=50, type=at_least(1), help="passes over the captions")
    add("--learning_rate", default=2e-4, type=positive, help="of Adam")
    add("--lr_update", default=30, type=at_least(1), help="epochs between steps of ×0.1")
    add("--grad_clip", default=2.0, type=not_negative, help="gradient norm; 0 = no clipping")
    add("--margin", default=0.2, type=not_negative, help="of the hinge loss")
    add("--max_violation", default=True, action=switch, help="only the hardest negative counts")
    add(
        "--warmup_epochs",
        default=0,
        type=at_least(0),
        help="first epochs in which all negatives count, against collapse (released: 0)",
    )

    add = parser.add_argument_group("run").add_argument
    add("--model_name", default="./runs/LHSC/checkpoint", help="folder for checkpoints, metrics")
    add("--logger_name", default="./runs/LHSC/log", help="folder for TensorBoard")
    add("--log_step", default=10, type=at_least(1), help="steps between log lines")
    add("--val_step", default=1000, type=at_least(1), help="steps between validations")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--seed", default=0, type=at_least(0), help="of weights, dropout and batches")
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


def rate(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a dropout rate is at least 0 and below 1")
    return float(text)


def train_step(
    model: LHSC,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    margin: float = 0.2,
    max_violation: bool = True,
    grad_clip: float = 2.0,
) -> float:
    """One optimizer step; returns the loss, summed over the batch."""
    sims = model(batch.images, batch.captions, batch.lengths)  # (B, B)
    loss = triplet_loss(sims, margin, max_violation)
    optimizer.zero_grad()
    loss.backward()
    if grad_clip > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    return loss.item()


def collapsed(loss: float, opt: argparse.Namespace, hardest: bool) -> bool:
    """Whether a loss is that of scores all alike: 2 · margin · batch with hardest negatives.

    Training with hardest negatives from the first step can settle there; see --warmup_epochs.
    """
    return hardest and opt.margin > 0 and abs(loss / (2 * opt.margin * opt.batch_size) - 1) < 0.01


class RunLog:
    """What a run says: lines for people, metrics.jsonl for scripts, scalars for TensorBoard."""

    def __init__(self, folder: Path, logger_name: str, header: dict) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its protobuf files are old
            import tensorboard_logger

        self._tensorboard = tensorboard_logger.Logger(logger_name, flush_secs=5)
        self._file = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._write({"type": "run"} | header)

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


def move_aside(folder: Path) -> None:
    """Nothing of an earlier run is overwritten: its folder gets a number behind its name."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(target)
    print(f"{folder} holds an earlier run: moved to {target}")


def load_vocabulary(opt: argparse.Namespace) -> Vocabulary:
    """The data set's vocabulary, built and saved if there is none."""
    path = vocab_file(opt.vocab_path, opt.data_name)
    if path.is_file():
        return Vocabulary.load(path)
    vocab = build_from_data(opt.data_path, opt.data_name)
    vocab.save(path)
    print(f"{path}: not found, built from the train and dev captions ({len(vocab)} words) and "
          f"saved; a released checkpoint needs the released file instead")  # fmt: skip
    return vocab


def train(opt: argparse.Namespace) -> dict:
    """A whole run; returns the best dev metrics.

    Raises:
        InputError: for anything wrong with the files or the options, before anything is written.
    """
    device = select_device(opt.device)
    for split in ("train", "dev"):
        find_files(opt.data_path, opt.data_name, split)
    vocab = load_vocabulary(opt)
    trainset = PrecompDataset(
        opt.data_path, opt.data_name, "train", vocab, opt.img_dim, opt.num_regions
    )
    opt.img_dim, opt.num_regions = trainset.regions.img_dim, trainset.regions.num_regions
    opt.vocab_size = len(vocab)
    devset = PrecompDataset(
        opt.data_path, opt.data_name, "dev", vocab, opt.img_dim, opt.num_regions, opt.val_captions
    )
    print(f"{opt.data_name}: train {trainset.n_images:,} images, {len(trainset):,} captions; "
          f"dev {devset.n_images:,}, {len(devset):,}; {opt.num_regions} regions × {opt.img_dim}; "
          f"{len(vocab):,} words")  # fmt: skip

    random.seed(opt.seed)
    np.random.seed(opt.seed)
    torch.manual_seed(opt.seed)
    model = LHSC(**{name: getattr(opt, name) for name in MODEL_OPTIONS}).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=opt.learning_rate)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=opt.lr_update, gamma=0.1)
    loader = train_loader(
        trainset, opt.batch_size, opt.workers, opt.seed, pin_memory=device.type == "cuda"
    )
    if not len(loader):
        raise InputError(f"{opt.data_path}/{opt.data_name}: {len(trainset)} captions make no batch")

    folder = Path(opt.model_name)
    move_aside(folder)
    move_aside(Path(opt.logger_name))
    folder.mkdir(parents=True, exist_ok=True)
    log = RunLog(folder, opt.logger_name, describe(opt, device))

    best: dict = {"rsum": -1.0}
    step, validated, warned = 0, 0, False

    def state(epoch: int) -> dict:
        return {
            "epoch": epoch, "Eiters": step, "best_rsum": best["rsum"], "opt": dict(vars(opt)),
            "vocab": vocab.fingerprint(), "model": model.state_dict(),
        }  # fmt: skip

    def validate(epoch: int) -> None:
        nonlocal best, validated
        if validated == step:
            return
        validated = step
        metrics, _ = evaluate([model.eval()], devset, device)
        model.train()
        is_best = metrics["rsum"] > best["rsum"]
        log.dev(epoch, step, metrics, is_best)
        if is_best:
            best = metrics
            save_checkpoint(state(epoch), folder / "model_best.pth.tar")

    for epoch in range(opt.num_epochs):
        loader.batch_sampler.set_epoch(epoch)
        model.train()
        clock = end = time.perf_counter()
        losses, waited, since = 0.0, 0.0, step
        hardest = opt.max_violation and epoch >= opt.warmup_epochs
        for i, batch in enumerate(loader, start=1):
            batch = batch.to(device)
            waited += time.perf_counter() - end
            loss = train_step(model, optimizer, batch, opt.margin, hardest, opt.grad_clip)
            step += 1
            if not np.isfinite(loss):
                raise InputError(f"the loss is {loss} at step {step} (epoch {epoch}): stopped")
            losses += loss
            end = time.perf_counter()
            if step % opt.log_step == 0 or i == len(loader):
                n = step - since
                log.train(
                    {
                        "epoch": epoch, "step": step, "loss": losses / n,
                        "lr": schedule.get_last_lr()[0],
                        "batch_time": (end - clock) / n, "data_time": waited / n,
                    },
                    f"epoch {epoch} [{i}/{len(loader)}]",
                )  # fmt: skip
                if i < len(loader) and collapsed(losses / n, opt, hardest) and not warned:
                    warned = True
                    print(COLLAPSED, flush=True)
                losses, waited, since = 0.0, 0.0, step
                clock = end = time.perf_counter()
            if step % opt.val_step == 0:
                validate(epoch)
                clock = end = time.perf_counter()
                waited, losses, since = 0.0, 0.0, step
        schedule.step()
        validate(epoch)
        save_checkpoint(
            state(epoch) | {"optimizer": optimizer.state_dict()}, folder / "checkpoint.pth.tar"
        )
    print(f"best dev rsum {best['rsum']:.1f}: {folder / 'model_best.pth.tar'}")
    return best


@one_line
def main() -> None:
    train(options().parse_args())


if __name__ == "__main__":
    sys.exit(main())
