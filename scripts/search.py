"""Search photographs with a trained model, by sentence or by picture.

    python scripts/search.py query "two dogs run in the snow" PHOTOS
    python scripts/search.py query photo.jpg PHOTOS     # the most similar photographs
    python scripts/search.py serve PHOTOS               # a web page: http://127.0.0.1:7860
    python scripts/search.py index PHOTOS               # only make or update the index

PHOTOS is a folder of photographs, or the {split}_ims.npy of a data set (--pictures names the folder
of its pictures). The model is pretrained/flickr8k unless --model_path names another. Photographs
become regions as in extract_features.py, with the projection.npz beside the model. The index
is kept in PHOTOS.index (or --index), and updated when a picture or the model changes.

LHSC scores all images if there are up to 2,000, else only 200 candidates. Its local alignment
becomes cheap if every word attends to all regions equally, all words count equally, and nothing is
normalised. With the mean region v, the mean word q, P and p of the local alignment, w of the score,
and c = Pᵀ w:

    w · (P (v − q)² + p) = Σ_d c_d v_d² − 2 Σ_d c_d q_d v_d + terms that do not depend on the image.

The candidates are the images where this is largest. `benchmark.py search` measures how many of
LHSC's answers they keep.

Shape letters: n images, B images of a block, R regions, D joint size.
"""

import argparse
import contextlib
import functools
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]
import extract_features as features
from visualize import attention_figure, explain, plt

from attention import word_mean
from baselines import with_local_alignments
from data import REPEATED, Captions, RegionFile, open_array, read_boxes, read_ids
from evaluation import ENCODE_BATCH, encode_captions, load
from graph_layers import FusedWeights
from model import LHSC, EncodedCaptions, EncodedImages, Similarity
from utils import InputError, at_least, choose_matmul, one_line, progress, select_device, write_json
from vocab import Vocabulary, tokenize

PRETRAINED = ROOT / "pretrained/flickr8k/model.pth.tar"
EXHAUSTIVE = 2_000  # up to this many images LHSC scores all of them
CANDIDATES = 200  # images that it scores if there are more
SCORE_CHUNK = 512  # images scored at once
ANSWERS = 12  # on the page
THUMBNAIL = 320  # pixels per side

Hit = tuple[int, float]  # an image of the index, and its score

# -- candidates -----------------------------------------------------------------------------------


class Candidates:
    """Σ_d c_d v_d² − 2 Σ_d c_d q_d v_d, which selects the candidates.

    image_mean: mean regions v (n, D). Raises InputError if there are no local alignments.
    """

    def __init__(self, similarity: Similarity, image_mean: Tensor) -> None:
        similarity = with_local_alignments(similarity)
        c = similarity.score_fc.weight[0] @ similarity.local_fc.weight  # Pᵀ w
        self.c, self.image_mean = c.detach().cpu(), image_mean  # (D,), (n, D)
        self.of_images = image_mean.square() @ self.c[:, None]  # (n, 1)

    def fit(self, word_mean: Tensor) -> Tensor:
        """Mean words q (C, D) -> (n, C)."""
        return self.of_images - 2 * self.image_mean @ (self.c * word_mean).T


# -- an index on disk -----------------------------------------------------------------------------

FILES = ("region_emb.npy", "image_global.npy", "image_mean.npy")


