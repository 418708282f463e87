"""Generated sentences in, the text tokenizer out: byte pairs over the pieces that Qwen2's tokenizer cuts text into.

    python -m training.tokenizer OUT [--base embedded]

OUT gets vocab.json, merges.txt and tokenizer_config.json. Ids below the base's first special token are bytes and
merges, the special tokens are the base's own with their ids. "assistant" is one token, since the prompt is cut by
position.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from pipecat_qwen3.checkpoint import find
from training import needs
from training.steps import leave, on_signals
from training.text import Texts, held_out

SENTENCES = 60_000
SEED = 1
"""Of the sentences; the shards' begin at 1,000,003."""

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


def main() -> None:
    """Train the tokenizer, and say how many tokens a word takes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", default="embedded", help="checkpoint whose special tokens are taken over")
    parser.add_argument("--sentences", type=int, default=SENTENCES)
    options = parser.parse_args()
    on_signals(leave)
    needs.check()
    config = find(options.base) / "tokenizer_config.json"
    first_special = min(map(int, json.loads(config.read_text(encoding="utf-8"))["added_tokens_decoder"]))
    tokenizer = train(sentences(options.sentences), first_special)
    if tokenizer.get_vocab_size() < first_special or tokenizer.encode(ROLE).tokens != [ROLE]:
        raise SystemExit(f"{options.sentences} sentences are too few for {first_special} tokens; give more")
    part = options.out.with_suffix(".part")
    part.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(part))
    shutil.copy(config, part)
    part.rename(options.out)
    texts = [text for _, text, _ in held_out()]
    tokens, words = sum(len(e.ids) for e in tokenizer.encode_batch(texts)), sum(len(t.split()) for t in texts)
    print(f"{first_special} tokens, {tokens / words:.2f} a word of the held-out sentences")


if __name__ == "__main__":
    main()
