"""How a written word comes to be read: letters and their phones, the tokens that tell most, what they are made of."""

import argparse
import copy
import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from pipecat_qwen3.checkpoint import Checkpoint, find
from training import spelling, tokenizer
from training.composed import Composed, compose, composed
from training.export import weights as exported
from training.lexicon import Vocabulary, features, text_embeddings
from training.merges import Form, Merger, forms, merges
from training.respelling import Respelling
from training.rows import Utterance, tokens_and_words
from training.spelling import Letters, Spelling, Spellings, spell
from training.train_talker import RESPELT, Trainer

ROOT = Path(__file__).parent.parent

SOUNDS = {"a": "ae1", "o": "ow1", "b": "b", "d": "d", "k": "k", "m": "m", "x": "k s", "h": ""}
"""How a language is said whose every letter has one sound, two or none."""

TEXT = "Doctor Abbott saw two zebras, a kettle and 12 thermostats, don't you?"


def letters(phones: str) -> Letters:
    """Of a word, from its phones with a bar between two letters."""
    return tuple(tuple(part.split()) for part in phones.split("|"))


SPELLINGS: Spellings = {
    "doctor": Spelling(letters("d|aa1|k|t|er0|"), 5.0, False),
    "zebras": Spelling(letters("z|iy1|b|r|ax0|z"), 3.0, False),
    "kettle": Spelling(letters("k|eh1||t|ax0 l|"), 3.5, False),
    "thermostats": Spelling(letters("|th|er1||m|ax0|s|t|ae1|t|s"), 2.5, False),
    "don": Spelling(letters("d|aa1|n"), 4.0, False),
    "abbott": Spelling(letters("ae1|b||ax0||t"), 3.0, True),
}


