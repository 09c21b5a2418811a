"""Files and options of every kind, broken in every way: one clear line, or they are read rightly.

Mutations are drawn by hypothesis, the same ones in every run; the last test says how many cases
were tried.
"""

import io
import json
import os
import pickle
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_split
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import evaluation
import train
from checkpoint import load_checkpoint, load_whole, model_from, save_checkpoint
from data import PrecompDataset
from errors import InputError
from model import LHSC
from vocab import Vocabulary, build_from_data

TRIED = Counter()
SIZES = {"vocab_size": 9, "img_dim": 8, "num_regions": 6, "embed_size": 8, "word_dim": 4,
         "sim_dim": 4, "graph_layers": 1, "text_layers": 1}  # fmt: skip
many = settings(
    max_examples=120, derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def refused_or_read(kind, work):
    """What `work` returns, or None where it was refused in one line. Anything else is a failure."""
    TRIED[kind] += 1
    try:
        return work()
    except InputError as error:
        assert str(error).strip() and len(str(error)) < 1000
        assert "Traceback" not in str(error)
        return None


@st.composite
def broken(draw, content, at_start=400):
    """`content` cut, flipped, overwritten, bytes taken out or put in; early ones more often."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        end = draw(st.sampled_from([at_start, len(content)]))
        place = draw(st.integers(0, max(0, min(end, len(content)) - 1)))
        size = draw(st.integers(1, 40))
        what = draw(st.sampled_from(["cut", "flip", "write", "insert", "delete", "zero"]))
        if what == "cut":
            del content[place:]
        elif what == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif what == "write":
            content[place : place + size] = draw(st.binary(min_size=size, max_size=size))
        elif what == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=size))
        elif what == "delete":
            del content[place : place + size]
        else:
            content[place : place + size] = bytes(size)
    return bytes(content)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a data set, its vocabulary and a checkpoint, all whole."""
    folder = tmp_path_factory.mktemp("good")
    for split in ("train", "dev", "test"):
        write_split(folder / "data" / "tiny", split, 6)
    vocab = build_from_data(folder / "data", "tiny", threshold=2)
    vocab.save(folder / "vocab" / "tiny_vocab.json")
    save_checkpoint(checkpoint(vocab), folder / "model.pth.tar")
    return folder


def checkpoint(vocab, **changes):
    torch.manual_seed(0)
    opt = {
        "num_layers": 1, "bi_gru": True, "drop_out": 0.0, "embed_dropout": 0.1,
        "pool_dropout": 0.1, "no_imgnorm": False, "no_txtnorm": False, "padding": "masked",
        "data_path": "data", "data_name": "tiny", "vocab_path": "vocab",
    }  # fmt: skip
    opt |= SIZES | {"vocab_size": len(vocab)} | changes
    names = [name for name in opt if name not in ("data_path", "data_name", "vocab_path")]
    model = LHSC(**{name: opt[name] for name in names})
    return {"epoch": 0, "Eiters": 1, "best_rsum": 1.0, "opt": opt, "model": model.state_dict()}


@pytest.fixture
def place(tmp_path, good):
    """A copy of `good` to break."""
    for file in good.rglob("*"):
        if file.is_file():
            target = tmp_path / file.relative_to(good)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return tmp_path


def read_all(folder, split="test"):
    """A split, gone through entirely."""
    vocab = Vocabulary.load(folder / "vocab" / "tiny_vocab.json")
    dataset = PrecompDataset(folder / "data", "tiny", split, vocab)
    images = torch.cat(list(dataset.image_blocks(4)))
    words = [dataset.words(i) for i in range(len(dataset))]
    return dataset, images, words


# -- files, mutated -------------------------------------------------------------------------------


@many
@given(data=st.data())
def test_region_files(good, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("ims")
    (folder / "vocab").symlink_to(good / "vocab")
    (folder / "data/tiny").mkdir(parents=True)
    source = good / "data/tiny"
    (folder / "data/tiny/test_caps.txt").symlink_to(source / "test_caps.txt")
    content = data.draw(broken((source / "test_ims.npy").read_bytes(), 128))
    (folder / "data/tiny/test_ims.npy").write_bytes(content)
    read = refused_or_read("region file", lambda: read_all(folder))
    if read is not None:
        dataset, images, _ = read
        assert torch.isfinite(images).all() and len(dataset) == 30
        assert images.shape == (dataset.n_images, *images.shape[1:]) and images.dim() == 3


@many
@given(data=st.data())
def test_caption_files(good, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("caps")
    (folder / "vocab").symlink_to(good / "vocab")
    (folder / "data/tiny").mkdir(parents=True)
    source = good / "data/tiny"
    (folder / "data/tiny/test_ims.npy").symlink_to(source / "test_ims.npy")
    content = data.draw(broken((source / "test_caps.txt").read_bytes()))
    (folder / "data/tiny/test_caps.txt").write_bytes(content)
    read = refused_or_read("captions", lambda: read_all(folder))
    if read is not None:
        dataset, _, words = read
        assert len(dataset) % 6 == 0 and all(w[0] == 1 and w[-1] == 2 for w in words)


@many
@given(data=st.data())
def test_id_files(good, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("ids")
    (folder / "vocab").symlink_to(good / "vocab")
    (folder / "data/tiny").mkdir(parents=True)
    for name in ("test_ims.npy", "test_caps.txt"):
        (folder / "data/tiny" / name).symlink_to(good / "data/tiny" / name)
    content = data.draw(broken("".join(f"id{i}\n" for i in range(6)).encode(), 30))
    (folder / "data/tiny/test_ids.txt").write_bytes(content)
    read = refused_or_read("ids", lambda: read_all(folder))
    assert read is None or len(read[0].image_ids) == 6


@many
@given(data=st.data())
@example(data=None)
def test_vocabularies(good, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("vocab")
    path = good / "vocab" / "tiny_vocab.json"
    content = data.draw(broken(path.read_bytes())) if data else b"[" * 100_000
    (folder / "v.json").write_bytes(content)
    vocab = refused_or_read("vocabulary", lambda: Vocabulary.load(folder / "v.json"))
    if vocab is not None:
        assert vocab("<pad>") == 0 and len(vocab.fingerprint()) > 0
        assert sorted(vocab.word2idx.values()) == list(range(len(vocab)))


@many
@given(data=st.data())
def test_checkpoints(good, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("model") / "m.pth.tar"
    path.write_bytes(data.draw(broken((good / "model.pth.tar").read_bytes(), 3000)))
    raw = refused_or_read("checkpoint", lambda: load_checkpoint(path))
    if raw is not None:
        model = refused_or_read("checkpoint", lambda: model_from(raw, path))
        assert model is None or isinstance(model, LHSC)


@many
@given(data=st.data())
def test_a_checkpoint_read_whole_is_the_one_written(good, tmp_path_factory, data):
    """--resume goes by the checksums: what is read is what was saved, or nothing."""
    path = tmp_path_factory.mktemp("model") / "m.pth.tar"
    path.write_bytes(data.draw(broken((good / "model.pth.tar").read_bytes(), 3000)))
    raw = refused_or_read("checkpoint, whole", lambda: load_whole(path))
    if raw is not None:
        expected = load_checkpoint(good / "model.pth.tar")["model"]
        assert raw["model"].keys() == expected.keys()
        assert all(torch.equal(raw["model"][name], x) for name, x in expected.items())


# -- files, made wrong ----------------------------------------------------------------------------


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


class Trojan:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


GOOD = np.ones((6, 6, 8), np.float32)
WITH_NAN, WITH_INF = GOOD.copy(), GOOD.copy()
WITH_NAN[3, 2, 1], WITH_INF[5, 5, 7] = np.nan, -np.inf
REGIONS = {
    "empty": b"",
    "text": b"not an array",
    "header only": npy(GOOD)[:128],
    "one byte short": npy(GOOD)[:-1],
    "rank 2": npy(GOOD[0]),
    "rank 4": npy(GOOD[None]),
    "rank 0": npy(np.float32(3)),
    "no images": npy(GOOD[:0]),
    "no regions": npy(GOOD[:, :0]),
    "no width": npy(GOOD[..., :0]),
    "integers": npy(GOOD.astype(np.int64)),
    "double": npy(GOOD.astype(np.float64)),
    "complex": npy(GOOD.astype(np.complex64)),
    "strings": npy(GOOD.astype(str)),
    "structured": npy(np.zeros((6, 6, 8), [("x", np.float32)])),
    "object": npy(np.array([Trojan()], dtype=object), allow_pickle=True),
    "pickle": pickle.dumps(Trojan()),
    "NaN": npy(WITH_NAN),
    "infinite": npy(WITH_INF),
    "one image more": npy(np.ones((7, 6, 8), np.float32)),
    "one image less": npy(np.ones((5, 6, 8), np.float32)[:4]),
    "an archive": b"PK\3\4" + bytes(200),
    "absurd shape": npy(GOOD).replace(b"(6, 6, 8)", b"(9999999999, 6, 8)"),
    "negative shape": npy(GOOD).replace(b"(6, 6, 8)", b"(-6, 6, 8)"),
    "version 9": b"\x93NUMPY\x09\x00" + npy(GOOD)[8:],
}


@pytest.mark.parametrize("name", REGIONS)
def test_wrong_region_files_are_refused(place, monkeypatch, name):
    monkeypatch.chdir(place)
    (place / "data/tiny/test_ims.npy").write_bytes(REGIONS[name])
    assert refused_or_read("wrong region file", lambda: read_all(place)) is None
    assert not Path("ran").exists()


LINES = [b"a red dog"] * 30
CAPTIONS = {
    "empty": b"",
    "one short": b"\n".join(LINES[:29]),
    "one more": b"\n".join([*LINES, b"x"]),
    "an empty line": b"\n".join([*LINES[:10], b"", *LINES[11:]]),
    "only spaces": b"\n".join([*LINES[:10], b" \t ", *LINES[11:]]),
    "an empty last line": b"\n".join([*LINES[:29], b"", b""]),
    "latin-1": b"\n".join([*LINES[:10], "ein Mädchen".encode("latin-1"), *LINES[11:]]),
    "utf-16": b"\n".join(LINES).decode().encode("utf-16"),
    "NUL": b"\n".join([*LINES[:10], b"a\0b", *LINES[11:]]),
    "surrogates": b"\n".join([*LINES[:10], b"\xed\xa0\x80", *LINES[11:]]),
    "binary": bytes(range(256)) * 3,
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_wrong_captions_are_refused(place, name):
    (place / "data/tiny/test_caps.txt").write_bytes(CAPTIONS[name])
    assert refused_or_read("wrong captions", lambda: read_all(place)) is None


HOSTILE = {
    "crlf": "a dog\r\n", "bom": "\ufeffa dog\n", "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈\n",
    "long": "dog " * 5000 + "\n",
    "right to left": "كلب أحمر\n", "combining": "e\u0301" * 50 + "\n", "quotes": "\"'`´\n",
    "control": "a\x07b\x1b[31m\n", "special tokens": "<pad> <start> <end> <unk>\n",
    "one word": "x\n", "zero width": "a\u200bb\n", "line separator": "a\u2028b\n",
    "no break space": "a\u00a0dog\n", "form feed": "a\x0cdog\n", "backslash": "\\n \\x00 %s {}\n",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_strange_captions_are_read(place, name):
    text = HOSTILE[name].encode() * 30
    (place / "data/tiny/test_caps.txt").write_bytes(text)
    dataset, _, words = refused_or_read("strange captions", lambda: read_all(place))
    assert len(dataset) == 30 and all(len(w) >= 3 for w in words)


def change(**changes):
    def apply(content):
        content = json.loads(content)
        for key, value in changes.items():
            content["word2idx"][key] = value
        return json.dumps({"word2idx": content["word2idx"]})

    return apply


VOCABULARIES = {
    "empty": lambda _: "",
    "a list": lambda _: "[]",
    "null": lambda _: "null",
    "a number": lambda _: "3",
    "no words": lambda _: '{"word2idx": {}}',
    "words of no kind": lambda _: '{"word2idx": 3}',
    "deep": lambda _: '{"a":' * 100_000,
    "a very long number": lambda _: '{"word2idx": {"<pad>": ' + "9" * 5000 + "}}",
    "no <pad>": lambda t: t.replace("<pad>", "pad"),
    "no <unk>": lambda t: t.replace("<unk>", "unk"),
    "a hole": change(dog=99),
    "twice the same": change(dog=1),
    "negative": change(dog=-1),
    "a float": change(dog=5.0),
    "a string": change(dog="5"),
    "a truth": change(dog=True),
    "a list for a number": change(dog=[5]),
    "NaN": change(dog=float("nan")),
    "pad is not 0": lambda t: change(**{"<pad>": 1, "<start>": 0})(t),
    "idx2word of others": lambda t: json.dumps(json.loads(t) | {"idx2word": {"0": "x"}}),
    "idx2word of no kind": lambda t: json.dumps(json.loads(t) | {"idx2word": "x"}),
    "half a character": lambda t: t.replace("cat", "\\ud800"),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_wrong_vocabularies_are_refused(good, tmp_path, name):
    path = tmp_path / "v.json"
    path.write_text(VOCABULARIES[name]((good / "vocab/tiny_vocab.json").read_text()))
    assert refused_or_read("wrong vocabulary", lambda: Vocabulary.load(path)) is None


def stored(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def changed(**opt):
    """The good checkpoint with other options."""
    return lambda raw: stored(raw | {"opt": raw["opt"] | opt})


def trojan_zip(raw):
    """A whole checkpoint but for its pickle, which would run code."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(stored(raw))) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            harmful = name.endswith("data.pkl")
            new.writestr(name, pickle.dumps(Trojan(), 2) if harmful else old.read(name))
    return target.getvalue()


CHECKPOINTS = {
    "empty": lambda raw: b"",
    "text": lambda raw: b"hello",
    "a pickle that runs code": lambda raw: pickle.dumps(Trojan(), 2),
    "a zip that runs code": trojan_zip,
    "an object inside": lambda raw: stored(raw | {"more": Trojan()}),
    "half": lambda raw: stored(raw)[: len(stored(raw)) // 2],
    "a tensor": lambda raw: stored(torch.ones(3)),
    "a list": lambda raw: stored([1, 2]),
    "no model": lambda raw: stored({"opt": raw["opt"]}),
    "no options": lambda raw: stored({"model": raw["model"]}),
    "options of no kind": lambda raw: stored(raw | {"opt": 3}),
    "a model of no kind": lambda raw: stored(raw | {"model": 3}),
    "an empty model": lambda raw: stored(raw | {"model": {}}),
    "two states": lambda raw: stored(raw | {"model": [{}, {}]}),
    "three empty states": lambda raw: stored(raw | {"model": [{}, {}, {}]}),
    "three states of another model": lambda raw: stored(raw | {"model": [raw["model"]] * 3}),
    "a weight less": lambda raw: stored(raw | {"model": dict([*raw["model"].items()][1:])}),
    "a weight more": lambda raw: stored(raw | {"model": raw["model"] | {"x": torch.ones(1)}}),
    "a number for a weight": lambda raw: stored(
        raw | {"model": raw["model"] | {next(iter(raw["model"])): 3}}
    ),
    "another size": changed(embed_size=16),
    "other regions": changed(num_regions=7),
    "more layers": changed(graph_layers=3),
    "no layers": changed(text_layers=0),
    "a negative size": changed(embed_size=-8),
    "size 0": changed(embed_size=0),
    "a size that is text": changed(embed_size="8"),
    "an absurd size": changed(embed_size=10**12),
    "a dropout above 1": changed(embed_dropout=7.0),
    "an unknown padding": changed(padding="other"),
    "an option less": lambda raw: stored(
        raw | {"opt": {k: v for k, v in raw["opt"].items() if k != "sim_dim"}}
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_wrong_checkpoints_are_refused_and_never_run(good, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "m.pth.tar"
    path.write_bytes(CHECKPOINTS[name](torch.load(good / "model.pth.tar", weights_only=True)))
    work = lambda: model_from(load_checkpoint(path), path)  # noqa: E731
    assert refused_or_read("wrong checkpoint", work) is None
    assert not Path("ran").exists()


# -- options --------------------------------------------------------------------------------------


def command(capsys, monkeypatch, folder, main, *arguments):
    """A command line in this process: its exit status and what it says on stderr."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    TRIED["command line"] += 1
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    lines = [x for x in error.splitlines() if "error:" in x]
    assert len(lines) == 1 and "Traceback" not in error, error
    return ended.value.code, lines[0]


COUNTS = ["num_epochs", "batch_size", "embed_size", "sim_dim", "word_dim", "num_layers", "log_step",
          "val_step", "save_step", "keep", "lr_update", "img_dim", "num_regions"]  # fmt: skip
RATES = ["drop_out", "embed_dropout", "pool_dropout", "learning_rate", "margin", "grad_clip"]
BAD_TRAIN = [
    *(pytest.param(f"--{name}", value) for name in COUNTS for value in ("0", "-3", "x", "1.5", "")),
    *(pytest.param(f"--{name}", value) for name in RATES for value in ("-1", "nan", "inf", "x")),
    *(pytest.param("--drop_out", value) for value in ("1", "7")),
    *(pytest.param("--workers", value) for value in ("-1", "x")),
    *(pytest.param("--seed", value) for value in ("-1", "x", "1e3")),
    *(pytest.param("--device", value) for value in ("tpu", "cuda:x", "cuda:99", "", "meta")),
    *(pytest.param("--data_name", value) for value in ("nothing", "", "../x", "a\nb", "ü", " ")),
    *(pytest.param("--data_path", value) for value in ("nowhere", "data/tiny/test_ims.npy", "")),
    *(pytest.param("--padding", value) for value in ("none", "")),
    pytest.param("--img_dim", "9"),
    pytest.param("--num_regions", "5"),
    pytest.param("--unknown", "1"),
    pytest.param("--embed", "8"),
    pytest.param("--resume", "nowhere"),
    pytest.param("--resume", "model.pth.tar"),
    pytest.param("--resume", "data"),
    pytest.param("--batch_size", "1"),
    pytest.param("--model_name", "model.pth.tar/below"),
]


@pytest.mark.parametrize(("option", "value"), BAD_TRAIN)
def test_bad_training_options(capsys, monkeypatch, place, option, value):
    """Exit 2, one line, and nothing written."""
    before = sorted(file for file in place.rglob("*"))
    arguments = ["--data_name", "tiny", "--workers", "0", option, value]
    code, _ = command(capsys, monkeypatch, place, train.main, *arguments)
    assert code == 2
    assert sorted(file for file in place.rglob("*")) == before


BAD_EVALUATION = [
    ("--model_path", "nowhere.pth.tar"), ("--model_path", "data"), ("--model_path", ""),
    ("--model_path", "vocab/tiny_vocab.json"), ("--split", "train"), ("--split", ""),
    ("--data_name", "nothing"), ("--data_path", "nowhere"), ("--vocab_path", "nowhere"),
    ("--vocab_path", "data"), ("--device", "tpu"), ("--save_sims", "no/where.npy"),
    ("--save_metrics", "no/where.json"), ("--precision", "fp8"), ("--fold5", "yes"),
    ("--save_sims", "data"), ("--save_metrics", "."), ("--unknown", "1"), ("--split", "testall"),
]  # fmt: skip


@pytest.mark.parametrize(("option", "value"), BAD_EVALUATION)
def test_bad_evaluation_options(capsys, monkeypatch, place, option, value):
    before = sorted(file for file in place.rglob("*"))
    arguments = ["--model_path", "model.pth.tar", option, value]
    code, _ = command(capsys, monkeypatch, place, evaluation.main, *arguments)
    assert code == 2
    assert sorted(file for file in place.rglob("*")) == before


@pytest.mark.parametrize("name", ["with space", "ünï©ødé", "日本", "-dash", "a'b\"c", "x" * 200])
def test_strange_paths_work(place, monkeypatch, capsys, name):
    """Paths with spaces, quotes and any letters; the data behind a symlink."""
    TRIED["strange path"] += 1
    folder = place / name
    folder.mkdir()
    (folder / "data").symlink_to(place / "data")
    (folder / "vocab").symlink_to(place / "vocab")
    (folder / "m.pth.tar").write_bytes((place / "model.pth.tar").read_bytes())
    metrics = evaluation.evalrank(
        folder / "m.pth.tar", folder / "data", "test", vocab_path=folder / "vocab", device="cpu"
    )
    assert metrics["n_images"] == 6


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_no_permission(place, monkeypatch, capsys):
    (place / "data/tiny/test_ims.npy").chmod(0)
    arguments = ["--model_path", "model.pth.tar"]
    assert command(capsys, monkeypatch, place, evaluation.main, *arguments)[0] == 2


def test_at_least_five_hundred_cases_were_tried(request, record_property):
    """Counts what ran before it; meaningless when only some of this file's tests run."""
    if request.config.option.keyword or len(TRIED) < 10:
        pytest.skip("only some of the tests ran")
    kinds = ", ".join(f"{kind} {n}" for kind, n in TRIED.items())
    record_property("told", f"malformed or strange input: {sum(TRIED.values())} cases ({kinds})")
    assert sum(TRIED.values()) >= 500
