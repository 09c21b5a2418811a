"""Speed of this code on this machine, compared with the official loop and bare matrix products.

    python scripts/benchmark.py                         # scoring training encoding processes
    python scripts/benchmark.py scoring --quick         # smaller, under a minute
    python scripts/benchmark.py search --checkpoints runs/demo/checkpoint/model_best.pth.tar
    python scripts/benchmark.py --device cuda --json results/speed/gpu.json

scoring     100 images × 500 captions from their embeddings (on a GPU 1,000 × 1,000)
training    a step at batch 128: with the paper's sizes (D 1024), and with small ones (D 256)
encoding    200 images and their 1,000 captions
search      recall of --checkpoints if only candidates are scored; runs only if named
processes   a training step with one process and with several, one thread or GPU each

The model has random weights. The captions are as long as Flickr30K's. What is compared runs in
turns, and figures are medians over the turns, so that a changing clock rate favours neither side.

The official loop is tests/reference.py: one caption at a time, as in the authors' code. It runs
with PyTorch's default settings, as its users run it; this code runs as in train.py and
evaluation.py. If this code chooses another library for its matrix products, the loop is also
measured with that library. The limit of the scoring is the time that its matrix products alone
would take at the rate of the fastest product of the same precision on this machine.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]
import numpy as np
import torch
from helpers import resident
from reference import OfficialLHSC, score_loop
from torch import Tensor

import distributed
from attention import word_mean
from checkpoint import rename_official
from data import Batch, Captions, PrecompDataset, collate
from evaluation import encode_captions, encode_images, load, score
from metrics import recalls, t2i_ranks
from model import LHSC, triplet_loss
from utils import (
    InputError,
    check_targets,
    choose_matmul,
    cpu_name,
    one_line,
    products_are_exact,
    reuse_freed_memory,
    select_device,
    write_json,
)
from vocab import SPECIAL_TOKENS, Vocabulary

WORD_DIM, VOCAB_SIZE = 300, 8481
LONGEST = 81  # words of Flickr30K's longest caption, with <start> and <end>
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # of a CPU, for matrix products
DTYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16}  # of this code's large products
CANDIDATES = (10, 20, 50, 100, 200)
GLOBAL_BATCH = {False: 64, True: 16}  # of `processes`; True: --quick
Size = namedtuple("Size", "R img_dim D S")
SIZES = {"paper": Size(36, 2048, 1024, 256), "small": Size(36, 256, 256, 64)}


# -- a model and data -----------------------------------------------------------------------------


def models(size: Size, device: torch.device) -> tuple[OfficialLHSC, LHSC]:
    """The official modules and ours, with the same random weights."""
    torch.manual_seed(0)
    official = OfficialLHSC(size.img_dim, size.D, size.S, WORD_DIM, VOCAB_SIZE, size.R)
    ours = LHSC(VOCAB_SIZE, size.img_dim, size.R, size.D, WORD_DIM, size.S)
    parts = (official.img_enc, official.txt_enc, official.sim_enc)
    ours.load_state_dict(rename_official(*(part.state_dict() for part in parts)))
    return official.to(device).eval(), ours.to(device).eval()


def random_captions(n: int) -> Captions:
    """n captions with lengths like Flickr30K's: log-normal, mean 15.6, 5 to 81 words."""
    known = (f"w{k}" for k in range(VOCAB_SIZE - len(SPECIAL_TOKENS)))
    rng = np.random.default_rng(1)
    lengths = np.exp(np.log(14.7) + 0.35 * rng.standard_normal(n)).round().clip(5, LONGEST)
    words = rng.integers(VOCAB_SIZE - len(SPECIAL_TOKENS), size=(n, LONGEST))
    texts = [
        " ".join(f"w{k}" for k in row[: int(length) - 2])
        for row, length in zip(words, lengths, strict=True)
    ]
    return Captions(texts, Vocabulary([*SPECIAL_TOKENS, *known]))


def random_batch(size: Size, n: int) -> Batch:
    captions, images = random_captions(n), torch.rand(n, size.R, size.img_dim)
    return collate([(images[k], captions.words(k), k, k) for k in range(n)])


def random_images(size: Size, n: int) -> SimpleNamespace:
    """What encode_images needs of a data set."""
    images = torch.rand(n, size.R, size.img_dim)
    return SimpleNamespace(n_images=n, image_blocks=lambda n, rows: images[rows].split(n))


# -- clocks ---------------------------------------------------------------------------------------