@pytest.fixture(autouse=True)
def no_flite(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in no lexicon sounds as it is written; flite may not be here."""
    monkeypatch.setattr("training.lexicon.pronounce", lambda word: list(word))


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open("embedded")


@pytest.fixture(scope="module")
def vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.lexicon.pronounce", lambda word: list(word))
        return Vocabulary(checkpoint.load_tokenizer(), checkpoint.config.text_vocab, forms(SPELLINGS))


def bytes_only() -> Tokenizer:
    """A tokenizer without a merge."""
    return tokenizer.train(iter(["a"]), 256)


def test_each_letter_gets_its_phones() -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("aobdkmxh", k=rng.randint(2, 8))) for _ in range(400)]
    said = {word: tuple(phone for letter in word for phone in SOUNDS[letter].split()) for word in words}
    found = spell({word: phones for word, phones in said.items() if phones})
    right = [
        part == tuple(SOUNDS[letter].split())
        for word, parts in found.items()
        for letter, part in zip(word, parts, strict=True)
    ]
    assert all(tuple(phone for part in parts for phone in part) == said[word] for word, parts in found.items())
    assert sum(right) / len(right) > 0.97
    assert spelling.align("ab", tuple("abababa"), {}) is None  # more than three a letter


def test_spellings_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "spellings.json"
    path.write_text(json.dumps({"kettle": ["k|eh1||t|ax0 l|", 3.5, False]}))
    assert spelling.read_spellings(path) == {"kettle": SPELLINGS["kettle"]}
    short = '{"kettle": ["k", 3.5, false]}'
    for wrong in ("[]", '{"kettle": 3}', "no JSON", '{"kettle": [[], 1, 2]}', short, short.replace("kettle", "K")):
        path.write_text(wrong)
        with pytest.raises(SystemExit, match=r"spellings.json is no file of training.spelling: (it|its) "):
            spelling.read_spellings(path)


def test_what_tells_most_about_its_sound_is_merged() -> None:
    """c is s before e and k elsewhere, t h is one sound; b a is frequent, and regular."""
    rng = random.Random(0)
    sounds = {"a": "ae1", "b": "b", "k": "k", "e": "eh1", "th": "th", "ce": "s eh1", "ca": "k ae1", "t": "t", "h": "hh"}
    words = []
    for _ in range(300):
        units = [rng.choice(list(sounds)) for _ in range(rng.randint(1, 4))] + ["b", "a"] * 2
        parts = [part for u in units for part in ([sounds["th"], ""] if u == "th" else sounds[u].split())]
        words.append(Form("".join(units), tuple(tuple(part.split()) for part in parts), rng.choice((0.1, 0.3, 0.7))))
    found = merges(bytes_only(), words, 100)
    assert set(found[:2]) in ({("t", "h"), ("c", "e")}, {("t", "h"), ("c", "a")})
    merger = Merger(bytes_only(), words)
    before = sum(merger.open.values())
    for pair in found:
        gained = merger.gain(pair)
        assert gained > 0
        merger.merge(pair)
        assert sum(merger.open.values()) == pytest.approx(before - gained)
        before -= gained
    assert ("b", "a") not in found
    assert before < 0.05 * sum(Merger(bytes_only(), words).open.values())
    assert merges(bytes_only(), words, 1) == found[:1]


def test_further_merges_change_no_earlier_token() -> None:
    before = tokenizer.train(iter(["the theory of thermostats"] * 3), 265)
    after = tokenizer.extended(before, [("z", "e"), ("ze", "b"), ("z", "o")])
    assert after.get_vocab_size() == before.get_vocab_size() + 3
    assert after.encode("the theory").ids == before.encode("the theory").ids
    assert after.encode("zebzo").tokens == ["zeb", "zo"]
    assert {token: after.token_to_id(token) for token in before.get_vocab()} == before.get_vocab()


def test_words_that_are_mostly_read_wrong_are_counted() -> None:
    found = tokenizer.read_right(bytes_only(), forms(SPELLINGS), SPELLINGS)
    assert found["4"] < 1  # "doctor": o is aa here and er there
    word, merged = "Ġ", []
    for letter in "doctor":
        merged.append((word, letter))
        word += letter
    whole = tokenizer.extended(bytes_only(), merged)
    assert tokenizer.read_right(whole, forms(SPELLINGS), SPELLINGS)["4"] > found["4"]


def test_tokens_that_sound_alike_begin_alike() -> None:
    said = {
        " knight": {("n", "ay1", "t"): 1.0},
        " night": {("n", "ay1", "t"): 1.0},
        " ninth": {("n", "ay1", "n", "th"): 1.0},
        " seven": {("s", "eh1", "v", "ax0", "n"): 1.0},
    }
    made = {text: features(text, phones) for text, phones in said.items()}
    names = sorted({name for each in made.values() for name in each}, key=str)
    vectors = {text: torch.tensor([each.get(name, 0.0) for name in names]) for text, each in made.items()}

    def likeness(one: str, other: str) -> float:
        return torch.cosine_similarity(vectors[one], vectors[other], dim=0).item()

    assert likeness(" knight", " night") > likeness(" ninth", " night") + 0.2 > likeness(" seven", " night") + 0.2


def test_a_token_is_made_of_what_it_sounds_like_in_words(checkpoint: Checkpoint, vocabulary: Vocabulary) -> None:
    found, reader = vocabulary.features, checkpoint.load_tokenizer()
    assert len(found.begin) == checkpoint.config.text_vocab + 1
    dense = found.dense()
    pieces = reader.tokenize("kettle")
    ids, first = [reader.get_vocab()[piece] for piece in pieces], vocabulary.numbers["front", 0, "k"]
    assert dense[ids[0], first] > 0.3
    assert not any(dense[index, first] for index in ids[1:])
    assert dense[reader.convert_tokens_to_ids("k"), first] > 0.2  # a part of it
    byte = [reader.convert_tokens_to_ids(token) for token in ("Ã", "â")]  # bytes that are no text by themselves
    assert not torch.equal(dense[byte[0]], dense[byte[1]])
    assert dense[reader("é").input_ids[0]].count_nonzero() <= 3  # no sound: a symbol
    table = text_embeddings(found, 16)
    some = torch.tensor([ids[0], 300, 7])
    directions = torch.randn(found.count, 16)
    torch.testing.assert_close(found.embed(some, directions), dense[some] @ directions)
    assert table.std().item() == pytest.approx(1.0, abs=1e-5)


def test_a_composed_embedding_begins_as_its_table_and_teaches_what_is_shared(
    checkpoint: Checkpoint, vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talker = copy.deepcopy(checkpoint.load_talker(torch.float32)).requires_grad_(True)
    table = talker.model.text_embedding.weight.detach().clone()
    compose(talker, vocabulary.features)
    text = talker.model.text_embedding
    assert isinstance(text, Composed)
    ids = torch.tensor([[5, 300, 300], [4000, 5, 41]])
    with torch.no_grad():
        torch.testing.assert_close(text(ids), table[ids], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            composed(talker, talker.state_dict())["model.text_embedding.weight"], table, atol=1e-4, rtol=1e-4
        )
    monkeypatch.setattr("training.composed.DROPOUT", 1.0)
    torch.testing.assert_close(text(ids), vocabulary.features.embed(ids.flatten(), text.directions).view(2, 3, -1))
    rows = checkpoint.config.text_vocab
    compose(talker, vocabulary.features_with([]))
    text(ids)
    compose(talker, vocabulary.features_with([(" zeb", ("z", "iy1", "b")), ("", ())]))
    assert talker.model.text_embedding is text
    x = text(torch.tensor([rows, 300]))
    x[0].square().sum().backward()
    assert text.own.grad is not None
    assert not text.own.grad.any()  # it has no row of its own
    assert text.directions.grad is not None
    assert text.directions.grad[vocabulary.numbers["front", 1, "iy"]].any()
    torch.save({"average": composed(talker, talker.state_dict())}, tmp_path / "last.pt")
    assert exported(tmp_path / "last.pt", "").keys() == checkpoint.load_talker(torch.float32).state_dict().keys()


def test_a_run_goes_on_with_the_spellings_that_it_began_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(words: Spellings) -> Path:
        path = tmp_path / f"{len(words)}.json"
        spelt = {w: ["|".join(" ".join(p) for p in s.letters), s.zipf, s.name] for w, s in words.items()}
        path.write_text(json.dumps(spelt))
        return path

    def begin(spellings: Path | None) -> Trainer:
        options = {"base": find("embedded"), "run": tmp_path, "init": None, "spellings": spellings, "muon": True}
        options |= {"codebooks": ROOT / "training" / "embedded_codebooks.pt", "lr": 1e-3, "device": "cpu"}
        return Trainer(argparse.Namespace(**options, seed=0, compile=False))

    trainer = begin(write(SPELLINGS))
    reader = trainer.tokenizer
    [(ids, words)] = tokens_and_words(reader, [TEXT])
    said = Utterance(TEXT, ids, words, torch.zeros(3, 8), torch.zeros(3, 4), torch.zeros(3), 0)
    taught = trainer.recut([said] * 20, random.Random(0))
    assert trainer.recut([said] * 20, random.Random(1)) is taught  # it takes a while, so not in every short pass
    trainer.step = RESPELT
    assert trainer.recut([said] * 20, random.Random(1)) is not taught
    trainer.average["model.text_embedding.directions"] += 1
    trainer.save()
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["average"].keys() == Checkpoint.open("embedded").load_talker(torch.float32).state_dict().keys()
    resumed = begin(write(SPELLINGS))
    assert f"resumed at step {RESPELT}" in capsys.readouterr().out
    assert all(torch.equal(x, resumed.average[name]) for name, x in trainer.average.items())
    for other in (write({"kettle": SPELLINGS["kettle"]}), None):
        with pytest.raises(SystemExit, match="--spellings was not the same when this run began"):
            begin(other)


def test_words_are_respelt_with_their_own_sounds(checkpoint: Checkpoint, vocabulary: Vocabulary) -> None:
    reader = checkpoint.load_tokenizer()
    [(ids, words)] = tokens_and_words(reader, [TEXT])
    said = Utterance(TEXT, ids, words, torch.zeros(3, 8), torch.zeros(3, 4), torch.zeros(3), 0)
    respelling, rng = Respelling(reader, vocabulary, SPELLINGS), random.Random(1)
    found, made = respelling.recut([said] * 200, rng)
    texts = {token: piece for piece, token in respelling.tokens.items()}
    assert len(made.begin) == vocabulary.rows + len(texts) + 1
    changed = set()
    for utterance in found:
        spelt = [texts[i][0] if i in texts else str(reader.decode([i])) for i in utterance.ids]
        assert "".join(spelt) == TEXT
        assert len(utterance.token_words) == len(utterance.ids)
        for index, word in enumerate(TEXT.split()):
            own = [i for i, owner in zip(utterance.ids, utterance.token_words, strict=True) if owner == index]
            if any(i in texts for i in own):
                plain = word.strip(",.?").lower()
                changed.add(plain)
                phones = [phone for i in own if i in texts for phone in texts[i][1]]
                assert phones == [phone for letter in SPELLINGS[plain].letters for phone in letter]
    assert changed == SPELLINGS.keys() - {"don"}  # "don't" is another word, "saw" is in no lexicon here
    again, _ = respelling.recut([said] * 200, random.Random(2))
    assert [u.ids for u in again] != [u.ids for u in found]
