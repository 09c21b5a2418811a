"""How fast LHSC is here: against the released loop, and against this machine's matrix products.

    python scripts/benchmark.py                          # full size, some minutes
    python scripts/benchmark.py --quick                  # smaller batches, under a minute
    python scripts/benchmark.py --json cpu.json
    python scripts/benchmark.py --table cpu.json         # the table of an earlier run
    python scripts/benchmark.py --checkpoints runs/demo/checkpoint/model_best.pth.tar
                                        # also: what bfloat16 does to a trained model's ranks

One random model of full size (D 1024, S 256, 36 × 2048 regions, 8,481 words) and captions whose
lengths follow Flickr30K's (15.6 words with <start> and <end>, up to 81) are scored, trained on and
encoded in turn by tests/reference.py, a literal version of the released way (a loop over captions;
every image encoded once per caption, kept in padded float64), and by this code. The two and a
large matrix product take turns within a round, and ratios are medians over the rounds, so that a
machine whose clock wanders does not favour either.

`share of matmul` is how close scoring comes to doing nothing but its matrix products at the speed
of a 2048³ one: (4 R D + 2 D S) operations a word and image, 2 D S a caption and image.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import numpy as np
import torch
from reference import ReleasedLHSC, score_loop
from torch import Tensor

from checkpoint import rename_released, save_checkpoint
from data import Batch, PrecompDataset, train_loader
from errors import InputError, one_line
from evaluation import (
    PRECISIONS,
    encode_captions,
    encode_images,
    load,
    score,
    select_device,
)
from metrics import retrieval_metrics
from model import LHSC, triplet_loss
from scoring import Scorer
from similarity import EncodedCaptions, EncodedImages
from train import cpu_name, train_step
from vocab import SPECIAL_TOKENS, Vocabulary

R, IMG_DIM, D, S, WORD_DIM, VOCAB = 36, 2048, 1024, 256, 300, 8481
LONGEST = 81  # words of Flickr30K's longest caption, the special tokens counted
N_EVALUATION = 1000  # images of Flickr30K's test split
PARTS = ("scoring", "training", "encoding", "loading", "scaling", "evaluation")


# -- a model, data, a clock -----------------------------------------------------------------------


def models(device: torch.device) -> tuple[ReleasedLHSC, LHSC]:
    """The released modules and ours with the same weights, those of graph BatchNorms random."""
    torch.manual_seed(0)
    released = ReleasedLHSC(IMG_DIM, D, S, WORD_DIM, VOCAB, R)
    for name, tensor in released.img_enc.state_dict().items():
        if "W.1" in name and name.endswith("weight"):  # the scale that starts as 0
            tensor.uniform_(0, 0.2)
    ours = LHSC(VOCAB, IMG_DIM, R, D, WORD_DIM, S, padding="released")
    parts = (released.img_enc, released.txt_enc, released.sim_enc)
    ours.load_state_dict(rename_released(*(part.state_dict() for part in parts)))
    return released.to(device).eval(), ours.to(device).eval()


def caption_lengths(n: int) -> Tensor:
    """Flickr30K's distribution, near enough: log-normal, mean 15.6, 5 to 81 words.

    Its longest caption, which decides how wide a padded array is, is in a sample of a test set's
    size.
    """
    generator = torch.Generator().manual_seed(1)
    lengths = torch.exp(math.log(14.7) + 0.35 * torch.randn(n, generator=generator))
    lengths = lengths.round().clamp(5, LONGEST).long()
    if n >= 1000:
        lengths[n // 2] = LONGEST
    return lengths


def random_captions(lengths: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(4, VOCAB, (int(n),), generator=generator) for n in lengths]


def padded(captions: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(captions, batch_first=True)


def clock(work: Callable[[], object], device: torch.device) -> float:
    """Seconds `work` takes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_memory(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes `work` holds at most beyond what was held before; None where it cannot be told."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before

    def status(name: str) -> int:
        text = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", text)[1])

    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, or it would hide what is taken
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status("VmRSS")
    except (OSError, AttributeError):
        work()
        return None
    work()
    return status("VmHWM") - before


def matmul(dtype: torch.dtype, device: torch.device) -> Callable[[], float]:
    """A measurement of the rate of a large matrix product: operations a second."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return lambda: 2 * n**3 / min(clock(lambda: a @ b, device) for _ in range(3))


def rounds(n: int, **work: Callable[[], float]) -> dict[str, list[float]]:
    """Each of `work` measured n times, in turns."""
    results: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(n):
        for name, measure in work.items():
            results[name].append(measure())
    return results


def median_ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


# -- what is measured -----------------------------------------------------------------------------


def random_encodings(model: LHSC, n_images: int, n_captions: int, device: torch.device):
    """Encodings of a given size: unit vectors around a common direction, as of a trained model."""
    generator = torch.Generator(device).manual_seed(3)

    def units(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator, device=device)
        x += torch.ones_like(x[..., :1]) / 2
        return x.div_(x.norm(dim=-1, keepdim=True))

    lengths = caption_lengths(n_captions).to(device)
    with torch.inference_mode():
        regions, words = units(n_images, R, D), units(int(lengths.sum()), D)
        images = EncodedImages(regions, model.similarity.region_pooling(regions))
        return images, EncodedCaptions(
            words, model.similarity.word_pooling(words, lengths), lengths
        )


def operations(n_images: int, lengths: Tensor) -> int:
    """Of the matrix products of scoring that cannot be avoided."""
    per_image = int(lengths.sum()) * (4 * R * D + 2 * D * S) + len(lengths) * 2 * D * S
    return n_images * per_image


def scoring(released: ReleasedLHSC, ours: LHSC, device: torch.device, quick: bool) -> dict:
    """All images × all captions, given their embeddings."""
    cpu = device.type == "cpu"
    n_images = 100 if cpu else 1000  # 100: the released code's shard
    n_captions = (100 if quick else 500) if cpu else (1000 if quick else 5000)
    images, captions = random_encodings(ours, n_images, n_captions, device)
    words = padded(list(captions.word_emb.split(captions.lengths.tolist())))
    scorers = {
        name: Scorer(ours.similarity, dtype)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    shards = [slice(i, i + 100) for i in range(0, n_images, 100)]
    lengths = captions.lengths.tolist()

    @torch.inference_mode()
    def loop() -> Tensor:
        shard = [images.region_emb[rows] for rows in shards]
        return torch.cat([score_loop(released.sim_enc, x, words, lengths).cpu() for x in shard])

    def ours_in(name: str) -> Tensor:
        return torch.cat([tile.cpu() for _, tile in scorers[name].tiles(images, captions)], dim=1)

    ways = {"loop": loop, "fp32": lambda: ours_in("fp32"), "bf16": lambda: ours_in("bf16")}
    sims, peak = {}, {}
    for name, way in ways.items():
        peak[name] = peak_memory(lambda name=name, way=way: sims.update({name: way()}), device)
    measured = rounds(
        5,
        matmul_fp32=matmul(torch.float32, device),
        loop=lambda: clock(ways["loop"], device),
        fp32=lambda: clock(ways["fp32"], device),
        matmul_bf16=matmul(torch.bfloat16, device),
        bf16=lambda: clock(ways["bf16"], device),
    )
    pairs, work = n_images * n_captions, operations(n_images, captions.lengths)
    result: dict = {
        "n_images": n_images,
        "n_captions": n_captions,
        "n_words": len(captions.word_emb),
    }
    for name in ways:
        seconds = statistics.median(measured[name])
        rates = measured["matmul_bf16" if name == "bf16" else "matmul_fp32"]
        result[name] = {
            "seconds": seconds,
            "pairs_per_s": pairs / seconds,
            "ratio": median_ratio(measured["loop"], measured[name]),
            "matmul_share": statistics.median(
                work / rate / t for rate, t in zip(rates, measured[name], strict=True)
            ),
            "peak_memory": peak[name],
            "largest_difference": (sims[name] - sims["loop"]).abs().max().item(),
            "same_rank_order": same_order(sims[name], sims["loop"]),
        }
    result["matmul"] = {
        name: statistics.median(measured[f"matmul_{name}"]) for name in ("fp32", "bf16")
    }
    return result


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether every image ranks the captions alike in both, and every caption the images.

    Scores that are equal in one of the two to the last bit may stand in either order.
    """
    alike = True
    for x, y in ((a, b), (a.T, b.T)):
        order = x.argsort(dim=1)
        x, y = x.gather(1, order), y.gather(1, order)
        alike &= bool(((y.diff(dim=1) >= 0) | (x.diff(dim=1) == 0)).all())
    return alike


def saved_bytes(step: Callable[[], object], model: torch.nn.Module) -> int:
    """Bytes autograd keeps between the forward and the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = step()
    del loss
    return sum(kept.values())


def training(released: ReleasedLHSC, ours: LHSC, device: torch.device, quick: bool) -> dict:
    """Steps: encode, score, hardest negatives, backward, clip, Adam."""
    size = 48 if quick and device.type == "cpu" else 128
    lengths = caption_lengths(size).sort(descending=True).values
    batch = Batch(
        torch.rand(size, R, IMG_DIM), padded(random_captions(lengths)), lengths,
        torch.arange(size), torch.arange(size),
    ).to(device)  # fmt: skip

    def forward(model: torch.nn.Module) -> Tensor:
        return triplet_loss(model(batch.images, batch.captions, batch.lengths))

    result: dict = {"batch": size}
    step: dict[str, Callable[[], object]] = {}
    models = {"loop": released, "ours": ours, "bf16": copy.deepcopy(ours).mixed_precision()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for name, model in models.items():
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
        step[name] = lambda model=model, optimizer=optimizer: train_step(model, optimizer, batch)
        result[name] = {
            "saved_activations": saved_bytes(lambda model=model: forward(model), model),
            "peak_memory": peak_memory(step[name], device),  # Adam's moments are made here, too
        }
    for _ in range(1 if quick else 2):
        for name in step:
            seconds[name].append(clock(step[name], device))
    for name in step:
        result[name]["seconds"] = statistics.median(seconds[name])
    for model in (released, ours):
        model.eval()
        model.zero_grad()
    result["ratio"] = median_ratio(seconds["loop"], seconds["ours"])
    result["bf16"]["ratio"] = median_ratio(seconds["loop"], seconds["bf16"])
    result["saved_ratio"] = (
        result["loop"]["saved_activations"] / result["ours"]["saved_activations"]
    )
    return result


def random_dataset(n_images: int, n_captions: int) -> SimpleNamespace:
    """What encoding needs of a data set, in memory."""
    lengths = caption_lengths(n_captions)
    captions = random_captions(lengths)
    images = torch.rand(n_images, R, IMG_DIM, generator=torch.Generator().manual_seed(4))

    def caption_blocks(order: Tensor, size: int):
        for block in order.split(size):
            yield padded([captions[i] for i in block]), lengths[block], block

    return SimpleNamespace(
        n_images=n_images, images=images, captions=captions, lengths=lengths,
        image_blocks=lambda size, rows: images[rows].split(size), caption_blocks=caption_blocks,
    )  # fmt: skip


@torch.inference_mode()
def encode_released(model: ReleasedLHSC, data: SimpleNamespace, device: torch.device):
    """Each caption with its image, in batches of 100, into padded float64 arrays."""
    n, per_image = len(data.captions), len(data.captions) // data.n_images
    longest = int(data.lengths.max())
    img_embs, cap_embs = np.zeros((n, R, D)), np.zeros((n, longest, D))
    for start in range(0, n, 100):
        rows = slice(start, min(start + 100, n))
        images = data.images[torch.arange(n)[rows] // per_image].to(device)
        captions = padded(data.captions[rows]).to(device)
        img_embs[rows] = model.img_enc(images).cpu().numpy()
        words = model.txt_enc(captions, data.lengths[rows].tolist()).cpu().numpy()
        cap_embs[rows, : words.shape[1]] = words
    return img_embs, cap_embs


def encoding(released: ReleasedLHSC, ours: LHSC, device: torch.device, quick: bool) -> dict:
    """Images and their five captions each, once."""
    n_images = 40 if quick and device.type == "cpu" else 1000
    data = random_dataset(n_images, 5 * n_images)
    kept: dict[str, int] = {}
    padding, ours.text_encoder.padding = ours.text_encoder.padding, "masked"  # our default

    def mine() -> None:
        both = (encode_images(ours, data, device), encode_captions(ours, data, device))
        kept["ours"] = sum(x.nbytes for part in both for x in part)

    def theirs() -> None:
        kept["released"] = sum(x.nbytes for x in encode_released(released, data, device))

    measured = rounds(1, released=lambda: clock(theirs, device), ours=lambda: clock(mine, device))
    ours.text_encoder.padding = padding
    return {
        "n_images": n_images,
        "n_captions": 5 * n_images,
        **{k: {"seconds": v[0], "memory": kept[k]} for k, v in measured.items()},
        "ratio": median_ratio(measured["released"], measured["ours"]),
        "memory_ratio": kept["released"] / kept["ours"],
    }


def scaling(released: ReleasedLHSC, ours: LHSC, device: torch.device, quick: bool) -> dict:
    """Scoring time at three sizes each of images, captions, words a caption: seconds."""
    factor = 1 if device.type == "cpu" else 20
    scorer, result = Scorer(ours.similarity), {}
    for what in ("images", "captions", "words"):
        times = {}
        for size in (1, 2, 4):
            n_images = factor * 25 * (size if what == "images" else 1)
            n_captions = factor * 60 * (size if what == "captions" else 1)
            images, captions = random_encodings(ours, n_images, n_captions, device)
            if what == "words":
                repeated = captions.word_emb.repeat(size, 1)
                captions = EncodedCaptions(
                    repeated, captions.caption_global, captions.lengths * size
                )
            amount = {"images": n_images, "captions": n_captions, "words": len(captions.word_emb)}
            times[str(amount[what])] = min(
                clock(lambda i=images, c=captions: list(scorer.tiles(i, c)), device)
                for _ in range(5)
            )
        result[what] = times
    return result


def write_split(folder: Path, split: str, n_images: int) -> Vocabulary:
    """Random regions and captions in SCAN's layout, and the vocabulary of full size."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    shape = (n_images, R, IMG_DIM)
    ims = np.lib.format.open_memmap(folder / f"{split}_ims.npy", "w+", np.float32, shape)
    for image in ims:
        image[:] = rng.random(shape[1:], dtype=np.float32)
    ims.flush()
    names = [f"w{i}" for i in range(VOCAB - 4)]
    captions = random_captions(caption_lengths(5 * n_images) - 2)
    lines = (" ".join(names[i - 4] for i in caption.tolist()) for caption in captions)
    (folder / f"{split}_caps.txt").write_text("\n".join(lines) + "\n")
    return Vocabulary([*SPECIAL_TOKENS, *names])


def loading(released: ReleasedLHSC, ours: LHSC, device: torch.device, quick: bool) -> dict:
    """Seconds to load and collate a training batch of 128 from a memory-mapped file."""
    with tempfile.TemporaryDirectory() as folder:
        vocab = write_split(Path(folder) / "random", "train", 300)
        dataset = PrecompDataset(folder, "random", "train", vocab)
        start, n = time.perf_counter(), 0
        for _ in train_loader(dataset, 128, workers=0, seed=0):
            n += 1
        return {"batch": 128, "seconds_per_batch": (time.perf_counter() - start) / n}


def evaluation(released: ReleasedLHSC, ours: LHSC, device: torch.device, quick: bool) -> dict:
    """`python evaluation.py` on a test split of Flickr30K's size: wall time and memory."""
    n_images = N_EVALUATION
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        vocab = write_split(folder / "random_precomp", "test", n_images)
        vocab.save(folder / "vocab" / "random_precomp_vocab.json")
        ours.text_encoder.padding = "masked"
        opt = {
            "data_path": str(folder), "data_name": "random_precomp",
            "vocab_path": str(folder / "vocab"), "vocab_size": VOCAB, "img_dim": IMG_DIM,
            "num_regions": R, "embed_size": D, "word_dim": WORD_DIM, "sim_dim": S, "num_layers": 1,
            "bi_gru": True, "graph_layers": 4, "text_layers": 4, "drop_out": 0.0,
            "embed_dropout": 0.4, "pool_dropout": 0.4, "no_imgnorm": False, "no_txtnorm": False,
            "padding": "masked",
        }  # fmt: skip
        checkpoint = {"epoch": 0, "Eiters": 0, "best_rsum": 0.0, "opt": opt}
        save_checkpoint(checkpoint | {"model": ours.state_dict()}, folder / "model.pth.tar")
        command = [sys.executable, "-W", "ignore", "-c", TIMED_EVALUATION, str(ROOT), "--device",
                   str(device), "--model_path", str(folder / "model.pth.tar")]  # fmt: skip
        start = time.perf_counter()
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        wall = time.perf_counter() - start
    if process.returncode:
        raise InputError(f"evaluation.py failed: {process.stdout}")
    parts = json.loads(process.stdout.splitlines()[-1])
    return {
        "n_images": n_images, "n_captions": 5 * n_images, "seconds": wall,
        "encode_seconds": parts["encode_images"] + parts["encode_captions"],
        "score_seconds": parts["score"], "peak_memory": parts["peak_memory"],
    }  # fmt: skip


# evaluation.py with a clock around its parts; the last line it prints is their seconds.
TIMED_EVALUATION = """
import json, pathlib, sys, time
sys.path.insert(0, sys.argv.pop(1))
import evaluation
seconds = {}
def timed(name):
    work = getattr(evaluation, name)
    def run(*args):
        start = time.perf_counter()
        result = work(*args)
        seconds[name] = seconds.get(name, 0) + time.perf_counter() - start
        return result
    setattr(evaluation, name, run)
for name in ("encode_images", "encode_captions", "score"):
    timed(name)
evaluation.main()
status = pathlib.Path("/proc/self/status")  # (ru_maxrss would count the parent's memory, too)
lines = status.read_text().splitlines() if status.exists() else []
peak = [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
print(json.dumps(seconds | {"peak_memory": peak[0] if peak else None}))
"""


def precision(path: Path, device: torch.device) -> dict:
    """Test scores of a trained model in float32 and in bfloat16: recalls and how ranks agree."""
    model, settings, vocab = load(path, argparse.Namespace())
    dataset = PrecompDataset(settings["data_path"], settings["data_name"], "test", vocab)
    model, owner = model.to(device), dataset.image_of_caption
    images, captions = (f(model, dataset, device) for f in (encode_images, encode_captions))
    sims = {name: score(model, images, captions, dtype) for name, dtype in PRECISIONS.items()}
    a, b = sims["fp32"], sims["bf16"]

    def agreement(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
        top_x, top_y = (np.argsort(-z, axis=1, kind="stable")[:, :10] for z in (x, y))
        shared = [len(set(m) & set(n)) / len(m) for m, n in zip(top_x, top_y, strict=True)]
        first = (top_x[:, 0] == top_y[:, 0]).mean()
        return {"same_first": 100 * float(first), "top10_shared": 100 * float(np.mean(shared))}

    return {
        "data": f"{dataset.name} {dataset.split}",
        "largest_difference": float(np.abs(a - b).max()),
        "spread": float(a.std()),
        "i2t": agreement(a, b),
        "t2i": agreement(a.T, b.T),
        **{name: retrieval_metrics(x, owner) for name, x in sims.items()},
    }


# -- what is said ---------------------------------------------------------------------------------


def size(n: int | None) -> str:
    if n is None:
        return "–"
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


def markdown(result: dict) -> str:
    """The tables of a run."""
    machine = result["machine"]
    lines = [f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}:", ""]
    if "scoring" in result:
        s = result["scoring"]
        lines += [
            f"| scoring {s['n_images']:,} images × {s['n_captions']:,} captions | time | pairs/s "
            "| against the loop | share of matmul | peak memory | largest difference |",
            "|---|---|---|---|---|---|---|",
        ]
        names = {"loop": "released loop", "fp32": "fp32", "bf16": "`--precision bf16`"}
        for key, name in names.items():
            x = s[key]
            lines.append(
                f"| {name} | {x['seconds']:.2f} s | {x['pairs_per_s']:,.0f} | {x['ratio']:.2f}× "
                f"| {x['matmul_share']:.0%} | {size(x['peak_memory'])} "
                f"| {x['largest_difference']:.0e} |"
            )
        lines.append("")
    rows = []
    if "training" in result:
        t = result["training"]
        ratios = {"loop": "1×", "ours": f"{t['ratio']:.2f}×"}
        names = {"loop": "released loop", "ours": "here"}
        if "bf16" in t:
            ratios["bf16"], names["bf16"] = f"{t['bf16']['ratio']:.2f}×", "`--precision bf16`"
        for key, name in names.items():
            rows.append(
                f"| training step, batch {t['batch']}, {name} | {t[key]['seconds']:.2f} s "
                f"| {ratios[key]} | {size(t[key]['saved_activations'])} saved for backward, "
                f"{size(t[key]['peak_memory'])} at the peak |"
            )
    if "encoding" in result:
        e = result["encoding"]
        what = f"encoding {e['n_images']:,} images, {e['n_captions']:,} captions"
        for key, name in (("released", "released way"), ("ours", "here")):
            ratio = f"{e['ratio']:.2f}×" if key == "ours" else "1×"
            rows.append(
                f"| {what}, {name} | {e[key]['seconds']:.1f} s | {ratio} "
                f"| {size(e[key]['memory'])} of embeddings |"
            )
    if "evaluation" in result:
        e = result["evaluation"]
        rows.append(
            f"| `evaluation.py`, {e['n_images']:,} × {e['n_captions']:,}, all of it "
            f"| {e['seconds']:.0f} s | encode {e['encode_seconds']:.0f} s + score "
            f"{e['score_seconds']:.0f} s | {size(e['peak_memory'])} resident at the peak |"
        )
    if "loading" in result:
        rows.append(
            f"| loading a batch of {result['loading']['batch']}, one process "
            f"| {1000 * result['loading']['seconds_per_batch']:.0f} ms | | |"
        )
    if rows:
        lines += ["| | time | against the released way | memory |", "|---|---|---|---|", *rows, ""]
    if "precision" in result:
        lines += [
            "| trained model | precision | i2t R@1 / 5 / 10 | t2i R@1 / 5 / 10 | rsum "
            "| same first answer | top ten shared | largest difference |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for p in result["precision"]:
            ways = ("i2t", "t2i")
            agree = [
                " / ".join(f"{p[way][what]:.1f} %" for way in ways)
                for what in ("same_first", "top10_shared")
            ]
            difference = f"{p['largest_difference']:.0e} (spread of scores {p['spread']:.0e})"
            for name, told in (("fp32", ["", "", ""]), ("bf16", [*agree, difference])):
                recalls = [
                    " / ".join(f"{p[name][way][r]:.1f}" for r in ("r1", "r5", "r10"))
                    for way in ways
                ]
                cells = [p["data"], name, *recalls, f"{p[name]['rsum']:.1f}", *told]
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    if "scaling" in result:
        told = [
            f"{what}: " + ", ".join(f"{float(n):,.0f} in {t:.2f} s" for n, t in times.items())
            for what, times in result["scaling"].items()
        ]
        lines += [f"Scoring time by size. {'; '.join(told)}.", ""]
    return "\n".join(lines).rstrip()


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="smaller, under a minute on 2 cores")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="these parts only")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures")
    parser.add_argument(
        "--table", metavar="FILE", type=Path, help="print the table of a run's JSON"
    )
    parser.add_argument("--checkpoints", nargs="+", type=Path, default=[], metavar="CKPT",
                        help="trained models whose ranks in bfloat16 are compared")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    opt = parser.parse_args()
    if opt.table:
        try:
            print(markdown(json.loads(opt.table.read_text(encoding="utf-8"))))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{opt.table}: not a benchmark's JSON ({error!r})") from error
        return
    if opt.json and not opt.json.absolute().parent.is_dir():
        raise InputError(f"{opt.json}: the folder to write into does not exist")
    device = select_device(opt.device)
    cuda = device.type == "cuda"
    result: dict = {
        "machine": {
            "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "quick": opt.quick,
    }
    released, ours = models(device)
    measure = (scoring, training, encoding, loading, scaling, evaluation)
    quick_parts = ("scoring", "training", "encoding", "loading")
    wanted = opt.only if opt.only is not None else (quick_parts if opt.quick else PARTS)
    for part in measure:
        if part.__name__ in wanted:
            print(f"{part.__name__} …", file=sys.stderr, flush=True)
            start = time.perf_counter()
            result[part.__name__] = part(released, ours, device, opt.quick)
            print(f"  {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            write(result, opt.json)
    if opt.checkpoints:
        result["precision"] = [precision(path, device) for path in opt.checkpoints]
    write(result, opt.json)
    print(markdown(result))


def write(result: dict, path: Path | None) -> None:
    """What has been measured so far."""
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
