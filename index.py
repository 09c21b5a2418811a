"""Encodings on disk, and retrieval in two stages: candidates, then LHSC.

An index is a folder:

    region_emb.npy      (n, R, D) float16, memory-mapped: only candidates are read
    image_global.npy    (n, D) float32
    image_mean.npy      (n, D) float32, the mean region
    ids.txt             one image a line
    boxes.npy           (n, R, 4), where known
    word_emb.npy, caption_global.npy, caption_mean.npy, lengths.npy, captions.txt
                        of a split with captions
    candidates.faiss    beyond FLAT images: an inverted file over the candidate vectors
    index.json          which model, where the pictures are, how their regions are made

**Candidates.** LHSC's score is no inner product, but its local alignment is one if every word
attends to all regions alike and counts alike, and nothing is divided by its length: with the mean
region v, the mean word q and c = Pᵀ w,

    w · (P (v − q)² + p) = Σ_d c_d v_d² − 2 Σ_d c_d q_d v_d + what does not depend on the image,

the product of [v, Σ_d c_d v_d²] with [−2 c ∘ q, 1]. The images with the largest are scored by
LHSC. (Measured, results/search: these keep more of LHSC's answers than the cosine of the global
vectors does.) Time for a query: n (D + 1) for the first stage, a share of that with an inverted
file, and LHSC's 0.67 MFLOP for each candidate and word at full size.

Shape letters: n images, R regions, D joint size, K candidates, W words of a query.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attention import word_mean
from errors import InputError
from model import LHSC
from scoring import scorer
from similarity import EncodedCaptions, EncodedImages, Similarity, with_local_alignments
from vocab import Vocabulary

FLAT = 200_000  # images up to which all candidate vectors are compared
EXHAUSTIVE = 2_000  # images up to which LHSC scores all of them
CANDIDATES = 200  # beyond that


class Answer(NamedTuple):
    place: int  # of the image or the caption in the index
    score: float


class CandidateMap(NamedTuple):
    """A score that is an inner product of an image's vector with a caption's.

    Raises:
        InputError: for a model without local alignments.
    """

    c: Tensor  # (D,) Pᵀ w

    @classmethod
    def of(cls, similarity: Similarity) -> CandidateMap:
        similarity = with_local_alignments(similarity)
        return cls((similarity.score_fc.weight[0] @ similarity.local_fc.weight).detach().cpu())

    def stored(self, mean: Tensor) -> Tensor:
        """Mean regions of images, or mean words of captions, to be searched: (n, D) -> (n, D+1)."""
        return torch.cat([mean, mean.square() @ self.c[:, None]], dim=1)

    def query(self, mean: Tensor) -> Tensor:
        """A mean word or mean region to search with: (D,) -> (D+1,)."""
        return torch.cat([-2 * self.c * mean, torch.ones(1)])


def fingerprint(model: LHSC) -> str:
    """Changes with the weights: encodings belong to one model."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# -- building -------------------------------------------------------------------------------------


