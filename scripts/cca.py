"""The floor: a linear CCA of mean regions and bags of words, in closed form.

    python scripts/cca.py --data_name f8k_precomp --json results/flickr8k/cca.json

It knows no order of words and no region by itself, and nothing is trained step by step (Hotelling,
1936; for pictures and sentences Gong et al., 2014). A matcher that has learned what there is to
learn should be above it. Time grows with captions × words² and words³, memory with words².
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import PrecompDataset
from errors import InputError, one_line
from evaluation import report, write_whole
from metrics import bootstrap_intervals, image_hits, retrieval_metrics
from vocab import Vocabulary, vocab_file

BLOCK = 4096  # captions, or images, at a time
SHRINK = (0.01, 0.03, 0.1, 0.3, 1.0)  # tried on dev


def mean_regions(dataset: PrecompDataset) -> Tensor:
    """(n_images, img_dim) float64."""
    return torch.cat([block.mean(1).double() for block in dataset.image_blocks(BLOCK)])


def counts(dataset: PrecompDataset, captions: Tensor, n_words: int) -> Tensor:
    """How often each word stands in each of some captions: (C, n_words) float64."""
    ((words, lengths, _),) = dataset.caption_blocks(captions, len(captions))
    inside = torch.arange(words.shape[1]) < lengths.unsqueeze(1)
    return torch.zeros(len(words), n_words, dtype=torch.float64).scatter_add_(
        1, words, inside.double()
    )


def tf_idf(counts: Tensor, idf: Tensor) -> Tensor:
    """log(1 + count) · idf, divided by its length: (C, n_words)."""
    weighted = counts.log1p() * idf
    return weighted / weighted.norm(dim=1, keepdim=True).clamp_min(1e-12)


class Moments(NamedTuple):
    """Of the train pairs of image x and caption y."""

    idf: Tensor  # (n_words,)
    x_mean: Tensor
    y_mean: Tensor
    xx: Tensor  # covariances
    yy: Tensor
    xy: Tensor

    @classmethod
    def of(cls, dataset: PrecompDataset, n_words: int) -> Moments:
        images, owner = mean_regions(dataset), torch.from_numpy(dataset.image_of_caption)
        blocks = torch.arange(len(dataset)).split(BLOCK)
        having = sum((counts(dataset, block, n_words) > 0).sum(0) for block in blocks)
        idf = (len(dataset) / (1 + having.double())).log().clamp_min(0)
        x = images[owner]
        x_mean = x.mean(0)
        y_sum = torch.zeros(n_words, dtype=torch.float64)
        yy = torch.zeros(n_words, n_words, dtype=torch.float64)
        xy = torch.zeros(x.shape[1], n_words, dtype=torch.float64)
        for block in blocks:
            y = tf_idf(counts(dataset, block, n_words), idf)
            y_sum += y.sum(0)
            yy += y.T @ y
            xy += (x[block] - x_mean).T @ y
        n = len(dataset)
        y_mean = y_sum / n
        xx = (x - x_mean).T @ (x - x_mean) / n
        return cls(idf, x_mean, y_mean, xx, yy / n - y_mean.outer(y_mean), xy / n)


class CCA(NamedTuple):
    """Images and captions to where their correlation is largest."""

    x_map: Tensor  # (img_dim, k)
    y_map: Tensor  # (n_words, k)
    correlations: Tensor  # (k,), falling

    @classmethod
    def of(cls, moments: Moments, shrink: float) -> CCA:
        """C_xx^−½ U and C_yy^−½ V, with U σ Vᵀ = C_xx^−½ C_xy C_yy^−½.

        shrink: added to the diagonal of C_xx and C_yy, as a share of its mean (words: ten times
        that: there are many, and most are rare).
        """
        x_root, y_root = inverse_root(moments.xx, shrink), inverse_root(moments.yy, 10 * shrink)
        left, correlations, right = torch.linalg.svd(x_root @ moments.xy @ y_root, False)
        return cls(x_root @ left, y_root @ right.T, correlations)

    def scores(self, moments: Moments, dataset: PrecompDataset) -> Tensor:
        """Cosines, dimensions weighted by σ² (Gong et al.): (n_images, n_captions) float32."""
        weight = self.correlations.square()
        images = (mean_regions(dataset) - moments.x_mean) @ self.x_map * weight
        captions = torch.cat([
            (tf_idf(counts(dataset, block, len(self.y_map)), moments.idf) - moments.y_mean)
            @ self.y_map * weight
            for block in torch.arange(len(dataset)).split(BLOCK)
        ])  # fmt: skip
        images, captions = (x / x.norm(dim=1, keepdim=True) for x in (images, captions))
        return (images @ captions.T).float()


def inverse_root(covariance: Tensor, shrink: float) -> Tensor:
    """(C + shrink · mean(diag C) · 1)^−½."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(0) + shrink * covariance.diagonal().mean()
    return (vectors * values.rsqrt()) @ vectors.T


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data_path", default="./data", help="folder of the data sets")
    parser.add_argument("--data_name", default="f30k_precomp", help="its folder in data_path")
    parser.add_argument("--vocab_path", default="./vocab", help="folder of the vocabularies")
    parser.add_argument("--json", default=None, type=Path, help="write the metrics")
    opt = parser.parse_args()
    vocab = Vocabulary.load(vocab_file(opt.vocab_path, opt.data_name))
    train, dev, test = (
        PrecompDataset(opt.data_path, opt.data_name, split, vocab)
        for split in ("train", "dev", "test")
    )
    for dataset in (dev, test):
        if dataset.regions.img_dim != train.regions.img_dim:
            raise InputError(
                f"{dataset.regions.path}: regions of {dataset.regions.img_dim} numbers, those of "
                f"train have {train.regions.img_dim}"
            )
    moments = Moments.of(train, len(vocab))
    best: tuple[float, CCA, float] | None = None
    for shrink in SHRINK:
        cca = CCA.of(moments, shrink)
        rsum = retrieval_metrics(cca.scores(moments, dev).numpy(), dev.image_of_caption)["rsum"]
        print(f"shrink {shrink:g}: dev rsum {rsum:.1f}", flush=True)
        if best is None or rsum > best[0]:
            best = rsum, cca, shrink
    rsum, cca, shrink = best
    sims, owner = cca.scores(moments, test).numpy(), test.image_of_caption
    metrics = retrieval_metrics(sims, owner)
    metrics["bootstrap"] = bootstrap_intervals([image_hits(sims, owner)])
    print(report(metrics))
    if opt.json is not None:
        metrics |= {"data": f"{test.name} test", "dev_rsum": rsum, "shrink": shrink,
                    "parameters": cca.x_map.numel() + cca.y_map.numel()}  # fmt: skip
        text = json.dumps(metrics, indent=1) + "\n"
        write_whole(opt.json, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
