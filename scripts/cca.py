"""The linear baseline: CCA of mean regions and bags of words, in closed form.

    python scripts/cca.py --data_name f8k_precomp --json results/flickr8k/cca.json

It uses neither word order nor individual regions (Hotelling, 1936; for images and sentences
Gong et al., 2014). A trained model should score higher.

Shape letters: B images, C captions, V words of the vocabulary, k = min(img_dim, V).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Captions, PrecompDataset
from evaluation import BANK_CAPTIONS, report
from metrics import bootstrap_intervals, image_hits, qb_norm_both_ways, retrieval_metrics
from utils import check_targets, number, one_line, write_json
from vocab import Vocabulary, vocab_file

SHRINK = (0.01, 0.03, 0.1, 0.3, 1.0)  # tried on dev
BLOCK = 1000  # images or captions at a time


def mean_regions(dataset: PrecompDataset) -> Tensor:
    """The mean region of each image: (B, img_dim) float64."""
    return torch.cat([block.mean(1).double() for block in dataset.image_blocks(BLOCK)])


def tf_idf(captions: Captions, idf: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """In blocks: the captions' indices (C,), and log(1 + count) · idf, scaled to norm 1 (C, V)."""
    for block in torch.arange(len(captions)).split(BLOCK):
        counts = [captions.words(int(k)).bincount(minlength=len(idf)) for k in block]
        values = torch.stack(counts).double().log1p() * idf  # (C, V)
        yield block, values / values.norm(dim=1, keepdim=True).clamp_min(1e-12)


class CCA:
    """Means and covariances of the training pairs: an image x and a caption y."""

    def __init__(self, dataset: PrecompDataset, n_words: int) -> None:
        n, x = len(dataset), mean_regions(dataset)
        words = torch.cat([dataset.words(k).unique() for k in range(n)])
        self.idf = (n / (1 + words.bincount(minlength=n_words).double())).log().clamp_min(0)  # (V,)
        self.x_mean, self.xx = x.mean(0), torch.cov(x.T, correction=0)  # xx (img_dim, img_dim)
        self.y_mean, self.xy, self.yy = 0, 0, 0  # (V,), (img_dim, V), (V, V)
        for block, y in tf_idf(dataset, self.idf):
            self.y_mean = self.y_mean + y.sum(0) / n
            self.xy = self.xy + (x[dataset.image_of_caption[block]] - self.x_mean).T @ y / n
            self.yy = self.yy + y.T @ y / n
        self.yy = self.yy - self.y_mean.outer(self.y_mean)

    def maps(self, shrink: float) -> tuple[Tensor, Tensor]:
        """Linear maps of x (img_dim, k) and of y (V, k) that maximise their correlations σ.

        C_xx^−½ U σ² and C_yy^−½ V σ², with U σ Vᵀ = C_xx^−½ C_xy C_yy^−½; Gong et al. weight
        dimensions by σ².

        shrink: added to the diagonal of C_xx, as a fraction of its mean; ten times as much is
            added to C_yy, because there are many words and most are rare.
        """
        x_root, y_root = inverse_root(self.xx, shrink), inverse_root(self.yy, 10 * shrink)
        left, correlations, right = torch.linalg.svd(x_root @ self.xy @ y_root, False)
        return x_root @ left * correlations.square(), y_root @ right.T * correlations.square()

    def encode(
        self, dataset: PrecompDataset, x_map: Tensor, y_map: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The mapped images (B, k) and captions (C, k), with norm 1."""
        images = (mean_regions(dataset) - self.x_mean) @ x_map  # (B, k)
        words = (y - self.y_mean for _, y in tf_idf(dataset, self.idf))
        captions = torch.cat([y @ y_map for y in words])  # (C, k)
        return F.normalize(images), F.normalize(captions)


def inverse_root(covariance: Tensor, shrink: float) -> Tensor:
    """(C + shrink · mean(diag C) · 1)^−½."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(0) + shrink * covariance.diagonal().mean()
    return (vectors * values.rsqrt()) @ vectors.T


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data_path", default="./data", help="folder of the data sets")
    add("--data_name", default="f30k_precomp", help="the data set's folder in data_path")
    add("--vocab_path", default="./vocab", help="folder of the vocabularies")
    add("--qb_norm", default=0.0, type=number(0), metavar="BETA", help="as in evaluation.py")
    add("--json", type=Path, help="write the metrics")
    opt = parser.parse_args()
    check_targets(opt.json)
    vocab = Vocabulary.load(vocab_file(opt.vocab_path, opt.data_name))
    where = opt.data_path, opt.data_name
    train, dev, test = (PrecompDataset(*where, split, vocab) for split in ("train", "dev", "test"))
    bank = PrecompDataset(*where, "train", vocab, max_captions=BANK_CAPTIONS)
    cca, tried = CCA(train, len(vocab)), []

    def scores(
        dataset: PrecompDataset, x_map: Tensor, y_map: Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cosines (B, C) for image to text, and for text to image."""
        images, captions = cca.encode(dataset, x_map, y_map)
        sims = (images @ captions.T).numpy()
        if not opt.qb_norm:
            return sims, sims
        of_images, of_captions = cca.encode(bank, x_map, y_map)
        banks = (of_images @ captions.T).numpy(), (images @ of_captions.T).numpy()
        return qb_norm_both_ways(sims, *banks, opt.qb_norm)

    for shrink in SHRINK:
        maps = cca.maps(shrink)
        i2t, t2i = scores(dev, *maps)
        tried.append((retrieval_metrics(i2t, dev.image_of_caption, t2i)["rsum"], shrink, maps))
        print(f"shrink {shrink:g}: dev rsum {tried[-1][0]:.1f}", flush=True)
    dev_rsum, shrink, maps = max(tried, key=lambda one: one[0])
    i2t, t2i = scores(test, *maps)
    metrics = retrieval_metrics(i2t, test.image_of_caption, t2i)
    metrics["bootstrap"] = bootstrap_intervals([image_hits(i2t, test.image_of_caption, t2i)])
    print(report(metrics))
    if opt.json:
        metrics |= {"data": f"{test.name} test", "dev_rsum": dev_rsum, "shrink": shrink,
                    "parameters": sum(x.numel() for x in maps),
                    "qb_norm": opt.qb_norm}  # fmt: skip
        write_json(opt.json, metrics)


if __name__ == "__main__":
    main()
