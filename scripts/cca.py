"""The linear baseline: CCA of mean regions and bags of words, in closed form.

    python scripts/cca.py --data_name f8k_precomp --json results/flickr8k/cca.json

It sees neither the order of the words nor single regions, and nothing is trained step by step
(Hotelling, 1936; for images and sentences Gong et al., 2014). A trained model should be above it.
Time grows with words³, memory with words².

Shape letters: B images, C captions, V words of the vocabulary, k = min(img_dim, V).
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from attention import caption_index_of
from data import Captions, PrecompDataset
from evaluation import report
from metrics import bootstrap_intervals, image_hits, retrieval_metrics
from utils import atomic_write, check_targets, one_line
from vocab import Vocabulary, vocab_file

warnings.filterwarnings("ignore", "Sparse CSR tensor support")  # torch's note on its product

SHRINK = (0.01, 0.03, 0.1, 0.3, 1.0)  # tried on dev


def mean_regions(dataset: PrecompDataset) -> Tensor:
    """(B, img_dim) float64."""
    return torch.cat([block.mean(1).double() for block in dataset.image_blocks(1000)])


def word_counts(captions: Captions, n_words: int) -> Tensor:
    """How often each word stands in each caption: sparse (C, V) float64."""
    words = torch.cat([captions.words(k) for k in range(len(captions))])
    ones = torch.ones(len(words), dtype=torch.float64)
    return sparse(caption_index_of(captions.lengths), words, ones, (len(captions), n_words))


def sparse(rows: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """A sparse matrix; values in the same place are added."""
    where = torch.stack([rows, columns])
    return torch.sparse_coo_tensor(where, values, size, check_invariants=True).coalesce()


def tf_idf(counts: Tensor, idf: Tensor) -> Tensor:
    """log(1 + count) · idf, each caption divided by its length: sparse (C, V)."""
    caption, word = counts.indices()
    values = counts.values().log1p() * idf[word]
    squares = torch.zeros(len(counts), dtype=values.dtype).index_add_(0, caption, values.square())
    values = values / squares.sqrt().clamp_min(1e-12)[caption]
    return sparse(caption, word, values, counts.shape)


class Moments(NamedTuple):
    """Of the train pairs of an image x and a caption y."""

    idf: Tensor  # (V,)
    x_mean: Tensor  # (img_dim,)
    y_mean: Tensor  # (V,)
    xx: Tensor  # covariances: (img_dim, img_dim)
    yy: Tensor  # (V, V)
    xy: Tensor  # (img_dim, V)

    @classmethod
    def of(cls, dataset: PrecompDataset, n_words: int) -> Moments:
        counts, n = word_counts(dataset, n_words), len(dataset)
        captions_with = counts.indices()[1].bincount(minlength=n_words)
        idf = (n / (1 + captions_with.double())).log().clamp_min(0)
        x, y = mean_regions(dataset), tf_idf(counts, idf)
        x_mean, y_mean = x.mean(0), torch.sparse.sum(y, 0).to_dense() / n
        x = x - x_mean
        # All images have the same number of captions: their captions are summed first.
        caption, word = y.indices()
        image = caption // dataset.captions_per_image
        y_of_image = sparse(image, word, y.values(), (len(x), n_words))  # (B, V)
        yy = torch.sparse.mm(y.T, y).to_dense() / n - y_mean.outer(y_mean)
        return cls(idf, x_mean, y_mean, x.T @ x / len(x), yy, (y_of_image.T @ x).T / n)


class CCA(NamedTuple):
    """Projections of images and captions to where their correlation is largest."""

    x_map: Tensor  # (img_dim, k)
    y_map: Tensor  # (V, k)
    correlations: Tensor  # (k,), falling

    @classmethod
    def of(cls, moments: Moments, shrink: float) -> CCA:
        """C_xx^−½ U and C_yy^−½ V, with U σ Vᵀ = C_xx^−½ C_xy C_yy^−½.

        shrink: added to the diagonal of C_xx, as a share of its mean; ten times that to C_yy,
            because there are many words and most are rare.
        """
        x_root, y_root = inverse_root(moments.xx, shrink), inverse_root(moments.yy, 10 * shrink)
        left, correlations, right = torch.linalg.svd(x_root @ moments.xy @ y_root, False)
        return cls(x_root @ left, y_root @ right.T, correlations)

    def score(self, moments: Moments, dataset: PrecompDataset) -> Tensor:
        """Cosines, dimensions weighted by σ² (Gong et al.): (B, C) float32."""
        y = tf_idf(word_counts(dataset, len(self.y_map)), moments.idf)
        images = (mean_regions(dataset) - moments.x_mean) @ self.x_map
        captions = y @ self.y_map - moments.y_mean @ self.y_map
        weighted = (x * self.correlations.square() for x in (images, captions))
        images, captions = (x / x.norm(dim=1, keepdim=True) for x in weighted)
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
    check_targets(opt.json)
    vocab = Vocabulary.load(vocab_file(opt.vocab_path, opt.data_name))
    train = PrecompDataset(opt.data_path, opt.data_name, "train", vocab)
    dev, test = (
        PrecompDataset(opt.data_path, opt.data_name, split, vocab, train.regions.img_dim)
        for split in ("dev", "test")
    )
    moments = Moments.of(train, len(vocab))
    tried = {}
    for shrink in SHRINK:
        sims = CCA.of(moments, shrink).score(moments, dev).numpy()
        tried[shrink] = retrieval_metrics(sims, dev.image_of_caption)["rsum"]
        print(f"shrink {shrink:g}: dev rsum {tried[shrink]:.1f}", flush=True)
    shrink = max(tried, key=tried.get)
    cca = CCA.of(moments, shrink)
    sims = cca.score(moments, test).numpy()
    metrics = retrieval_metrics(sims, test.image_of_caption)
    metrics["bootstrap"] = bootstrap_intervals([image_hits(sims, test.image_of_caption)])
    print(report(metrics))
    if opt.json is not None:
        metrics |= {"data": f"{test.name} test", "dev_rsum": tried[shrink], "shrink": shrink,
                    "parameters": cca.x_map.numel() + cca.y_map.numel()}  # fmt: skip
        text = json.dumps(metrics, indent=1) + "\n"
        atomic_write(opt.json, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
