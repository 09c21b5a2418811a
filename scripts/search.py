"""Search photographs with a trained model, by sentence or by picture.

    python scripts/search.py query "two dogs run in the snow" PHOTOS
    python scripts/search.py query photo.jpg PHOTOS     # the most similar photographs
    python scripts/search.py serve PHOTOS               # a web page: http://127.0.0.1:7860
    python scripts/search.py index PHOTOS               # only make or update the index

PHOTOS is a folder of photographs, or the folder of a data set whose {split}_ims.npy is searched
(--pictures names the folder of its pictures). A picture finds captions too, if the split has some.

The model is pretrained/flickr8k unless --model_path names another. Regions are made with the
projection.npz beside the model, or as the {split}_features.json of its data set says.

The index is kept in PHOTOS.index (or --index), and updated when pictures were added, changed or
removed, or the model is another.

Up to 2,000 images, LHSC scores all; beyond that 200 candidates (--candidates N; 0 = all). LHSC's
score is not an inner product. But its local alignment becomes one if every word attends to all
regions equally and counts equally, and nothing is divided by its length. With the mean region v,
the mean word q, P and p of the local alignment, w of the score, and c = Pᵀ w:

    w · (P (v − q)² + p) = Σ_d c_d v_d² − 2 Σ_d c_d q_d v_d + what does not depend on the image,

the inner product of [v, Σ_d c_d v_d²] and [−2 c ∘ q, 1]. The candidates are the images where it is
largest. They keep more of LHSC's answers than the cosine of the global vectors (results/README.md).

Shape letters: n images, R regions, D joint size.
"""

import argparse
import functools
import hashlib
import io
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]
import extract_features as features
from visualize import Explanation, attention_figure, explain_embedded, plt, shares_of

from attention import word_mean
from baselines import with_local_alignments
from data import Captions, PrecompDataset, open_array, read_boxes
from evaluation import ENCODE_BATCH, encode_captions, load, score
from model import LHSC, EncodedCaptions, EncodedImages, Similarity
from utils import InputError, at_least, atomic_write, one_line, progress, select_device
from vocab import Vocabulary, tokenize

PRETRAINED = ROOT / "pretrained/flickr8k/model.pth.tar"
EXHAUSTIVE = 2_000  # images up to which LHSC scores all of them
CANDIDATES = 200  # images that it scores beyond that
FLAT = 200_000  # images up to which the candidates are found by comparing all vectors
SCORE_CHUNK = 512  # images scored at once
THUMBNAIL = 320  # pixels a side, on the page
MAX_ANSWERS = 50  # on the page

# -- candidates -----------------------------------------------------------------------------------


class CandidateMap(NamedTuple):
    """The inner product that picks the candidates."""

    c: Tensor  # (D,) Pᵀ w

    @classmethod
    def of(cls, similarity: Similarity) -> "CandidateMap":
        """The map of a model's similarity. Raises InputError if it has no local alignments."""
        similarity = with_local_alignments(similarity)
        return cls((similarity.score_fc.weight[0] @ similarity.local_fc.weight).detach().cpu())

    def stored(self, image_mean: Tensor) -> Tensor:
        """Mean regions (n, D) -> image vectors (n, D+1)."""
        return torch.cat([image_mean, image_mean.square() @ self.c[:, None]], dim=1)

    def query(self, word_mean: Tensor) -> Tensor:
        """A mean word (D,) -> the vector to search with (D+1,)."""
        return torch.cat([-2 * self.c * word_mean, torch.ones_like(self.c[:1])])