class Builder:
    """Writes an index block by block into a folder beside the target, which `finish` becomes.

    Memory: a block; beyond FLAT images the inverted file, n (D + 1) floats, while it is made.

    Raises:
        InputError: if the target is there already, or the disk is too small.
    """

    def __init__(self, target: Path, n_images: int, num_regions: int, embed_size: int) -> None:
        if target.exists():
            raise InputError(f"{target}: is there already; remove it, or name another --out")
        self.target = target
        self.folder = target.with_name(f".{target.name}.unfinished")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        need = n_images * (num_regions * 2 + 2 * 4) * embed_size
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise InputError(f"{target}: {need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
        self._regions = np.lib.format.open_memmap(
            self.folder / "region_emb.npy", "w+", np.float16, (n_images, num_regions, embed_size)
        )
        self._globals, self._means = (
            np.lib.format.open_memmap(self.folder / name, "w+", np.float32, (n_images, embed_size))
            for name in ("image_global.npy", "image_mean.npy")
        )
        self._done = 0

    def add(self, region_emb: Tensor, image_global: Tensor) -> None:
        """The next images: (b, R, D), (b, D)."""
        rows = slice(self._done, self._done + len(region_emb))
        self._regions[rows] = region_emb.half().cpu().numpy()
        self._globals[rows] = image_global.float().cpu().numpy()
        self._means[rows] = region_emb.float().mean(1).cpu().numpy()
        self._done = rows.stop

    def add_captions(self, captions: EncodedCaptions, texts: list[str]) -> None:
        np.save(self.folder / "word_emb.npy", captions.word_emb.half().cpu().numpy())
        np.save(self.folder / "caption_global.npy", captions.caption_global.float().cpu().numpy())
        mean = word_mean(captions.word_emb, captions.lengths)
        np.save(self.folder / "caption_mean.npy", mean.float().cpu().numpy())
        np.save(self.folder / "lengths.npy", captions.lengths.cpu().numpy())
        self._lines("captions.txt", texts)

    def add_boxes(self, boxes: np.ndarray) -> None:
        np.save(self.folder / "boxes.npy", boxes)

    def _lines(self, name: str, lines: Iterable[str]) -> None:
        (self.folder / name).write_text("".join(f"{x}\n" for x in lines), encoding="utf-8")

    def finish(self, ids: list[str], model: LHSC, about: dict) -> None:
        """about: what index.json is to hold beside the model's fingerprint."""
        if not self._done == len(ids) == len(self._regions):
            raise ValueError(f"{self._done} of {len(self._regions)} images, {len(ids)} ids")
        self._lines("ids.txt", ids)
        self._regions.flush()
        self._globals.flush()
        self._means.flush()
        if len(ids) > FLAT:
            stored = CandidateMap.of(model.similarity).stored
            inverted_file(self._means, stored, self.folder / "candidates.faiss")
        about = {"fingerprint": fingerprint(model)} | about
        (self.folder / "index.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        os.replace(self.folder, self.target)


def import_faiss():
    try:
        import faiss
    except ImportError as error:
        raise InputError(
            f"more than {FLAT:,} images: {error}; pip install -r requirements-extra.txt"
        ) from error
    return faiss


def inverted_file(means: np.ndarray, stored: Callable[[Tensor], Tensor], path: Path) -> None:
    """faiss's IVF over the candidate vectors, 4 √n lists, trained on 40 images a list."""
    faiss = import_faiss()
    n, size = len(means), means.shape[1] + 1
    lists = int(4 * n**0.5)
    index = faiss.index_factory(size, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    some = np.sort(np.random.default_rng(0).choice(n, min(n, 40 * lists), replace=False))
    index.train(stored(torch.from_numpy(means[some])).numpy())
    for start in range(0, n, 65536):
        block = torch.from_numpy(np.array(means[start : start + 65536]))
        index.add(stored(block).numpy())
    faiss.write_index(index, str(path))


# -- searching ------------------------------------------------------------------------------------


class Index:
    """An index and its model, ready for queries.

    Raises:
        InputError: if the folder is no index, or was made with another model.
    """

    def __init__(self, folder: Path, model: LHSC, vocab: Vocabulary) -> None:
        self.folder, self.model, self.vocab = folder, model.eval(), vocab
        self.about = read_about(folder)
        if self.about["fingerprint"] != fingerprint(model):
            raise InputError(f"{folder}: was made with another model than {self.about['model']}")
        self.device = next(model.parameters()).device
        self.scorer = scorer(model.similarity, self.device, torch.float32)
        self.map = CandidateMap.of(model.similarity)
        self.regions = self._array("region_emb.npy", mmap=True)  # (n, R, D)
        self.image_global = torch.from_numpy(self._array("image_global.npy"))
        self.ids = (folder / "ids.txt").read_text(encoding="utf-8").splitlines()
        if not len(self.ids) == len(self.regions) == len(self.image_global):
            raise InputError(f"{folder}: {len(self.ids)} ids, {len(self.regions)} images; damaged")
        self.boxes = self._array("boxes.npy", True) if (folder / "boxes.npy").is_file() else None
        self._inverted = None
        if (folder / "candidates.faiss").is_file():
            faiss = import_faiss()
            self._inverted = faiss.read_index(str(folder / "candidates.faiss"))
            self._inverted.nprobe = max(1, self._inverted.nlist // 32)
        else:
            self._vectors = self.map.stored(torch.from_numpy(self._array("image_mean.npy")))
        self.texts: list[str] = []
        if (folder / "captions.txt").is_file():
            self.texts = (folder / "captions.txt").read_text(encoding="utf-8").splitlines()
            self._words = self._array("word_emb.npy", mmap=True)  # (W, D)
            self._caption_global = torch.from_numpy(self._array("caption_global.npy"))
            self._caption_mean = torch.from_numpy(self._array("caption_mean.npy"))
            self._lengths = torch.from_numpy(self._array("lengths.npy"))
            self._starts = self._lengths.cumsum(0) - self._lengths

    def _array(self, name: str, mmap: bool = False) -> np.ndarray:
        try:
            return np.load(self.folder / name, mmap_mode="r" if mmap else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{self.folder / name}: {error}; make the index again") from error

    @torch.inference_mode()
    def encode(self, sentence: str) -> EncodedCaptions:
        """A query: one caption."""
        ids = self.vocab.encode(sentence)
        lengths = torch.tensor([len(ids)], device=self.device)
        words = self.model.text_encoder(torch.tensor([ids], device=self.device), lengths)
        return EncodedCaptions(words, self.model.similarity.caption_global(words, lengths), lengths)

    @torch.inference_mode()
    def encode_image(self, regions: Tensor) -> EncodedImages:
        """Regions (R, img_dim) of one image."""
        emb = self.model.image_encoder(regions.unsqueeze(0).to(self.device))
        return EncodedImages(emb, self.model.similarity.image_global(emb))

    def candidates(self, caption: EncodedCaptions, n: int) -> np.ndarray:
        """The images that fit a caption best by CandidateMap: (≤ n,) places."""
        query = self.map.query(word_mean(caption.word_emb, caption.lengths)[0].cpu())
        if self._inverted is not None:
            found = self._inverted.search(query[None].numpy(), n)[1][0]
            return found[found >= 0]
        return (self._vectors @ query).topk(min(n, len(self.ids))).indices.numpy()

    def images_for(
        self, caption: EncodedCaptions, top: int, candidates: int | None = None
    ) -> list[Answer]:
        """The images that score highest with a caption, of so many candidates (0: of all)."""
        n = len(self.ids)
        k = n_candidates(candidates, n)
        places = np.sort(self.candidates(caption, k)) if k < n else np.arange(n)
        sims = np.concatenate([self._score(rows, caption) for rows in blocks(places, 512)])
        return best(places, sims, top)

    def _score(self, places: np.ndarray, caption: EncodedCaptions) -> np.ndarray:
        regions = torch.from_numpy(np.asarray(self.regions[places], dtype=np.float32))
        images = EncodedImages(
            regions.to(self.device), self.image_global[places].to(self.device)
        )  # fmt: skip
        tiles = [tile for _, tile in self.scorer.tiles(images, caption)]
        return torch.cat(tiles, dim=1)[:, 0].cpu().numpy()

    def captions_for(
        self, image: EncodedImages, top: int, candidates: int | None = None
    ) -> list[Answer]:
        """The captions of the index that score highest with an image, of so many candidates."""
        k = n_candidates(candidates, len(self.texts))
        query = self.map.query(image.region_emb[0].mean(0).cpu())
        places = (self.map.stored(self._caption_mean) @ query).topk(k).indices
        words = [
            torch.from_numpy(np.array(self._words[s : s + n], dtype=np.float32))
            for s, n in zip(self._starts[places].tolist(), self._lengths[places].tolist(),
                            strict=True)
        ]  # fmt: skip
        captions = EncodedCaptions(
            torch.cat(words).to(self.device),
            self._caption_global[places].to(self.device),
            self._lengths[places].to(self.device),
        )
        tiles = [tile for _, tile in self.scorer.tiles(image, captions)]
        return best(places.numpy(), torch.cat(tiles, dim=1)[0].cpu().numpy(), top)

    def images_like(self, image: EncodedImages, top: int) -> list[Answer]:
        """The images whose global vectors have the largest cosine with an image's."""
        cosine = self.image_global @ image.image_global[0].cpu()
        found = cosine.topk(min(top, len(cosine)))
        return [Answer(int(i), float(s)) for s, i in zip(*found, strict=True)]


def n_candidates(asked: int | None, n: int) -> int:
    """How many of n LHSC scores: None is the default, 0 is all."""
    if asked is None:
        asked = 0 if n <= EXHAUSTIVE else CANDIDATES
    return min(asked or n, n)


def best(places: np.ndarray, sims: np.ndarray, top: int) -> list[Answer]:
    order = np.argsort(-sims, kind="stable")[:top]
    return [Answer(int(places[k]), float(sims[k])) for k in order]


def blocks(places: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(places), size):
        yield places[start : start + size]


def read_about(folder: Path) -> dict:
    """index.json of an index.

    Raises:
        InputError: if the folder is no index.
    """
    path = folder / "index.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder}: no index here; scripts/search.py index makes one") from None
    except ValueError as error:
        raise InputError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(about, dict) or not {"fingerprint", "model"} <= about.keys():
        raise InputError(f"{path}: not an index of scripts/search.py")
    return about
