"""Sentences and spellings in, the text tokenizer out: byte pairs over the pieces that Qwen2's tokenizer cuts text into.

    python -m training.tokenizer OUT --spellings SPELLINGS.json [--base embedded]

The first merges are those of frequent pairs of generated sentences, the others those that tell most about how their
letters sound (training.merges). OUT gets vocab.json, merges.txt and tokenizer_config.json. The special tokens are the
base's own, behind all others. "assistant" is one token, since the prompt is cut by position.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from pipecat_qwen3.checkpoint import find
from training import needs
from training.merges import Form, Pair, alike, forms, merges, pieces, weights
from training.spelling import Phones, Spellings, read_spellings
from training.steps import leave, on_signals, there
from training.text import Texts, held_out

SENTENCES, FREQUENT, TOKENS = 60_000, 5056, 19_056
SEED = 1
"""Of the sentences; the shards' begin at 1,000,003."""

COMMON = (2.3, 3.0, 3.5, 4.0)
"""Words at least so common, on Zipf's scale, are counted apart when it is said how many are read right."""

ROLE, ROLE_SHARE = "assistant", 0.05
"""A whole text so often that its bytes are merged to the end, and early."""

PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenizer: a letter run with one character before it, single digits, other runs, white space."""


def sentences(count: int) -> Iterator[str]:
    """Generated sentences with the role among them."""
    source = Texts(SEED)
    for _ in range(count):
        yield source.draw()
        if source.rng.random() < ROLE_SHARE:
            yield ROLE


def train(texts: Iterator[str], size: int) -> Tokenizer:
    """A tokenizer of `size` bytes and merges, as Qwen2's is built."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def extended(tokenizer: Tokenizer, pairs: Iterable[Pair]) -> Tokenizer:
    """The same tokenizer with further merges, which come last."""
    state = json.loads(tokenizer.to_str())
    vocabulary, known = state["model"]["vocab"], state["model"]["merges"]
    for pair in pairs:
        vocabulary.setdefault("".join(pair), len(vocabulary))
        known.append(list(pair))
    return Tokenizer.from_str(json.dumps(state))


def read_right(tokenizer: Tokenizer, words: list[Form], spellings: Spellings) -> dict[str, float]:
    """Shares of words, by how common they are, all of whose tokens sound, within a sentence, as they mostly do."""
    encoded = tokenizer.encode_batch([form.text for form in words])
    cuts = [list(pieces(form, cut.tokens)) for form, cut in zip(words, encoded, strict=True)]
    sounds: dict[str, dict[Phones, float]] = defaultdict(weights)
    for form, cut in zip(words, cuts, strict=True):
        for token, phones in cut:
            sounds[token][alike(phones)] += form.weight
    mostly = {token: max(said.items(), key=itemgetter(1))[0] for token, said in sounds.items()}
    found: dict[float, list[bool]] = defaultdict(list)
    for form, cut in zip(words, cuts, strict=True):
        _, zipf, name = spellings[form.text.strip().lower()]
        if form.text[0] == " " and form.text[1].isupper() == name:
            right = all(mostly[token] == alike(phones) for token, phones in cut)
            found[max((least for least in COMMON if least <= zipf), default=0.0)].append(right)
    return {f"{least:g}": round(sum(right) / len(right), 3) for least, right in sorted(found.items())}


def first_special(folder: Path) -> int:
    """Id of the first special token of a tokenizer's folder; all below are bytes and merges."""
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return min(map(int, config["added_tokens_decoder"]))


def write_config(base: Path, out: Path, shift: int) -> None:
    """Write a tokenizer_config.json like the base's, its special tokens `shift` ids further on."""
    config = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = config["added_tokens_decoder"]
    config["added_tokens_decoder"] = {str(int(index) + shift): token for index, token in special.items()}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Train the tokenizer, and say how many tokens a word takes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--spellings", type=there, required=True)
    parser.add_argument("--base", default="embedded", help="checkpoint whose special tokens are taken over")
    parser.add_argument("--sentences", type=int, default=SENTENCES)
    options = parser.parse_args()
    on_signals(leave)
    needs.check()
    spellings = read_spellings(options.spellings)
    words, tokenizer = forms(spellings), train(sentences(options.sentences), FREQUENT)
    tokenizer = extended(tokenizer, merges(tokenizer, words, TOKENS - FREQUENT))
    if tokenizer.get_vocab_size() != TOKENS or tokenizer.encode(ROLE).tokens != [ROLE]:
        few = f"{options.sentences} sentences and {len(words)} forms of words"
        raise SystemExit(f"{few} are too few for {TOKENS} tokens; give more")
    part, base = options.out.with_suffix(".part"), find(options.base)
    part.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(part))
    write_config(base, part, TOKENS - first_special(base))
    part.rename(options.out)
    texts = [text for _, text, _ in held_out()]
    tokens, count = sum(len(e.ids) for e in tokenizer.encode_batch(texts)), sum(len(t.split()) for t in texts)
    print(f"{TOKENS} tokens, {tokens / count:.2f} a word of the held-out sentences")
    print(f"words whose tokens sound as they mostly do, by Zipf's scale: {read_right(tokenizer, words, spellings)}")


if __name__ == "__main__":
    main()
