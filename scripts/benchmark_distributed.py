"""Training steps by one process and by several, on the same global batch.

    python scripts/benchmark_distributed.py --processes 1 2 --json distributed.json

Each process has one thread (on GPUs: one GPU). A random model of full size, random regions and
captions of Flickr30K's lengths; dropout as in training. Prints seconds a step, and how much of it
is left when the number of processes grows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from benchmark import IMG_DIM, VOCAB, D, R, S, caption_lengths, padded, random_captions

import distributed
from data import Batch
from errors import InputError, one_line
from evaluation import select_device
from model import LHSC
from train import at_least, cpu_name, train_step


def measure(batch_size: int, n_steps: int, device: torch.device) -> dict:
    """Seconds of each step in this process (all take part in all), after one to warm up."""
    device = distributed.start(device)
    torch.manual_seed(0)
    model = LHSC(VOCAB, IMG_DIM, R, embed_size=D, sim_dim=S).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    lengths = caption_lengths(batch_size).sort(descending=True).values
    mine = distributed.share(batch_size)
    captions = padded(random_captions(lengths)[mine])
    index = torch.arange(batch_size)[mine]
    images = torch.rand(batch_size, R, IMG_DIM)[mine]
    batch = Batch(images, captions, lengths[mine], index, index).to(device)
    seconds = []
    for _ in range(n_steps + 1):
        start = time.perf_counter()
        train_step(model, optimizer, batch)  # ends in loss.item(): the device is done
        seconds.append(time.perf_counter() - start)
    return {"processes": distributed.size(), "seconds": statistics.median(seconds[1:])}


def run(n: int, opt: argparse.Namespace) -> dict:
    """This script again, as n processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [
            sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
            "--nproc_per_node", str(n), __file__, "--worker", str(out), "--steps", str(opt.steps),
            "--batch_size", str(opt.batch_size), "--device", opt.device,
        ]  # fmt: skip
        result = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if result.returncode:
            raise InputError(f"{n} processes: failed with exit status {result.returncode}")
        return json.loads(out.read_text(encoding="utf-8"))


def markdown(result: dict) -> str:
    machine = result["machine"]
    lines = [
        f"{machine['device']}, torch {machine['torch']}, a global batch of {result['batch_size']}, "
        "one thread a process:" if machine["cpu"] else
        f"{machine['device']}, torch {machine['torch']}, a global batch of {result['batch_size']}:",
        "", "| processes | a training step | against one | of the ideal |", "|---|---|---|---|",
    ]  # fmt: skip
    first = result["runs"][0]
    for one in result["runs"]:
        ratio = first["seconds"] / one["seconds"]
        ideal = one["processes"] / first["processes"]
        lines.append(
            f"| {one['processes']} | {one['seconds']:.2f} s | {ratio:.2f}× | {ratio / ideal:.0%} |"
        )
    return "\n".join(lines)


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--processes", nargs="+", type=at_least(1), default=[1, 2], help="numbers of them")
    add("--batch_size", default=64, type=at_least(2), help="of all processes together")
    add("--steps", default=3, type=at_least(1), help="timed")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--json", default=None, type=Path, help="write the figures")
    add("--worker", default=None, type=Path, help=argparse.SUPPRESS)
    opt = parser.parse_args()
    device = select_device(opt.device)
    if opt.worker:
        with distributed.together():
            result = measure(opt.batch_size, opt.steps, device)
            if distributed.is_first():
                opt.worker.write_text(json.dumps(result), encoding="utf-8")
        return
    if opt.json and not opt.json.absolute().parent.is_dir():
        raise InputError(f"{opt.json}: the folder to write into does not exist")
    cpu = device.type == "cpu"
    name = cpu_name() if cpu else torch.cuda.get_device_name(device)
    result = {
        "machine": {"device": name, "cpu": cpu, "torch": torch.__version__},
        "batch_size": opt.batch_size, "runs": [run(n, opt) for n in opt.processes],
    }  # fmt: skip
    if opt.json:
        opt.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(markdown(result))


if __name__ == "__main__":
    main()
