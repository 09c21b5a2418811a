"""What searching in two stages costs in recall and in time.

    python scripts/benchmark_search.py --checkpoints f8k.pth.tar demo.pth.tar --json search.json
    python scripts/benchmark_search.py --table search.json

Recall: text to image on the test split of each checkpoint, LHSC scoring all images, or only the K
that a first stage picks: by the product of index.py, or by the cosine of the global vectors.

Time: queries of 12 words against 1,000, 100,000 and 1,000,000 images whose encodings are random
unit vectors (D 256, 36 regions, written to --scratch: 19 GB for the largest), of a random model.
The median of --queries queries that follow one another; the files are new, so mostly in memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import PrecompDataset
from errors import InputError, one_line
from evaluation import encode_captions, encode_images, load, progress, score
from index import CANDIDATES, EXHAUSTIVE, Builder, CandidateMap, Index, word_mean
from metrics import recalls, t2i_ranks
from model import LHSC
from train import at_least, cpu_name
from vocab import Vocabulary

KEPT = (10, 20, 50, 100, 200)
WAYS = {"product": "the product of `index.py`", "cosine": "cosine of the global vectors"}
R, D, S = 36, 256, 64
BLOCK = 2000  # images generated at a time


# -- recall ---------------------------------------------------------------------------------------


@torch.inference_mode()
def recall(checkpoint: Path, opt: argparse.Namespace) -> dict:
    """t2i recalls of one trained model with K candidates, for each way of picking them."""
    model, settings, vocab = load(checkpoint, opt)
    data = PrecompDataset(settings["data_path"], settings["data_name"], "test", vocab)
    device = torch.device("cpu")
    images, captions = encode_images(model, data, device), encode_captions(model, data, device)
    sims, owner = torch.from_numpy(score(model, images, captions)), data.image_of_caption
    product = CandidateMap.of(model.similarity)
    queries = [product.query(mean) for mean in word_mean(captions.word_emb, captions.lengths)]
    first = {
        "product": product.stored(images.region_emb.mean(1)) @ torch.stack(queries).T,
        "cosine": images.image_global @ captions.caption_global.T,
    }
    best = sims.topk(min(10, len(sims)), dim=0).indices
    result: dict = {
        "data": f"{data.name} test", "n_images": data.n_images,
        "all": recalls(t2i_ranks(sims.numpy(), owner)),
    }  # fmt: skip
    for way, scores in first.items():
        result[way] = {}
        for k in (k for k in KEPT if k < data.n_images):
            kept = torch.zeros_like(sims, dtype=torch.bool)
            kept.scatter_(0, scores.topk(k, dim=0).indices, True)
            ranks = t2i_ranks(sims.masked_fill(~kept, -1).numpy(), owner)
            lost = ~kept[owner, torch.arange(len(owner))].numpy()
            ranks[lost] = data.n_images  # a right answer that was no candidate
            share = 100 * kept.gather(0, best).float().mean().item()
            result[way][k] = recalls(ranks) | {"top10_kept": share}
    return result


# -- time -----------------------------------------------------------------------------------------


def random_index(folder: Path, n: int, model: LHSC) -> None:
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=generator), dim=-1)

    builder = Builder(folder, n, R, D)
    for start in progress(range(0, n, BLOCK), -(-n // BLOCK), f"{n:,} images"):
        size = min(BLOCK, n - start)
        regions = F.normalize(unit(size, R, D) + unit(size, 1, D), dim=-1)
        builder.add(regions, F.normalize(regions.mean(1), dim=-1))
    builder.finish([str(k) for k in range(n)], model, {"model": "random"})


def timed(scratch: Path, n: int, n_queries: int) -> dict:
    """Median seconds of a query and of its parts, against n images."""
    vocab = Vocabulary(["<pad>", "<start>", "<end>", "<unk>", *(f"w{k}" for k in range(8000))])
    torch.manual_seed(0)
    model = LHSC(len(vocab), img_dim=D, num_regions=R, embed_size=D, sim_dim=S).eval()
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        path = Path(folder) / "index"
        start = time.perf_counter()
        random_index(path, n, model)
        built = time.perf_counter() - start
        index = Index(path, model, vocab)
        rng = np.random.default_rng(0)
        seconds: dict[str, list[float]] = {"encode": [], "candidates": [], "all": []}
        for _ in range(n_queries + 1):  # the first one warms up
            sentence = " ".join(f"w{k}" for k in rng.integers(8000, size=12))
            clock = time.perf_counter()
            caption = index.encode(sentence)
            seconds["encode"].append(time.perf_counter() - clock)
            if n > EXHAUSTIVE:
                clock = time.perf_counter()
                index.candidates(caption, CANDIDATES)
                seconds["candidates"].append(time.perf_counter() - clock)
            clock = time.perf_counter()
            index.images_for(index.encode(sentence), top=10)
            seconds["all"].append(time.perf_counter() - clock)
        size = sum(file.stat().st_size for file in path.iterdir())
    medians = {k: statistics.median(v[1:]) if v else None for k, v in seconds.items()}
    return {"n_images": n, "build_seconds": built, "bytes": size, "seconds": medians}


# -- tables ---------------------------------------------------------------------------------------


def markdown(result: dict) -> str:
    machine = result["machine"]
    lines = []
    if result["recall"]:
        lines += ["| text to image, R@1 / R@10 (LHSC's ten best kept) | "
                  + " | ".join(f"{k} candidates" for k in KEPT) + " | all |",
                  "|---|" + "---|" * (len(KEPT) + 1)]  # fmt: skip
    for one in result["recall"]:
        whole = f"{one['all']['r1']:.1f} / {one['all']['r10']:.1f}"
        for way, name in WAYS.items():
            cells = []
            for k in KEPT:
                at = one[way].get(str(k), one[way].get(k))
                cells.append(
                    f"{at['r1']:.1f} / {at['r10']:.1f} ({at['top10_kept']:.0f} %)" if at else "–"
                )
            lines.append(f"| {one['data']}, {name} | {' | '.join(cells)} | {whole} |")
    if result["time"]:
        lines += ["", f"{machine['device']}, {machine['threads']} threads, D {D}:", "",
                  "| images | index on disk | built in | a query | of it encoding the words "
                  "| picking candidates | reading and scoring them |",
                  "|---|---|---|---|---|---|---|"]  # fmt: skip
    for one in result["time"]:
        s = one["seconds"]
        rest = s["all"] - s["encode"] - (s["candidates"] or 0)
        picked = f"{1e3 * s['candidates']:.0f} ms" if s["candidates"] else "all are scored"
        lines.append(
            f"| {one['n_images']:,} | {one['bytes'] / 1e9:.2f} GB | {one['build_seconds']:.0f} s "
            f"| {1e3 * s['all']:.0f} ms | {1e3 * s['encode']:.0f} ms | {picked} "
            f"| {1e3 * rest:.0f} ms |"
        )
    return "\n".join(lines)


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoints", nargs="*", type=Path, default=[], help="trained models, for the recall")
    add("--data_path", default=None, help="None = the checkpoint's")
    add("--vocab_path", default=None, help="None = the checkpoint's")
    add("--images", nargs="*", type=at_least(1), default=[1_000, 100_000, 1_000_000],
        help="sizes, for the time")  # fmt: skip
    add("--queries", default=20, type=at_least(1), help="timed at each size")
    add("--scratch", default=None, type=Path, help="folder for the encodings, 19 GB a million")
    add("--json", default=None, type=Path, help="write the figures")
    add("--table", default=None, type=Path, help="print the tables of such a file")
    opt = parser.parse_args()
    if opt.table:
        try:
            print(markdown(json.loads(opt.table.read_text(encoding="utf-8"))))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{opt.table}: not this benchmark's JSON ({error!r})") from error
        return
    if opt.json and not opt.json.absolute().parent.is_dir():
        raise InputError(f"{opt.json}: the folder to write into does not exist")
    machine = {"device": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    result: dict = {"machine": machine, "recall": [recall(c, opt) for c in opt.checkpoints]}
    result["time"] = [timed(opt.scratch, n, opt.queries) for n in opt.images]
    if opt.json:
        opt.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(markdown(result))


if __name__ == "__main__":
    main()
