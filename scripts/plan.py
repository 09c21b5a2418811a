"""How long an epoch takes on 1, 8 and 64 processors, what travels, what fits: from measured rates.

    python scripts/plan.py --speed results/speed/cpu-2-cores.json
    python scripts/plan.py --tflops 40 --bandwidth 100         # assumed rates of a GPU

A step's operations are counted (below), the measured step says how many of them the machine does
a second, and what every process has to do by itself is kept apart from what is divided:

    divided    image encoder, text encoder, scoring
    not        the products of the graph layers' matrices (8 D³ each, and twice that backwards),
               Adam, and the sum of the gradients over the processes

Traffic is of a ring: each process sends and receives about twice the gradients, and the others'
captions. Memory: weights, gradients and Adam's two moments, and what is saved for the backward
pass, which is divided.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from errors import InputError, one_line
from model import LHSC
from train import at_least, positive

R, IMG_DIM, D, S, WORD_DIM, LAYERS = 36, 2048, 1024, 256, 300, 4
WORDS = 15.6  # of a caption, with <start> and <end>: Flickr30K's mean
DATA = {"F30K": (145_000, 8_481), "COCO": (566_435, 11_353)}  # train captions, vocabulary
BYTES = 4


class Work(NamedTuple):
    """Operations of one training step (a multiplication and an addition are two)."""

    images: float
    captions: float
    scoring: float
    products: float  # by every process

    @classmethod
    def of(cls, batch: int) -> Work:
        """Backward passes cost twice the forward; scoring is done again in its own."""
        words = batch * WORDS
        layer = 2 * 2 * R * D**2 + 2 * 2 * R**2 * D
        image = 2 * R * IMG_DIM * D + LAYERS * layer + 2 * (R + 1) * D**2
        attention = LAYERS * (3 * 2 * WORD_DIM**2 + 2 * 2 * WORDS * WORD_DIM)
        word = attention + 2 * 2 * 3 * D * (WORD_DIM + D) + 2 * D**2
        pair = words * (4 * R * D + 2 * D * S) + batch * 2 * D * S
        return cls(3 * batch * image, 3 * words * word, 4 * batch * pair, 3 * LAYERS * 8 * D**3)

    @property
    def divided(self) -> float:
        return self.images + self.captions + self.scoring


class Plan(NamedTuple):
    """One process's part of a step."""

    divided: float  # seconds
    products: float  # seconds
    traffic: float  # bytes
    exchange: float  # seconds
    memory: float  # bytes

    @property
    def seconds(self) -> float:
        return self.divided + self.products + self.exchange


def parameters(vocab: int) -> int:
    with torch.device("meta"):
        model = LHSC(vocab, IMG_DIM, R, embed_size=D, word_dim=WORD_DIM, sim_dim=S)
    return sum(p.numel() for p in model.parameters())


def plan(n: int, batch: int, vocab: int, rate: float, bandwidth: float, saved: float) -> Plan:
    """rate: operations a second of one process; bandwidth: bytes a second; saved: bytes for the
    backward pass of the whole batch."""
    work, weights = Work.of(batch), BYTES * parameters(vocab)
    words = batch * (WORDS + 1) * D * BYTES  # captions as words and global vectors, there and back
    traffic = 2 * (n - 1) / n * (weights + 2 * words) + (n - 1) / n * BYTES * batch**2
    memory = 4 * weights + saved / n + words
    return Plan(work.divided / n / rate, work.products / rate, traffic, traffic / bandwidth, memory)


def measured(path: Path) -> tuple[float, float, int, str]:
    """Of a benchmark's training step: operations a second, saved bytes, batch, machine."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        training, machine = result["training"], result["machine"]
        work = Work.of(training["batch"])
        rate = (work.divided + work.products) / training["ours"]["seconds"]
        saved = training["ours"]["saved_activations"]
        return rate, saved, training["batch"], f"{machine['device']}, {machine['threads']} threads"
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; scripts/benchmark.py --json writes one") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the figures of scripts/benchmark.py ({error!r})") from error


def table(sizes: list[int], batch: int, rate: float, bandwidth: float, saved: float) -> str:
    lines = [
        "| data | processes | a step | of it divided work | products | exchange | traffic a step "
        "| memory each | an epoch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (captions, vocab) in DATA.items():
        for n in sizes:
            p = plan(n, batch, vocab, rate, bandwidth, saved)
            epoch = -(-captions // batch) * p.seconds
            lines.append(
                f"| {name} | {n} | {1e3 * p.seconds:,.0f} ms | {p.divided / p.seconds:.0%} "
                f"| {p.products / p.seconds:.0%} | {p.exchange / p.seconds:.0%} "
                f"| {p.traffic / 1e6:,.0f} MB | {p.memory / 1e9:.2f} GB | {duration(epoch)} |"
            )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    root = Path(__file__).resolve().parent.parent
    add("--speed", default=root / "results/speed/cpu-2-cores.json", type=Path,
        help="figures of benchmark.py: its training step")  # fmt: skip
    add("--tflops", default=None, type=positive, help="assume this rate instead of the measured")
    add("--bandwidth", default=10.0, type=positive, help="GB/s between processes (assumed)")
    add("--processes", nargs="+", type=at_least(1), default=[1, 8, 64], help="numbers of them")
    add("--batch_size", default=None, type=at_least(2), help="None = the measured step's")
    opt = parser.parse_args()
    rate, saved, batch, machine = measured(opt.speed)
    if opt.batch_size:
        saved, batch = saved * (opt.batch_size / batch) ** 2, opt.batch_size  # pairs, at worst
    whose = f"measured: {machine}, {rate / 1e9:,.0f} GFLOP/s"
    if opt.tflops:
        rate, whose = opt.tflops * 1e12, f"assumed: {opt.tflops:g} TFLOP/s"
    work = Work.of(batch)
    total = work.divided + work.products
    print(f"batch {batch}: {total / 1e12:.2f} TFLOP a step: images {work.images / total:.0%}, "
          f"captions {work.captions / total:.0%}, scoring {work.scoring / total:.0%}, products "
          f"{work.products / total:.0%}")  # fmt: skip
    print(f"{whose} each; {opt.bandwidth:g} GB/s between them (assumed)\n")
    print(table(opt.processes, batch, rate, 1e9 * opt.bandwidth, saved))
    wall = work.divided / work.products
    print(
        f"\nBeyond {wall:.0f} processes the products, which each does by itself, outlast the rest."
    )


if __name__ == "__main__":
    main()
