"""Tokenizer and vocabulary."""

import json
from unittest.mock import Mock

import nltk
import pytest
from conftest import call, refused, succeeded

import vocab as vocab_module
from utils import InputError
from vocab import SPECIAL_TOKENS, Vocabulary, build_from_data, build_vocab, read_captions, tokenize

HOSTILE = [
    "🙂🙂", "naïve café", "a\tb", "it's 5 o'clock .", "x" * 2000, "dog " * 500, "<unk> <end>"
]  # fmt: skip


@pytest.fixture
def splitter():
    """It is chosen anew in the test, and again after it."""
    vocab_module.sentence_splitter.cache_clear()
    yield vocab_module.sentence_splitter
    vocab_module.sentence_splitter.cache_clear()


def test_words_are_lower_case_and_punctuation_stands_apart():
    words = tokenize("A man's dog, brown & small, can't swim.")
    assert words == "a man 's dog , brown & small , ca n't swim .".split()
    with pytest.raises(TypeError):
        tokenize(b"a dog")  # the repr of bytes has cost other ports half their recall


def test_trained_punkt_is_used_or_its_lack_noted_once(monkeypatch, splitter, capsys):
    monkeypatch.setattr(nltk.data, "find", Mock(return_value="found"))
    assert splitter() is nltk.sent_tokenize
    splitter.cache_clear()
    monkeypatch.setattr(nltk.data, "find", Mock(side_effect=LookupError))
    tokenize("a dog.")
    tokenize("a cat.")
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith("note: ") and "nltk.downloader punkt_tab" in err


def test_threshold_and_order():
    vocab = build_vocab(["b a a"] * 3 + ["c b"], threshold=4)
    assert list(vocab.word2idx) == [*SPECIAL_TOKENS, "a", "b"]
    assert build_vocab(["c b", *["b a a"] * 3], threshold=4).word2idx == vocab.word2idx


def test_unknown_words_and_ends():
    vocab = build_vocab(["a dog"] * 4)
    assert vocab.encode("a zebra dog") == [1, 4, 3, 5, 2]
    assert vocab.encode("") == [1, 2]
    for caption in HOSTILE:
        numbers = vocab.encode(caption)
        assert numbers[0] == 1 and numbers[-1] == 2
        assert not {1, 2} & {*numbers[1:-1]}  # no caption can forge its ends


def test_json_round_trip(tmp_path):
    vocab, path = build_vocab(HOSTILE * 4), tmp_path / "v" / "x_vocab.json"
    vocab.save(path)
    again = Vocabulary.load(path)
    assert again.word2idx == vocab.word2idx and again.idx2word == vocab.idx2word
    assert again.fingerprint() == vocab.fingerprint()
    words = [*vocab.word2idx]
    others = [*words[:4], *reversed(words[4:])]  # as many words, other numbers
    assert again.fingerprint() != Vocabulary(others).fingerprint()
    content = json.loads(path.read_text(encoding="utf-8"))
    assert set(content) == {"word2idx", "idx2word", "idx"} and content["idx"] == len(vocab)
    assert content["idx2word"]["0"] == "<pad>"


def scan(*without, **words):
    """SCAN's JSON of "a dog", and changes."""
    numbers = build_vocab(["a dog"] * 4).word2idx | words
    return json.dumps({"word2idx": {w: i for w, i in numbers.items() if w not in without}})


@pytest.mark.parametrize("content", [
    "", "{", "[]", "{}", "\xff\xfe", "[" * 100_000, '{"word2idx": [5]}', '{"word2idx": []}', None,
    scan("<end>"), scan("a"), scan(dog=99), scan(dog=4), scan(dog="5"), scan(dog=None),
    scan(dog=0, **{"<pad>": 5}), scan(**{"\ud83d": 6}),
])  # fmt: skip
def test_what_is_no_vocabulary_is_refused(tmp_path, content):
    path = tmp_path / "v.json"
    path.write_text(scan())
    assert Vocabulary.load(path).encode("a dog") == [1, 4, 5, 2]
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode("latin1"))
    with pytest.raises(InputError, match="v.json: "):
        Vocabulary.load(path)


def test_reading_captions(tmp_path):
    path = tmp_path / "c.txt"
    path.write_bytes("\ufeffa dog\r\nder Bär\u2028läuft\r\n🙂\n".encode())
    assert read_captions(path) == ["a dog", "der Bär\u2028läuft", "🙂"]
    for bad, what in ((b"\xff", "not UTF-8"), (b" ", "empty"), (b"a\0b", "empty, or NUL")):
        path.write_bytes(b"a\n" + bad + b"\nb")
        with pytest.raises(InputError, match=f"c.txt, line 2: {what}"):
            read_captions(path)


def test_the_command_replaces_a_vocabulary_only_with_overwrite(tiny):
    path, command = tiny / "vocab/tiny_vocab.json", (tiny, vocab_module.main, "--data_name", "tiny")
    before = path.read_bytes()
    refused(call(*command, "--threshold", 9), "tiny_vocab.json: is there already", "--overwrite")
    assert path.read_bytes() == before
    assert "words written to" in succeeded(call(*command, "--threshold", 9, "--overwrite"))
    assert Vocabulary.load(path).word2idx == build_from_data(tiny / "data", "tiny", 9).word2idx
    path.unlink()
    succeeded(call(*command))
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "x/", "x"])
def test_data_names_that_are_paths_or_missing_are_refused(tiny, name):
    words = "No such file" if name == "x" else f"--data_name {name}: expected"
    refused(call(tiny, vocab_module.main, "--data_name", name), words)
