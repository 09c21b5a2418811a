"""Search pictures with a trained model.

    python scripts/search.py index --model_path runs/demo/checkpoint/model_best.pth.tar \\
        --pictures data/scenes_images/test --out runs/demo/index
    python scripts/search.py query "three green stars on the left of a red circle" \\
        --index runs/demo/index
    python scripts/search.py serve --index runs/demo/index

`index` encodes a split once (--data_name, --split; the checkpoint's data set where not named), made
from anyone's photographs by extract_features.py if it has no captions. `query` answers with files,
scores and the words that counted most; with --image FILE, with the captions that fit the picture
(where the split has some) and the pictures most like it. `serve` is a page that does both and shows
what each word attends to when an answer is clicked.

A picture of a query has to go through what the regions of the index went through: that is read from
{split}_features.json, or named with --backbone, --grid, --size, --project.

Up to 2,000 pictures LHSC scores all of them; beyond that the 200 whose global vectors fit best
(--candidates N; 0 = all). index.py says how, the README what that costs in recall.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import PrecompDataset, RegionFile, read_boxes, read_ids
from errors import InputError, one_line
from evaluation import DEFAULT_MODEL, ENCODE_BATCH, encode_captions, load, progress, select_device
from explain import explain_embedded
from features import Extractor, Recipe, find_picture, read_picture
from index import Builder, Index, read_about
from similarity import with_local_alignments
from train import at_least
from vocab import tokenize

INDEX = Path("./runs/LHSC/index")
BEST_WORDS = 4  # named with an answer


# -- index ----------------------------------------------------------------------------------------


@torch.inference_mode()
def make_index(opt: argparse.Namespace) -> None:
    model, settings, vocab = load(opt.model_path, opt)
    with_local_alignments(model.similarity)
    device = select_device(opt.device)
    model = model.to(device)
    folder = Path(settings["data_path"]) / settings["data_name"]
    ims, ids, how = (folder / f"{opt.split}_{x}" for x in ("ims.npy", "ids.txt", "features.json"))
    if not ims.is_file():
        raise InputError(f"{ims}: not found; scripts/extract_features.py makes it from pictures")
    captioned = (folder / f"{opt.split}_caps.txt").is_file()
    sizes = model.image_encoder.fc.in_features, settings["num_regions"]
    if captioned:
        split = PrecompDataset(
            settings["data_path"], settings["data_name"], opt.split, vocab, *sizes
        )
        regions, step, names = split.regions, split.row_step, split.image_ids
    else:
        regions, step = RegionFile(ims, *sizes), 1
        names = read_ids(ids, regions.num_rows)
    n = len(names)
    builder = Builder(opt.out, n, regions.num_regions, model.image_encoder.fc.out_features)
    encoder = model.image_encoder.folded()
    starts = range(0, n, ENCODE_BATCH)
    for start in progress(starts, len(starts), "encoding images"):
        rows = slice(start * step, min(start + ENCODE_BATCH, n) * step, step)
        emb = encoder(torch.from_numpy(regions[rows]).to(device))
        builder.add(emb, model.similarity.image_global(emb))
    if captioned:
        builder.add_captions(encode_captions(model, split, device), split.texts)
    boxes = read_boxes(folder / f"{opt.split}_boxes.npy", n, regions.num_regions)
    if boxes is not None:
        builder.add_boxes(boxes)
    recipe = read_recipe(how) if how.is_file() else None
    about = {
        "model": str(Path(opt.model_path).resolve()),
        "vocab_path": str(Path(settings["vocab_path"]).resolve()),
        "data": f"{settings['data_name']} {opt.split}",
        "pictures": str(opt.pictures.resolve()) if opt.pictures else None,
        "recipe": recipe._asdict() if recipe else None,
    }
    builder.finish(names, model, about)
    size = sum(f.stat().st_size for f in opt.out.iterdir()) / 1e6
    captions = f" and {len(split.texts):,} captions" if captioned else ""
    print(f"{opt.out}: {n:,} images{captions}, {size:.1f} MB")


def read_recipe(path: Path) -> Recipe:
    """How the regions of a split were made, of {split}_features.json."""
    try:
        recipe = Recipe(**json.loads(path.read_text(encoding="utf-8"))["recipe"])
        # A projection may be named by its place beside this file.
        project = recipe.project and str((path.parent / recipe.project).resolve())
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a file of extract_features.py: {error}") from error
    return recipe._replace(project=project)


# -- query ----------------------------------------------------------------------------------------


class Searcher:
    """An index with its model, its pictures, and the way from a new picture to regions."""

    def __init__(self, opt: argparse.Namespace) -> None:
        self.opt = opt
        about = read_about(opt.index)
        opt.vocab_path = about["vocab_path"]
        model, _, vocab = load(opt.model_path or about["model"], opt)
        self.index = Index(opt.index, model.to(select_device(opt.device)), vocab)
        folder = opt.pictures or (about["pictures"] and Path(about["pictures"]))
        self.folder: Path | None = folder or None
        given = {k: getattr(opt, k) for k in Recipe._fields if getattr(opt, k) is not None}
        recorded = about["recipe"] or {}
        self.recipe = Recipe(**recorded | given) if recorded or given else None
        self._extractor: Extractor | None = None

    def file(self, place: int) -> Path | None:
        """The picture of an image of the index, where it is known and there."""
        return find_picture(self.folder, self.index.ids[place])

    def regions(self, picture: Image.Image) -> torch.Tensor:
        """A new picture as the regions (R, img_dim) that the model knows.

        Raises:
            InputError: if it is not known how, or the regions are of another kind.
        """
        if self.recipe is None:
            raise InputError(
                f"{self.opt.index}: it is not known how its regions were made: name --backbone "
                "(and --grid, --size, --project)"
            )
        if self._extractor is None:
            self._extractor = Extractor(self.recipe, self.index.device)
            found = (len(self._extractor.boxes), self._extractor.img_dim)
            model = self.index.model
            wanted = (self.index.regions.shape[1], model.image_encoder.fc.in_features)
            if found != wanted:
                raise InputError(
                    f"--backbone {self.recipe.backbone}: gives {found[0]} regions × {found[1]}, "
                    f"the model takes {wanted[0]} × {wanted[1]}"
                )
        return self._extractor([picture])[0]

    def by_text(self, sentence: str, top: int) -> list[dict]:
        """The images that score highest: place, id, file, score, and the words that counted."""
        sentence = sentence.strip()
        if not sentence:
            raise InputError("an empty query: say what to look for")
        answers = self.index.images_for(self.index.encode(sentence), top, self.opt.candidates)
        return [self._image(a.place, a.score) | {"words": self.words(sentence, a.place)}
                for a in answers]  # fmt: skip

    def by_picture(self, picture: Image.Image, top: int) -> tuple[list[dict], list[dict]]:
        """The captions that score highest, and the images most alike."""
        image = self.index.encode_image(self.regions(picture))
        captions = self.index.captions_for(image, top) if self.index.texts else []
        alike = self.index.images_like(image, top)
        return (
            [{"caption": self.index.texts[a.place], "score": a.score} for a in captions],
            [self._image(a.place, a.score) for a in alike],
        )

    def _image(self, place: int, score: float) -> dict:
        file = self.file(place)
        return {"place": place, "id": self.index.ids[place], "file": str(file) if file else None,
                "score": round(score, 4)}  # fmt: skip

    def why(self, sentence: str, place: int):
        emb = torch.from_numpy(np.asarray(self.index.regions[place], dtype=np.float32))
        model, vocab = self.index.model, self.index.vocab
        return explain_embedded(model, vocab, emb[None].to(self.index.device), sentence)

    def words(self, sentence: str, place: int) -> list[str]:
        """The words whose alignments have the largest gates."""
        why = self.why(sentence, place)
        inner = np.argsort(-why.gates[1:-1], kind="stable")[:BEST_WORDS] + 1
        return [why.words[k] for k in inner if not why.unknown[k]]


def unknown_words(index: Index, sentence: str) -> list[str]:
    """Those that are <unk> to the model."""
    return [word for word in tokenize(sentence) if word not in index.vocab.word2idx]


def query(opt: argparse.Namespace) -> None:
    if (opt.text is None) == (opt.image is None):
        raise InputError("query: give a sentence, or a picture with --image")
    searcher = Searcher(opt)
    if opt.text is not None:
        answers = searcher.by_text(opt.text, opt.top)
        if new := unknown_words(searcher.index, opt.text):
            print(f"note: unknown to the model: {', '.join(new)}", file=sys.stderr)
        found: dict = {"images": answers}
    else:
        captions, alike = searcher.by_picture(read_picture(opt.image), opt.top)
        found = {"captions": captions, "images": alike}
    if opt.json:
        print(json.dumps(found))
        return
    for caption in found.get("captions", []):
        print(f"{caption['score']:.3f}  {caption['caption']}")
    for image in found["images"]:
        words = f"  ({', '.join(image['words'])})" if image.get("words") else ""
        print(f"{image['score']:.3f}  {image['file'] or image['id']}{words}")


# -- serve ----------------------------------------------------------------------------------------


def placard(text: str) -> Image.Image:
    """Stands for a picture that is not at hand."""
    picture = Image.new("RGB", (224, 224), "#eeeeee")
    ImageDraw.Draw(picture).text((10, 100), text[:34], fill="#444444")
    return picture


def page(searcher: Searcher):
    """The page: a sentence or a picture in, a gallery out, attention where it is clicked."""
    try:
        import gradio as gr
    except ImportError as error:
        raise InputError(f"serve: {error}; pip install -r requirements-extra.txt") from error
    from visualize import attention_figure, plt, shares_of

    def gallery(images: list[dict]) -> list[tuple]:
        return [(x["file"] or placard(x["id"]), f"{x['score']:.3f}  {x['id']}") for x in images]

    def search(sentence: str, picture: Image.Image | None, top: float):
        try:
            if picture is not None and not sentence.strip():
                captions, images = searcher.by_picture(picture.convert("RGB"), int(top))
                said = "\n".join(f"- {c['score']:.3f} {c['caption']}" for c in captions)
                return gallery(images), images, said or "The pictures most like it.", None
            images = searcher.by_text(sentence, int(top))
            new = unknown_words(searcher.index, sentence)
            said = f"Unknown to the model: {', '.join(new)}" if new else ""
            return gallery(images), images, said, None
        except InputError as error:
            raise gr.Error(str(error)) from error

    def attention(sentence: str, images: list[dict], chosen):
        if not sentence.strip():
            return None
        image = images[chosen.index]
        picture = read_picture(image["file"]) if image["file"] else None
        boxes = searcher.index.boxes
        shares = (
            None if boxes is None else shares_of(boxes[image["place"]], picture and picture.size)
        )
        figure = attention_figure(searcher.why(sentence.strip(), image["place"]), picture, shares)
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            figure.savefig(file.name, dpi=90)
            plt.close(figure)
            return read_picture(file.name)

    # gradio reads the annotation to see that the click is wanted; here they are kept as text.
    attention.__annotations__["chosen"] = gr.SelectData

    with gr.Blocks(title="LHSC", analytics_enabled=False) as blocks:
        gr.Markdown(f"### {len(searcher.index.ids):,} pictures of {searcher.index.about['data']}")
        with gr.Row():
            with gr.Column(scale=3):
                sentence = gr.Textbox(label="Sentence", elem_id="sentence", autofocus=True)
            with gr.Column(scale=1):
                picture = gr.Image(label="or a picture", type="pil", height=140,
                                   sources=["upload"])  # fmt: skip
            with gr.Column(scale=1):
                top = gr.Slider(1, 50, value=min(12, len(searcher.index.ids)), step=1,
                                label="answers")  # fmt: skip
                go = gr.Button("Search", variant="primary", elem_id="go")
        said = gr.Markdown()
        gr.Markdown("Click an answer to see what each word of the sentence attends to.")
        answers = gr.Gallery(show_label=False, columns=6,
                             elem_id="answers", allow_preview=False, height="auto")  # fmt: skip
        shown = gr.Image(show_label=False, elem_id="attention", interactive=False)  # fmt: skip
        images = gr.State([])
        outputs = [answers, images, said, shown]
        gr.on([go.click, sentence.submit], search, [sentence, picture, top], outputs)
        answers.select(attention, [sentence, images], shown)
    return blocks


def serve(opt: argparse.Namespace) -> None:
    searcher = Searcher(opt)
    blocks = page(searcher)
    print(f"http://{opt.host}:{opt.port}  (Ctrl-C ends it)", flush=True)
    allowed = [str(searcher.folder.resolve())] if searcher.folder else []
    try:
        blocks.launch(server_name=opt.host, server_port=opt.port, quiet=True, share=False,
                      allowed_paths=allowed)  # fmt: skip
    except OSError as error:
        raise InputError(f"--port {opt.port}: {error}") from error


# -- the command line -----------------------------------------------------------------------------


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str, work):
        one = commands.add_parser(
            name, help=help, allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )  # fmt: skip
        one.set_defaults(work=work)
        one.add_argument("--pictures", default=None, type=Path, help="folder of the pictures")
        one.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        return one.add_argument

    add = command("index", "encode a split once", make_index)
    add("--model_path", default=DEFAULT_MODEL, help="the checkpoint")
    add("--data_path", default=None, help="folder of the data sets")
    add("--data_name", default=None, help="None = the checkpoint's")
    add("--split", default="test", help="the split to search")
    add("--vocab_path", default=None, help="folder of the vocabularies")
    add("--out", default=INDEX, type=Path, help="folder to write")
    for name, help, work in (
        ("query", "answer one sentence or picture", query),
        ("serve", "a page to search with", serve),
    ):
        add = command(name, help, work)
        if name == "query":
            add("text", nargs="?", default=None, help="what to look for")
            add("--image", default=None, type=Path, help="a picture instead of a sentence")
            add("--top", default=5, type=at_least(1), help="answers")
            add("--json", default=False, action="store_true", help="answers as JSON")
        else:
            add("--host", default="127.0.0.1", help="0.0.0.0 lets others in")
            add("--port", default=7860, type=at_least(1), help="of the page")
        add("--index", default=INDEX, type=Path, help="folder of the index")
        add("--model_path", default=None, help="None = the index's")
        add("--candidates", default=None, type=at_least(0), help="images LHSC scores; 0 = all")
        add("--backbone", default=None, help="of a new picture; None = the index's")
        add("--grid", default=None, type=at_least(0), help="cells a side")
        add("--size", default=None, type=at_least(16), help="pixels a side")
        add("--project", default=None, type=Path, help=".npz of a projection")
    return parser


@one_line
def main() -> None:
    opt = options().parse_args()
    if opt.pictures is not None and not opt.pictures.is_dir():
        raise InputError(f"{opt.pictures}: no such folder of pictures")
    opt.work(opt)


if __name__ == "__main__":
    main()