def clock(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def peak_memory(work: Callable[[], object], device: torch.device) -> float | None:
    """Peak MB of `work`, beyond what is in use before it; None without Linux's /proc."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    if not Path("/proc/self/clear_refs").exists():
        work()
        return None

    ctypes.CDLL(None).malloc_trim(0)  # return freed memory; its reuse would not be counted
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident()
    work()
    return resident("VmHWM") - before


Works = dict[str, Callable[[], object]]  # what is compared, by name


def compare(
    what: str, works: Works, n: int, device: torch.device, limits: Works | None = None
) -> list[dict]:
    """A row for each work, measured n times: seconds, speed-up over the official loops, memory.

    limits: the least seconds possible at each precision, measured in the same turns.

    Raises InputError if a work is faster than its limit, because the limit is then unreliable.
    """
    limits = limits or {}
    peak = {name: peak_memory(work, device) for name, work in works.items()}  # and warm up
    measures = {name: partial(clock, work, device) for name, work in works.items()}
    measures |= {f"limit {precision}": limit for precision, limit in limits.items()}
    turns = [{name: measure() for name, measure in measures.items()} for _ in range(n)]

    def ratio(a: str, b: str) -> float:
        return statistics.median(seconds[a] / seconds[b] for seconds in turns)

    rows = []
    for name in works:
        seconds = statistics.median(seconds[name] for seconds in turns)
        row = {"what": what, "way": name, "seconds": seconds}
        row |= {f"× {loop}": ratio(loop, name) for loop in works if loop.startswith("official")}
        if limits:
            share = 100 * ratio(f"limit {name if name in limits else 'fp32'}", name)
            if share > 100:
                raise InputError(f"{name}: {share:.0f} % of the limit. Run it on an idle machine")
            row["% of the limit"] = share
        rows.append(row | {"peak MB": peak[name]})
    return rows


# -- matrix products ------------------------------------------------------------------------------


def use(product: str) -> None:
    """Choose how fp32 matrices are multiplied: torch's "default", "onednn" (CPU), "tf32" (GPU)."""
    if hasattr(torch.backends.mkldnn, "matmul"):  # torch 2.9
        torch.backends.mkldnn.matmul.fp32_precision = "bf16" if product == "onednn" else "none"
        torch.backends.cuda.matmul.fp32_precision = "tf32" if product == "tf32" else "ieee"
    else:
        torch.backends.cuda.matmul.allow_tf32 = product == "tf32"


def run(product: str, reuse: bool, work: Callable[..., object], *arguments: object) -> object:
    use(product)
    reuse_freed_memory(reuse)
    return work(*arguments)


def ways(
    loop: Callable[[], object], ours: Callable[[torch.dtype | None], object], machine: dict
) -> Works:
    """The official loop, and this code in each precision, with the products that each uses."""
    chosen, works = machine["chosen"], {"official loop": partial(run, "default", False, loop)}
    if chosen != "default":
        works[f"official loop, {chosen}"] = partial(run, chosen, False, loop)
    for precision in machine["products"]:
        product = "tf32" if precision == "tf32" else chosen
        works[precision] = partial(run, product, True, ours, DTYPES[precision])
    return works


def rate(product: str, device: torch.device, n: int, S: int) -> float:
    """Operations per second of the faster product: (n, n) · (n, n) or (4 n, n/2) · (n/2, S)."""
    use(product)
    dtype = torch.bfloat16 if product == "bf16" else torch.float32
    rates = []
    for rows, inner, columns in ((n, n, n), (4 * n, n // 2, S)):
        a = torch.randn(rows, inner, device=device, dtype=dtype)
        b = torch.randn(inner, columns, device=device, dtype=dtype)
        fastest = min(clock(lambda a=a, b=b: a @ b, device) for _ in range(3))
        rates.append(2 * rows * inner * columns / fastest)
    return max(rates)


def describe(device: torch.device) -> dict:
    """The machine, the library this code chooses, and the products that each precision may use."""
    machine = {"torch": torch.__version__, "chosen": choose_matmul(device)}
    if device.type == "cuda":
        products = {"fp32": ["default"], "tf32": ["tf32"], "bf16": ["bf16"]}
        return machine | {"device": torch.cuda.get_device_name(device), "products": products}
    products = {"fp32": ["default"]}
    use("onednn")
    if products_are_exact():
        products["fp32"].append("onednn")
    # A processor without bf16 instructions may be hundreds of times slower in it.
    if rate("bf16", device, 256, 64) > rate("default", device, 256, 64):
        products["bf16"] = ["bf16"]
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    default = "MKL" if torch.backends.mkl.is_available() else "PyTorch's default library"
    return machine | {
        "device": f"{cpu_name()}, {torch.get_num_threads()} threads", "products": products,
        "flags": [flag for flag in FLAGS if flag in flags],
        "library": "oneDNN" if machine["chosen"] == "onednn" else default,
    }  # fmt: skip


# -- the parts: each returns the rows of a table --------------------------------------------------


def scoring(opt: argparse.Namespace, machine: dict, device: torch.device) -> list[dict]:
    """All images × all captions, from their embeddings."""
    size, cpu = SIZES["paper"], device.type == "cpu"
    n_images, n_captions = (100, 100 if opt.quick else 500) if cpu else (1000, 1000)
    official, ours = models(size, device)
    images = encode_images(ours, random_images(size, n_images), device)
    captions = encode_captions(ours, random_captions(n_captions), device)
    lengths = captions.lengths.tolist()
    words = torch.nn.utils.rnn.pad_sequence(captions.word_emb.split(lengths), batch_first=True)

    @torch.inference_mode()
    def loop() -> Tensor:
        shards = images.region_emb.split(100)  # the official code's size
        return torch.cat([score_loop(official.sim_enc, x, words, lengths) for x in shards]).cpu()

    # Per word and image, attention takes 4 R D operations and the projection 2 D S.
    per_word, per_caption = 4 * size.R * size.D + 2 * size.D * size.S, 2 * size.D * size.S
    operations = n_images * (len(captions.word_emb) * per_word + n_captions * per_caption)

    def limit(products: list[str]) -> float:
        n = 2048 if cpu else 8192
        return operations / max(rate(product, device, n, size.S) for product in products)

    works = ways(loop, partial(score, ours, images, captions), machine)
    limits = {p: partial(limit, names) for p, names in machine["products"].items()}
    what = f"scoring {n_images:,} images × {n_captions:,} captions"
    rows = compare(what, works, 3 if opt.quick else 5, device, limits)
    sims = {name: np.asarray(work()) for name, work in works.items()}
    for row in rows:
        row["pairs/s"] = n_images * n_captions / row["seconds"]
        differences = np.abs(sims[row["way"]] - sims["official loop"])
        row["largest difference"] = float(differences.max())
    return rows


def train_step(model: torch.nn.Module, adam: torch.optim.Adam, batch: Batch, *dtype) -> None:
    """One step, as in train.py and in the authors' code; only train.py's Adam is fused."""
    sims = model(batch.images, batch.captions, batch.lengths, *dtype)
    loss = triplet_loss(distributed.all_gather_with_grad(sims, replicated=True))
    adam.zero_grad()
    loss.backward()
    distributed.sum_gradients(model.parameters())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
    adam.step()


def training(opt: argparse.Namespace, machine: dict, device: torch.device) -> list[dict]:
    """A step: encode, score, hardest negatives, backward, clip, Adam."""
    rows, n = [], 16 if opt.quick else 128
    for name, size in SIZES.items():
        x = random_batch(size, n).to(device)
        loop, ours = (
            partial(train_step, model.train(), torch.optim.Adam(model.parameters(), fused=fused), x)
            for model, fused in zip(models(size, device), (None, True), strict=True)
        )
        what = f"training step, batch {n}, {name} size (D {size.D}, S {size.S})"
        rows += compare(what, ways(loop, ours, machine), 3, device)
    return rows


def encoding(opt: argparse.Namespace, machine: dict, device: torch.device) -> list[dict]:
    """Images and their captions. The official code encodes an image once for each caption."""
    size, n_images = SIZES["paper"], 20 if opt.quick else 200
    official, ours = models(size, device)
    captions = random_captions(5 * n_images)
    images = random_images(size, n_images)

    @torch.inference_mode()
    def loop() -> None:
        for padded, lengths, rows in captions.caption_blocks(torch.arange(5 * n_images), 100):
            (block,) = images.image_blocks(100, rows // 5)
            official.img_enc(block.to(device))
            official.txt_enc(padded.to(device), lengths)

    def each_once(_: torch.dtype | None) -> None:
        encode_images(ours, images, device)
        encode_captions(ours, captions, device)

    fp32_only = machine | {"products": {"fp32": machine["products"]["fp32"]}}
    what = f"encoding {n_images:,} images, {5 * n_images:,} captions"
    return compare(what, ways(loop, each_once, fp32_only), 1 if opt.quick else 3, device)


def processes(opt: argparse.Namespace, machine: dict, device: torch.device) -> list[dict]:
    """Training steps on one global batch with 1, 2, … processes, started by torchrun."""
    most = min(2, os.cpu_count() or 1) if device.type == "cpu" else torch.cuda.device_count()
    rows, what = [], f"training step, global batch of {GLOBAL_BATCH[opt.quick]}"
    for n in (n for n in (1, 2, 4, 8) if n <= most):
        with tempfile.NamedTemporaryFile() as file:
            subprocess.run([
                sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node", str(n), __file__, "--worker", file.name,
                "--device", device.type, *["--quick"] * opt.quick,
            ], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)  # fmt: skip
            seconds = json.loads(Path(file.name).read_text())
        row = {"what": what, "processes": n, "seconds": seconds}
        one = rows[0]["seconds"] if rows else seconds
        rows.append(row | {"× one process": one / seconds})
    return rows


def worker(opt: argparse.Namespace, device: torch.device) -> None:
    """One of several processes: the median seconds of three steps."""
    with distributed.process_group(device) as device:
        choose_matmul(device)
        size, n = SIZES["paper"], GLOBAL_BATCH[opt.quick]
        rows = distributed.rank_slice(n)
        batch = Batch(*(x[rows] for x in random_batch(size, n))).to(device)
        model = models(size, device)[1].train()
        adam = torch.optim.Adam(model.parameters(), fused=True)
        reuse_freed_memory()
        seconds = [clock(lambda: train_step(model, adam, batch), device) for _ in range(4)]
        if distributed.is_main_process():
            opt.worker.write_text(json.dumps(statistics.median(seconds[1:])))


def search(opt: argparse.Namespace, machine: dict, device: torch.device) -> list[dict]:
    """Text-to-image recalls on test if only the best candidates are scored."""
    use(machine["chosen"])
    return [*map(candidate_recalls, opt.checkpoints)]


@torch.inference_mode()
def candidate_recalls(checkpoint: Path) -> dict:
    from search import Candidates

    model, settings, vocab = load(checkpoint, argparse.Namespace())
    data = PrecompDataset(settings["data_path"], settings["data_name"], "test", vocab)
    device = torch.device("cpu")
    images, captions = encode_images(model, data, device), encode_captions(model, data, device)
    sims = torch.from_numpy(score(model, images, captions))  # (n_images, n_captions)
    best = sims.topk(min(10, len(sims)), dim=0).indices
    words = word_mean(captions.word_emb, captions.lengths)
    order = Candidates(model.similarity, images.region_emb.mean(1)).fit(words)
    row = {"text to image: R@1 / R@10 (of the ten best, kept)": f"{data.name} {data.split}"}
    for k in (*(k for k in CANDIDATES if k < data.n_images), data.n_images):
        kept = torch.zeros_like(sims, dtype=torch.bool)
        kept.scatter_(0, order.topk(k, dim=0).indices, True)
        found = recalls(t2i_ranks(sims.masked_fill(~kept, -1).numpy(), data.image_of_caption))
        share = kept.gather(0, best).float().mean().item()
        name = "all" if k == data.n_images else f"{k} candidates"
        row[name] = f"{found['r1']:.1f} / {found['r10']:.1f} ({share:.0%})"
    return row


# -- tables ---------------------------------------------------------------------------------------


def markdown(result: dict) -> str:
    """The tables of one machine; rows with the same columns share a table."""
    machine = result["machine"]
    about = [machine["device"], f"torch {machine['torch']}"]
    if "flags" in machine:
        about += [" ".join(machine["flags"]), f"matrix products by {machine['library']}"]
        if "bf16" not in machine["products"]:
            about.append("bf16 products are slower than fp32 here and left out")
    tables: dict[tuple[str, ...], list[dict]] = {}
    for part in (part for part in PARTS if part in result):
        for row in result[part]:
            tables.setdefault(tuple(row), []).append(row)
    texts = [f"{'; '.join(about)}."]
    for columns, rows in tables.items():
        cells = [columns, ["---"] * len(columns), *(map(cell, row.values()) for row in rows)]
        texts.append("\n".join(f"| {' | '.join(row)} |" for row in cells))
    return "\n\n".join(texts)


def cell(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


# -- the command ----------------------------------------------------------------------------------

PARTS = {part.__name__: part for part in (scoring, training, encoding, search, processes)}


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    default = [name for name in PARTS if name != "search"]
    add("parts", nargs="*", metavar="PART", default=default, help=f"of {', '.join(PARTS)}")
    add("--quick", action="store_true", help="smaller sizes, fewer repeats")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--json", type=Path, metavar="FILE", help="add the figures to those in this file")
    add("--checkpoints", nargs="+", default=[], type=Path, help="search: trained models")
    add("--worker", type=Path, help=argparse.SUPPRESS)
    opt = parser.parse_args()
    if unknown := set(opt.parts) - PARTS.keys():
        parser.error(f"no part {min(unknown)}: choose from {', '.join(PARTS)}")
    device = select_device(opt.device)
    if opt.worker:
        return worker(opt, device)
    check_targets(opt.json)
    machine = describe(device)
    result = {"machine": machine}
    if opt.json and opt.json.is_file():
        earlier = json.loads(opt.json.read_text(encoding="utf-8"))
        if any(earlier["machine"][key] != machine[key] for key in ("device", "torch")):
            raise InputError(f"{opt.json}: figures of another machine or torch; name a new file")
        result = earlier | result
    for name in opt.parts:
        print(f"{name} …", file=sys.stderr, flush=True)
        result[name] = PARTS[name](opt, machine, device)
        if opt.json:
            write_json(opt.json, result)
    print(markdown(result))


if __name__ == "__main__":
    main()