def write_index(
    folder: Path, ids: list[str], blocks: Iterable[EncodedImages], made_from: list[str]
) -> None:
    """Write encoded images, named by `ids`, to a folder, with one block at a time in memory:

    region_emb.npy    (n, R, D) float16
    image_global.npy  (n, D) float32
    image_mean.npy    (n, D) float32, the mean region
    index.json        the images' names, and what the index was made from; it is written last
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("index.json", *FILES):  # removed, not overwritten: a server may have them mapped
        (folder / name).unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((folder / name).open("xb")) for name in FILES]
        for region_emb, image_global in blocks:
            arrays = region_emb.half(), image_global, region_emb.mean(1)
            for file, array in zip(files, (x.cpu().numpy() for x in arrays), strict=True):
                if file.tell() == 0:
                    features.write_header(file, array.dtype.str, (len(ids), *array.shape[1:]))
                file.write(array.tobytes())
    write_json(folder / "index.json", {"made_from": made_from, "ids": ids})


class Index:
    """An index with its model, ready for queries. Raises InputError if a file is damaged."""

    def __init__(self, folder: Path, model: LHSC, vocab: Vocabulary) -> None:
        self.model, self.vocab = model.eval(), vocab
        self.device = next(model.parameters()).device
        self.ids = json.loads((folder / "index.json").read_text())["ids"]
        self.region_emb = open_array(folder / "region_emb.npy")  # (n, R, D)
        self.image_global = torch.from_numpy(np.array(open_array(folder / "image_global.npy")))
        image_mean = torch.from_numpy(np.array(open_array(folder / "image_mean.npy")))
        self.candidates = Candidates(model.similarity, image_mean)

    def encode(self, sentence: str) -> EncodedCaptions:
        """A sentence as one encoded caption."""
        return encode_captions(self.model, Captions([sentence], self.vocab), self.device)

    def images(self, rows: np.ndarray) -> EncodedImages:
        """Some images of the index."""
        region_emb = torch.from_numpy(self.region_emb[rows].astype(np.float32))
        return EncodedImages(region_emb.to(self.device), self.image_global[rows].to(self.device))

    @torch.inference_mode()
    def images_for(self, caption: EncodedCaptions, top: int) -> list[Hit]:
        """The images that score highest with a caption, among all or among the candidates."""
        rows = np.arange(len(self.ids))
        if len(rows) > EXHAUSTIVE:
            words = word_mean(caption.word_emb, caption.lengths).cpu()  # (1, D)
            rows = self.candidates.fit(words)[:, 0].topk(CANDIDATES).indices.sort().values.numpy()
        chunks = np.split(rows, range(SCORE_CHUNK, len(rows), SCORE_CHUNK))
        sims = [self.model.similarity.score(self.images(chunk), caption) for chunk in chunks]
        return best(rows, torch.cat(sims)[:, 0], top)

    def images_like(self, image: EncodedImages, top: int) -> list[Hit]:
        """The images whose global vectors have the highest cosine with that of `image`."""
        cosine = self.image_global @ image.image_global[0].cpu()
        return best(np.arange(len(cosine)), cosine, top)


def best(rows: np.ndarray, sims: Tensor, top: int) -> list[Hit]:
    order = sims.argsort(descending=True, stable=True)[:top].tolist()
    return [(int(rows[k]), float(sims[k])) for k in order]


# -- photographs, or the split of a data set ------------------------------------------------------


class Searcher:
    """A model, and photographs or a split with an index that is up to date.

    Raises InputError if the model, the photographs or the split cannot be used.
    """

    def __init__(self, opt: argparse.Namespace) -> None:
        self.opt, self.device = opt, select_device(opt.device)
        choose_matmul(self.device)
        model, _, self.vocab = load(opt.model_path, argparse.Namespace())
        self.model = model.to(self.device).eval()
        with_local_alignments(self.model.similarity)  # fails before the work, not after it
        self.encoder = self.model.image_encoder
        self.sizes = self.encoder.fc.in_features, self.model.num_regions  # img_dim, R
        projection = opt.model_path.with_name("projection.npz")
        self.projection = projection if projection.is_file() else None
        self.is_split = opt.source.name.endswith("ims.npy")
        self.prefix = str(opt.source).removesuffix("ims.npy")  # of the split's files
        if self.is_split:
            self.pictures = opt.pictures
            self.files = {kind: Path(f"{self.prefix}{kind}") for kind in ("ims.npy", "ids.txt")}
        else:
            self.pictures = opt.source
            self.files = features.find_pictures(opt.source)
        if opt.pictures and not opt.pictures.is_dir():
            raise InputError(f"--pictures {opt.pictures}: no such folder")
        used = {file.name: file for file in (opt.model_path, projection)} | self.files
        stamps = [features.stamp(name, file) for name, file in used.items() if file.is_file()]
        source = opt.source.resolve()
        self.folder = opt.index or source.with_name(f"{source.name}.index")
        self._update_index([opt.backbone, *stamps])
        self.index = Index(self.folder, self.model, self.vocab)

    @torch.inference_mode()
    def _update_index(self, made_from: list[str]) -> None:
        """Rebuild the index, unless it was made from the same inputs."""
        file = self.folder / "index.json"
        if file.is_file() and json.loads(file.read_text())["made_from"] == made_from:
            return
        ids, blocks = self._regions()
        n_blocks, fused = -(-len(ids) // ENCODE_BATCH), self.encoder.graph.fused_weights()
        encoded = (self.encode_images(torch.from_numpy(block), fused) for block in blocks)
        write_index(self.folder, ids, progress(encoded, n_blocks, "encoding"), made_from)
        print(f"note: {self.opt.source} has a new index, {self.folder}", file=sys.stderr)

    def _regions(self) -> tuple[list[str], Iterator[np.ndarray]]:
        """The images' names, and their regions (B, R, img_dim) block by block."""
        if not self.is_split:
            kept = features.extract(self.extractor, self.files, self.folder / "regions")
            files = [*kept.values()]
            chunks = (files[k : k + ENCODE_BATCH] for k in range(0, len(files), ENCODE_BATCH))
            return [*kept], (np.stack([np.load(file) for file in chunk]) for chunk in chunks)
        regions = RegionFile(self.opt.source, *self.sizes)
        step = REPEATED if regions.repeats() else 1
        ids = read_ids(self.files["ids.txt"], regions.num_rows // step)
        starts = range(0, regions.num_rows, step * ENCODE_BATCH)
        return ids, (regions[k : k + step * ENCODE_BATCH : step] for k in starts)

    @functools.cached_property
    def extractor(self) -> features.Extractor:
        """Makes regions from a picture. Raises InputError if the model takes other sizes."""
        extractor = features.Extractor(self.opt.backbone, self.projection, self.device)
        img_dim, num_regions = self.sizes
        if (extractor.img_dim, len(extractor.boxes)) != self.sizes:
            raise InputError(
                f"{self.opt.model_path}: takes {num_regions} regions × {img_dim}, photographs give "
                f"{len(extractor.boxes)} × {extractor.img_dim}; is a projection.npz missing?"
            )
        return extractor

    @torch.inference_mode()
    def encode_images(
        self, regions: Tensor, fused: Sequence[FusedWeights] | None = None
    ) -> EncodedImages:
        """Encode regions (B, R, img_dim). fused: the graph's fused_weights, if already computed."""
        region_emb = self.encoder(regions.float().to(self.device), fused)
        return EncodedImages(region_emb, self.model.similarity.image_global(region_emb))

    def search(self, sentence: str, picture: Path | None, top: int) -> tuple[list[Hit], str]:
        """The best images for a sentence or for a picture, and a note of unknown words.

        Raises InputError for an empty sentence, or a picture that cannot be read.
        """
        if picture:
            pixels = self.extractor.prepare(features.read_picture(picture))
            image = self.encode_images(self.extractor(pixels[None]))
            return self.index.images_like(image, top), ""
        if not sentence.strip():
            raise InputError("an empty query: say what to look for")
        unknown = [word for word in tokenize(sentence) if word not in self.vocab.word2idx]
        note = f"unknown to the model: {', '.join(unknown)}" if unknown else ""
        return self.index.images_for(self.index.encode(sentence), top), note

    def file(self, image: int) -> Path | None:
        """The picture file of an image of the index, or None."""
        return features.find_picture(self.pictures, self.index.ids[image])

    def picture(self, image: int, side: int | None = None) -> Image.Image | None:
        """The picture, read by read_picture; None if that fails."""
        file = self.file(image)
        with contextlib.suppress(InputError):
            return features.read_picture(file, side) if file else None

    def boxes(self, image: int) -> np.ndarray | None:
        """The boxes of its regions (R, 4), if they are known."""
        if not self.is_split:
            return self.extractor.boxes
        file, n_images = Path(f"{self.prefix}boxes.npy"), len(self.index.ids)
        boxes = read_boxes(file, n_images, self.model.num_regions)
        return None if boxes is None else boxes[image]


# -- the page -------------------------------------------------------------------------------------


def thumbnail(searcher: Searcher, image: int) -> Image.Image:
    """The picture of an image, or a placeholder with its name."""
    picture = searcher.picture(image, THUMBNAIL)
    if picture is None:
        picture = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "#eeeeee")
        text = f"{searcher.index.ids[image][:50]}\ncannot be shown"
        ImageDraw.Draw(picture).text((10, THUMBNAIL // 2), text, fill="#444444")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return picture


def attention_picture(searcher: Searcher, image: int, sentence: str) -> Image.Image:
    """An image of the index, with the regions that the words of a sentence attend to."""
    region_emb = searcher.index.images(np.array([image])).region_emb
    why = explain(searcher.model, searcher.vocab, region_emb, sentence)
    figure = attention_figure(why, searcher.picture(image), searcher.boxes(image))
    file = io.BytesIO()
    figure.savefig(file, dpi=90)
    plt.close(figure)
    return Image.open(file)


def page(searcher: Searcher):
    """A web page: search by sentence or picture, and click an answer to see the attention.

    gradio is given thumbnails, and no folder to serve files from. Names are shown as plain text.
    """
    gr, ids = features.import_extra("gradio"), searcher.index.ids

    def search(sentence: str, upload: str | None = None) -> tuple:
        """-> the gallery, what `attention` needs, a line of text, and no attention yet."""
        try:
            hits, note = searcher.search(sentence, upload and Path(upload), ANSWERS)
        except InputError as error:
            return [], None, str(error), None
        gallery = [(thumbnail(searcher, k), f"{score:.3f}  {ids[k]}") for k, score in hits]
        return gallery, (sentence, hits), note, None

    def attention(searched: tuple[str, list[Hit]], chosen: gr.SelectData) -> Image.Image | None:
        """-> the clicked picture, with the regions that the words of the query attend to."""
        sentence, hits = searched
        return attention_picture(searcher, hits[chosen.index][0], sentence) if sentence else None

    with gr.Blocks(title="LHSC", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        with gr.Row():
            label = f"Search {len(ids):,} pictures for a sentence"
            sentence = gr.Textbox(label=label, scale=3, elem_id="sentence", autofocus=True)
            upload = gr.File(label="or for a picture", elem_id="upload", height=140)
            go = gr.Button("Search", variant="primary", elem_id="go")
        hint = "Click an answer to see what each word attends to."
        said = gr.Textbox(placeholder=hint, show_label=False, interactive=False, elem_id="said")
        gallery = gr.Gallery(show_label=False, columns=6, elem_id="answers", allow_preview=False,
                             height="auto")  # fmt: skip
        shown = gr.Image(show_label=False, elem_id="attention", interactive=False)
        searched = gr.State()
        outputs = [gallery, searched, said, shown]
        go.click(search, sentence, outputs)
        sentence.submit(search, sentence, outputs)
        upload.upload(lambda path: search("", path), upload, outputs)
        gallery.select(attention, searched, shown)
    return blocks


# -- the command ----------------------------------------------------------------------------------


def index(searcher: Searcher, opt: argparse.Namespace) -> None:
    """Only make or update the index."""
    print(f"{searcher.folder}: {len(searcher.index.ids):,} images")


def query(searcher: Searcher, opt: argparse.Namespace) -> None:
    """Search for one sentence or picture."""
    is_picture = Path(opt.query).suffix.lower() in features.PICTURES
    hits, note = searcher.search(opt.query, Path(opt.query) if is_picture else None, opt.top)
    if note:
        print(note, file=sys.stderr)
    for image, score in hits:
        print(f"{score:.3f}  {searcher.file(image) or searcher.index.ids[image]}")


def serve(searcher: Searcher, opt: argparse.Namespace) -> None:
    """Serve a web page to search with."""
    blocks = page(searcher)
    blocks.launch(server_name="127.0.0.1", share=False, quiet=True, prevent_thread_lock=True)
    print(f"{blocks.local_url}  (Ctrl-C ends it)", flush=True)
    blocks.block_thread()


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    for work in (query, serve, index):
        command = commands.add_parser(work.__name__, help=work.__doc__, allow_abbrev=False)
        command.set_defaults(work=work)
        add = command.add_argument
        if work is query:
            add("query", help="a sentence, or a picture file")
            add("--top", default=5, type=at_least(1), help="number of answers")
        add("source", type=Path, metavar="PHOTOS", help="folder of photographs, or {split}_ims.npy")
        add("--pictures", default=None, type=Path, help="folder of the split's pictures")
        add("--model_path", default=PRETRAINED, type=Path, help="the checkpoint")
        add("--backbone", default=features.EFFICIENTNET, help="backbone of the model's regions")
        add("--index", default=None, type=Path, help="folder of the index; default: PHOTOS.index")
        add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    opt = parser.parse_args()
    opt.work(Searcher(opt), opt)


if __name__ == "__main__":
    main()
