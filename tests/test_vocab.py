"""Tokenizer and vocabulary."""

import json

import nltk
import pytest
from conftest import call, refused, succeeded
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

import vocab as vocab_module
from utils import InputError
from vocab import (
    SPECIAL_TOKENS,
    Vocabulary,
    build_from_data,
    build_vocab,
    read_captions,
    sentence_splitter,
    tokenize,
)

HOSTILE = [
    "🙂🙂", "naïve café", "a\tb", "it's 5 o'clock .", "x" * 2000, "dog " * 500, "<unk> <end>"
]  # fmt: skip


@pytest.fixture
def splitter():
    """Chosen anew in the test, and again after it."""
    sentence_splitter.cache_clear()
    yield
    sentence_splitter.cache_clear()


def test_words_are_lower_case_and_punctuation_stands_apart():
    words = tokenize("A man's dog, brown & small, can't swim.")
    assert words == "a man 's dog , brown & small , ca n't swim .".split()
    with pytest.raises(TypeError, match="decode"):
        tokenize(b"a dog")


def test_where_the_untrained_splitter_differs():
    """It ends a sentence after an abbreviation, so that the full stop becomes a word."""
    untrained, parameters = PunktSentenceTokenizer().tokenize, PunktParameters()
    parameters.abbrev_types.add("mr")
    trained = PunktSentenceTokenizer(parameters).tokenize
    assert tokenize("Mr. Smith walks.", trained) == ["mr.", "smith", "walks", "."]
    assert tokenize("Mr. Smith walks.", untrained) == ["mr", ".", "smith", "walks", "."]
    plain = "Two dogs run . One barks at 3.5 m !"
    assert tokenize(plain, trained) == tokenize(plain, untrained)


def test_missing_punkt_data_is_noted_once_in_a_line(monkeypatch, splitter, capsys):
    def nothing(*_, **__):
        raise LookupError

    monkeypatch.setattr(nltk.data, "find", nothing)
    tokenize("a dog.")
    tokenize("a cat.")
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith("note: ") and "nltk.downloader punkt_tab" in err


def test_trained_punkt_is_used_where_installed(monkeypatch, splitter):
    monkeypatch.setattr(nltk.data, "find", lambda *_: "found")
    assert sentence_splitter() is nltk.sent_tokenize


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
    assert again.fingerprint() != Vocabulary([*SPECIAL_TOKENS, "dog"]).fingerprint()
    content = json.loads(path.read_text(encoding="utf-8"))
    assert set(content) == {"word2idx", "idx2word", "idx"} and content["idx"] == len(vocab)
    assert content["idx2word"]["0"] == "<pad>"


@pytest.mark.parametrize("change, words", [
    ({"dog": 99}, "numbers 0 … n−1"), ({"dog": 4}, "numbers 0"), ({"dog": "5"}, "numbers 0"),
    ({"<start>": True}, "numbers 0"), ({"<pad>": 5, "dog": 0}, "<pad> should be number 0"),
    ({"\ud83d": 6}, "not text"),
])  # fmt: skip
def test_numbers_and_words_that_cannot_be_are_refused(tmp_path, change, words):
    path, vocab = tmp_path / "v.json", build_vocab(["a dog"] * 4)
    path.write_text(json.dumps({"word2idx": vocab.word2idx | change}))
    with pytest.raises(InputError, match=f"v.json: .*{words}"):
        Vocabulary.load(path)
    path.write_text(json.dumps({"word2idx": vocab.word2idx, "idx2word": {"0": "<pad>"}}))
    with pytest.raises(InputError, match="v.json: idx2word and word2idx disagree"):
        Vocabulary.load(path)


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"word2idx": {"<pad>": 0}}', None,
])  # fmt: skip
def test_files_that_are_no_vocabulary_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "v.json").write_bytes(content)
    with pytest.raises(InputError, match="v.json"):
        Vocabulary.load(tmp_path / "v.json")


def test_reading_captions(tmp_path):
    path = tmp_path / "c.txt"
    path.write_bytes("\ufeffa dog\r\nder Bär\u2028läuft\r\n🙂\n".encode())
    assert read_captions(path) == ["a dog", "der Bär\u2028läuft", "🙂"]
    for bad, line in ((b"a\n\xff\n", "line 2: not UTF-8"), (b"a\n\nb\n", "line 2: empty"),
                      (b"a\0b\n", "line 1: a NUL byte")):  # fmt: skip
        path.write_bytes(bad)
        with pytest.raises(InputError, match=line):
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


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "x/"])
def test_data_names_that_are_paths_are_refused(tiny, name):
    refused(call(tiny, vocab_module.main, "--data_name", name), f"--data_name {name}: expected")


def test_the_vocabulary_of_a_missing_data_set_is_refused(tiny):
    result = call(tiny, vocab_module.main, "--data_name", "x")
    refused(result, "data/x: train_caps.txt and dev_caps.txt not found")