def write_inverted_file(path: Path, means: np.ndarray, candidate_map: CandidateMap) -> None:
    """faiss's IVF of the image vectors: 4 √n lists, trained on 40 images per list."""
    faiss = features.import_extra("faiss")
    n, lists = len(means), int(4 * len(means) ** 0.5)
    index = faiss.index_factory(means.shape[1] + 1, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    sample = np.sort(np.random.default_rng(0).choice(n, min(n, 40 * lists), replace=False))
    index.train(candidate_map.stored(torch.from_numpy(means[sample])).numpy())
    for start in range(0, n, 65536):
        block = torch.from_numpy(np.array(means[start : start + 65536]))
        index.add(candidate_map.stored(block).numpy())
    faiss.write_index(index, str(path))


# -- an index on disk -----------------------------------------------------------------------------

STATE = "lhsc_index.json"  # {"made_from": …}; {} until the index is finished
FILES = ("region_emb.npy", "image_global.npy", "image_mean.npy", "boxes.npy", "names.json",
         "candidates.faiss")  # fmt: skip


def write_json(path: Path, content: dict) -> None:
    atomic_write(path, lambda file: file.write(json.dumps(content).encode()))


def made_from(folder: Path) -> str | None:
    """What a finished index was made from."""
    path = folder / STATE
    return json.loads(path.read_text()).get("made_from") if path.is_file() else None


def start_index(folder: Path) -> None:
    """Empty an index, or make a new folder for one.

    Raises:
        InputError: if there is something else in the folder.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / STATE).is_file():
        raise InputError(f"{folder}: has other files in it; name another folder with --index")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STATE, {})
    for name in FILES:  # removed, not overwritten: a server may have them mapped
        (folder / name).unlink(missing_ok=True)


class IndexWriter:
    """Writes an index block by block, into a folder:

    region_emb.npy      (n, R, D) float16
    image_global.npy    (n, D) float32
    image_mean.npy      (n, D) float32, the mean region
    names.json          of the images, and the captions if there are any
    boxes.npy           (n, R, 4), where known
    candidates.faiss    beyond FLAT images: an inverted file of the image vectors

    Memory: one block; beyond FLAT images n (D + 1) floats while the inverted file is made.

    Raises:
        InputError: if the folder has other files in it, the disk is too small, or faiss is missing.
    """

    def __init__(self, folder: Path, n_images: int, num_regions: int, embed_size: int) -> None:
        if n_images > FLAT:
            features.import_extra("faiss")  # missed before the work, not after it
        start_index(folder)
        features.check_space(folder, n_images * (num_regions * 2 + 2 * 4) * embed_size)
        self.folder, self._done = folder, 0
        self._region_emb, self._image_global, self._image_mean = (
            np.lib.format.open_memmap(folder / name, "w+", dtype, (n_images, *shape))
            for name, dtype, shape in (
                ("region_emb.npy", np.float16, (num_regions, embed_size)),
                ("image_global.npy", np.float32, (embed_size,)),
                ("image_mean.npy", np.float32, (embed_size,)),
            )
        )

    def add(self, region_emb: Tensor, image_global: Tensor) -> None:
        """The next images: (b, R, D), (b, D)."""
        rows = slice(self._done, self._done + len(region_emb))
        self._region_emb[rows] = region_emb.cpu().numpy()
        self._image_global[rows] = image_global.cpu().numpy()
        self._image_mean[rows] = region_emb.mean(1).cpu().numpy()
        self._done = rows.stop

    def finish(
        self,
        ids: list[str],
        model: LHSC,
        boxes: np.ndarray | None = None,
        captions: Sequence[str] = (),
        made_from: str = "",
    ) -> None:
        """ids: a name per image; boxes: (n, R, 4); captions: of a split that has some."""
        for array in (self._region_emb, self._image_global, self._image_mean):
            array.flush()
        if boxes is not None:
            np.save(self.folder / "boxes.npy", boxes)
        if len(ids) > FLAT:
            path = self.folder / "candidates.faiss"
            write_inverted_file(path, self._image_mean, CandidateMap.of(model.similarity))
        write_json(self.folder / "names.json", {"ids": ids, "captions": captions})
        write_json(self.folder / STATE, {"made_from": made_from})


class Hit(NamedTuple):
    index: int  # of the image or the caption
    score: float


class Index:
    """An index with its model, ready for queries.

    Raises:
        InputError, OSError: if a file of it is damaged or missing.
    """

    def __init__(self, folder: Path, model: LHSC, vocab: Vocabulary) -> None:
        self.model, self.vocab = model.eval(), vocab
        self.device = next(model.parameters()).device
        self.map = CandidateMap.of(model.similarity)
        self.region_emb = open_array(folder / "region_emb.npy")  # (n, R, D)
        self.image_global = torch.from_numpy(np.array(open_array(folder / "image_global.npy")))
        names = json.loads((folder / "names.json").read_text())
        self.ids, self.captions = names["ids"], names["captions"]
        self.boxes = open_array(folder / "boxes.npy") if (folder / "boxes.npy").is_file() else None
        self.inverted_file = None
        if (folder / "candidates.faiss").is_file():
            faiss = features.import_extra("faiss")
            self.inverted_file = faiss.read_index(str(folder / "candidates.faiss"))
            self.inverted_file.nprobe = max(1, self.inverted_file.nlist // 32)
        else:
            image_mean = torch.from_numpy(np.array(open_array(folder / "image_mean.npy")))
            self._vectors = self.map.stored(image_mean)  # (n, D+1)

    def encode(self, sentence: str) -> EncodedCaptions:
        """A sentence as one encoded caption."""
        return encode_captions(self.model, Captions([sentence], self.vocab), self.device)

    @torch.inference_mode()
    def encode_image(self, regions: Tensor) -> EncodedImages:
        """Regions (R, img_dim) of one image."""
        region_emb = self.model.image_encoder(regions.unsqueeze(0).to(self.device))
        return EncodedImages(region_emb, self.model.similarity.image_global(region_emb))

    def images(self, rows: np.ndarray) -> EncodedImages:
        """Some images of the index."""
        region_emb = torch.from_numpy(self.region_emb[rows].astype(np.float32))
        return EncodedImages(region_emb.to(self.device), self.image_global[rows].to(self.device))

    def candidates(self, caption: EncodedCaptions, n: int) -> np.ndarray:
        """The n images whose vectors fit a caption best; fewer if the inverted file finds fewer."""
        query = self.map.query(word_mean(caption.word_emb, caption.lengths)[0].cpu())
        if self.inverted_file is None:
            return (self._vectors @ query).topk(n).indices.numpy()
        found = self.inverted_file.search(query[None].numpy(), n)[1][0]
        return found[found >= 0]

    @torch.inference_mode()
    def images_for(
        self, caption: EncodedCaptions, top: int, candidates: int | None = None
    ) -> list[Hit]:
        """The images that score highest with a caption, of so many candidates (0: of all)."""
        n = len(self.ids)
        if candidates is None:
            candidates = 0 if n <= EXHAUSTIVE else CANDIDATES
        some = 0 < candidates < n
        rows = np.sort(self.candidates(caption, candidates)) if some else np.arange(n)
        chunks = np.split(rows, range(SCORE_CHUNK, len(rows), SCORE_CHUNK))
        sims = [self.model.similarity.score(self.images(chunk), caption) for chunk in chunks]
        return best(rows, torch.cat(sims)[:, 0], top)

    def images_like(self, image: EncodedImages, top: int) -> list[Hit]:
        """The images whose global vectors have the largest cosine with an image's."""
        cosine = self.image_global @ image.image_global[0].cpu()
        return best(np.arange(len(cosine)), cosine, top)

    def captions_for(self, image: EncodedImages, top: int) -> list[Hit]:
        """The captions of the split that score highest with an image."""
        sims = torch.from_numpy(score(self.model, image, self._encoded_captions)[0])
        return best(np.arange(len(sims)), sims, top)

    @functools.cached_property
    def _encoded_captions(self) -> EncodedCaptions:
        return encode_captions(self.model, Captions(self.captions, self.vocab), self.device)


def best(rows: np.ndarray, sims: Tensor, top: int) -> list[Hit]:
    order = sims.argsort(descending=True, stable=True)[:top].tolist()
    return [Hit(int(rows[k]), float(sims[k])) for k in order]


# -- indexing photographs -------------------------------------------------------------------------


class Searcher:
    """Photographs or a split, with an index that is up to date.

    Raises:
        InputError: if the model, the photographs or the split cannot be used.
    """

    def __init__(self, opt: argparse.Namespace) -> None:
        self.opt, self.source = opt, opt.source.resolve()
        if opt.pictures and not opt.pictures.is_dir():
            raise InputError(f"--pictures {opt.pictures}: no such folder")
        overrides = argparse.Namespace(vocab_path=opt.vocab_path)
        model, self.settings, self.vocab = load(opt.model_path, overrides)
        with_local_alignments(model.similarity)  # refused before the work, not after it
        self.device = select_device(opt.device)
        self.model = model.to(self.device).eval()
        self.is_split = self._file("ims.npy").is_file()
        if self.is_split:
            self.pictures, self.folder = opt.pictures, opt.index or self._file("index")
            kinds = ("ims.npy", "caps.txt", "ids.txt", "boxes.npy")
            files = [file for file in map(self._file, kinds) if file.is_file()]
            state = [f"{file} {file.stat().st_mtime_ns}" for file in files]
        else:
            beside = self.source.with_name(f"{self.source.name}.index")
            self.pictures, self.folder = opt.source, opt.index or beside
            self.files = features.find_pictures([self.source])
            cache = self.folder / "regions"
            self.kept = features.region_files(self.files, self.config, cache)
            state = [file.name for file in self.kept.values()]
        digest = hashlib.sha256(opt.model_path.read_bytes() + repr(state).encode()).hexdigest()
        if made_from(self.folder) != digest:
            self._make_index(digest)
            print(f"note: {opt.source} has a new index, {self.folder}", file=sys.stderr)
        self.index = Index(self.folder, self.model, self.vocab)

    def _file(self, kind: str) -> Path:
        return self.source / f"{self.opt.split}_{kind}"

    @functools.cached_property
    def config(self) -> features.FeatureConfig:
        """How the model's regions are made."""
        projection = self.opt.model_path.with_name("projection.npz")
        if projection.is_file():
            return features.FeatureConfig(projection=str(projection))
        data = Path(self.settings.get("data_path", "data")) / self.settings.get("data_name", "")
        for file in (self._file("features.json"), data / "train_features.json"):
            if file.is_file():
                return features.FeatureConfig.load(file)
        return features.FeatureConfig()

    @torch.inference_mode()
    def _make_index(self, made_from: str) -> None:
        blocks, ids, *others = self._split_regions() if self.is_split else self._photo_regions()
        R, D = self.model.num_regions, self.model.image_encoder.fc.out_features
        writer = IndexWriter(self.folder, len(ids), R, D)
        for block in progress(blocks, -(-len(ids) // ENCODE_BATCH), "encoding"):
            regions = torch.as_tensor(block, dtype=torch.float32, device=self.device)
            region_emb = self.model.image_encoder(regions)
            writer.add(region_emb, self.model.similarity.image_global(region_emb))
        writer.finish(ids, self.model, *others, made_from)

    def _photo_regions(self) -> tuple[Iterable, list[str], np.ndarray, list[str]]:
        """Regions (b, R, img_dim) block by block, ids, boxes (n, R, 4), and no captions."""
        extractor, cache = self.extractor, self.folder / "regions"
        start_index(self.folder)
        cache.mkdir(exist_ok=True)
        ids = features.extract(extractor, self.files, self.kept)
        if not ids:
            raise InputError(f"{self.source}: none of its pictures can be used")
        for file in set(cache.iterdir()) - set(self.kept.values()):
            file.unlink()  # the regions of a picture that was changed or removed
        starts = range(0, len(ids), ENCODE_BATCH)
        chunks = [[self.kept[name] for name in ids[k : k + ENCODE_BATCH]] for k in starts]
        blocks = (np.stack([np.load(file) for file in chunk]) for chunk in chunks)
        return blocks, ids, np.repeat(extractor.boxes[None], len(ids), axis=0), []

    def _split_regions(self) -> tuple[Iterable, list[str], np.ndarray | None, list[str]]:
        """The same of a split."""
        sizes = self.model.image_encoder.fc.in_features, self.model.num_regions
        where = self.source.parent, self.source.name, self.opt.split
        data = PrecompDataset(*where, self.vocab, *sizes)
        boxes = read_boxes(self._file("boxes.npy"), data.n_images, self.model.num_regions)
        return data.image_blocks(ENCODE_BATCH), data.image_ids, boxes, data.texts

    @functools.cached_property
    def extractor(self) -> features.Extractor:
        """Makes regions from a picture. Raises InputError if the model takes others."""
        extractor = features.Extractor(self.config, self.device)
        gives = len(extractor.boxes), extractor.img_dim
        takes = self.model.num_regions, self.model.image_encoder.fc.in_features
        if gives != takes:
            raise InputError(
                f"{self.opt.model_path}: takes {takes[0]} regions × {takes[1]}, photographs give "
                f"{gives[0]} × {gives[1]}; is a projection.npz missing beside the model?"
            )
        return extractor

    def by_sentence(self, sentence: str, top: int) -> list[dict]:
        """The images that score highest: index, id, file and score of each."""
        if not sentence.strip():
            raise InputError("an empty query: say what to look for")
        caption = self.index.encode(sentence)
        hits = self.index.images_for(caption, top, self.opt.candidates)
        return [self._found(hit) for hit in hits]

    def by_picture(self, path: Path, top: int) -> tuple[list[dict], list[dict]]:
        """The captions that score highest, if there are any, and the most similar images."""
        pixels = self.extractor.prepare(features.read_picture(path))
        image = self.index.encode_image(self.extractor(pixels[None])[0])
        captions = self.index.captions_for(image, top) if self.index.captions else []
        found = [{"caption": self.index.captions[c], "score": round(s, 4)} for c, s in captions]
        return found, [self._found(hit) for hit in self.index.images_like(image, top)]

    def _found(self, hit: Hit) -> dict:
        name, score = self.index.ids[hit.index], round(hit.score, 4)
        file = features.find_picture(self.pictures, name)
        return {"index": hit.index, "id": name, "file": file and str(file), "score": score}

    def explain(self, index: int, sentence: str) -> Explanation:
        """What the score of an image of the index is made of."""
        region_emb = self.index.images(np.array([index])).region_emb
        return explain_embedded(self.model, self.vocab, region_emb, sentence)

    def note(self, sentence: str) -> str:
        """Says which words the model does not know."""
        unknown = [word for word in tokenize(sentence) if word not in self.vocab.word2idx]
        return f"unknown to the model: {', '.join(unknown)}" if unknown else ""


# -- answers --------------------------------------------------------------------------------------


def index(searcher: Searcher, opt: argparse.Namespace) -> None:
    n, folder = len(searcher.index.ids), searcher.folder
    captions = f" and {len(searcher.index.captions):,} captions" * bool(searcher.index.captions)
    print(f"{folder}: {n:,} images{captions}")


def query(searcher: Searcher, opt: argparse.Namespace) -> None:
    if Path(opt.query).suffix.lower() in features.PICTURES:
        captions, images = searcher.by_picture(Path(opt.query), opt.top)
    else:
        captions, images = [], searcher.by_sentence(opt.query, opt.top)
        if note := searcher.note(opt.query):
            print(note, file=sys.stderr)
    if opt.json:
        print(json.dumps({"captions": captions, "images": images}))
        return
    for found in captions:
        print(f"{found['score']:.3f}  {found['caption']}")
    for found in images:
        print(f"{found['score']:.3f}  {found['file'] or found['id']}")


# -- the page -------------------------------------------------------------------------------------


def picture_of(found: dict, side: int | None = None) -> Image.Image | None:
    """The picture of an answer, or None if it is not there or not readable."""
    try:
        return features.read_picture(found["file"], side) if found["file"] else None
    except InputError:
        return None


def thumbnail(found: dict) -> Image.Image:
    picture = picture_of(found, THUMBNAIL)
    if picture is None:
        picture = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "#eeeeee")
        text = f"{found['id'][:50]}\ncannot be shown"
        ImageDraw.Draw(picture).text((10, THUMBNAIL // 2), text, fill="#444444")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return picture


def page(searcher: Searcher):
    """A sentence or a picture in, a gallery out, and what each word attends to on a click.

    gradio is given thumbnails, and no folder to serve files from. Names and captions are shown as
    plain text.
    """
    gr = features.import_extra("gradio")

    def search(sentence: str, upload: str | None, top: float):
        """-> the gallery, what `attention` needs, a line of text, and no attention yet."""
        try:
            if upload:
                captions, images = searcher.by_picture(Path(upload), int(top))
                said = "\n".join(f"{found['score']:.3f}  {found['caption']}" for found in captions)
            else:
                images, said = searcher.by_sentence(sentence, int(top)), searcher.note(sentence)
        except InputError as error:
            return [], None, str(error), None
        gallery = [(thumbnail(found), f"{found['score']:.3f}  {found['id']}") for found in images]
        return gallery, (sentence, images), said, None

    def attention(searched: tuple[str, list[dict]], chosen: gr.SelectData):
        """-> the picture that was clicked, and where the words that were searched attend to."""
        sentence, images = searched
        if not sentence:
            return None
        found, boxes = images[chosen.index], searcher.index.boxes
        picture = picture_of(found)
        if boxes is not None:
            boxes = shares_of(boxes[found["index"]], picture and picture.size)
        figure = attention_figure(searcher.explain(found["index"], sentence), picture, boxes)
        file = io.BytesIO()
        figure.savefig(file, dpi=90)
        plt.close(figure)
        return Image.open(file)

    n = len(searcher.index.ids)
    with gr.Blocks(title="LHSC", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        with gr.Row():
            sentence = gr.Textbox(label=f"Search {n:,} pictures for a sentence", scale=3,
                                  elem_id="sentence", autofocus=True)  # fmt: skip
            upload = gr.File(label="or for a picture", elem_id="upload", height=140)
            with gr.Column():
                top = gr.Slider(1, MAX_ANSWERS, value=12, step=1, label="Answers")
                go = gr.Button("Search", variant="primary", elem_id="go")
        said = gr.Textbox(placeholder="Click an answer to see what each word attends to.",
                          show_label=False, interactive=False, max_lines=MAX_ANSWERS,
                          elem_id="said")  # fmt: skip
        gallery = gr.Gallery(show_label=False, columns=6, elem_id="answers", allow_preview=False,
                             height="auto")  # fmt: skip
        shown = gr.Image(show_label=False, elem_id="attention", interactive=False)
        searched = gr.State()
        outputs = [gallery, searched, said, shown]
        for event in (go.click, sentence.submit):
            event(lambda text, top: search(text, None, top), [sentence, top], outputs)
        upload.upload(lambda path, top: search("", path, top), [upload, top], outputs)
        gallery.select(attention, searched, shown)
    return blocks


def serve(searcher: Searcher, opt: argparse.Namespace) -> None:
    blocks = page(searcher)
    print(f"http://{opt.host}:{opt.port}  (Ctrl-C ends it)", flush=True)
    blocks.launch(server_name=opt.host, server_port=opt.port, quiet=True, share=False)


# -- the command ----------------------------------------------------------------------------------


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    for work, help in (
        (query, "answer one sentence or picture"),
        (serve, "a web page to search with"),
        (index, "make the index, or update it"),
    ):
        command = commands.add_parser(
            work.__name__, help=help, allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )  # fmt: skip
        command.set_defaults(work=work)
        add = command.add_argument
        if work is query:
            add("query", help="a sentence, or a picture file")
            add("--top", default=5, type=at_least(1), help="answers")
            add("--json", default=False, action="store_true", help="answers as JSON")
        if work is serve:
            add("--host", default="127.0.0.1", help="0.0.0.0 lets others in")
            add("--port", default=7860, type=at_least(1, 65536), help="of the page")
        add("source", type=Path, metavar="PHOTOS", help="folder of photographs, or of a data set")
        add("--model_path", default=PRETRAINED, type=Path, help="the checkpoint")
        add("--vocab_path", default=None, help="folder of the vocabularies")
        add("--split", default="test", help="of a data set")
        add("--pictures", default=None, type=Path, help="folder of a data set's pictures")
        add("--index", default=None, type=Path, help="folder of the index; None = beside PHOTOS")
        add("--candidates", default=None, type=at_least(0), help="images LHSC scores; 0 = all")
        add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


@one_line
def main() -> None:
    opt = options().parse_args()
    opt.work(Searcher(opt), opt)


if __name__ == "__main__":
    main()
