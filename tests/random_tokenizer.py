"""A small byte-level BPE vocabulary in the official layout: a folder and a vocabulary size go in, token ids come out.

Trained here in plain Python, so that it is the same in every version of every library.
"""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

_SPECIALS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think> <|audio_start|> <|audio_end|> <tts_pad> <tts_text_bos> "
    "<tts_text_eod> <tts_text_bos_single> <|audio_pad|>"
)
SPECIALS = _SPECIALS.split()
"""The official added tokens in their order: ids 151643 to 151675 of the published checkpoints."""

ORDINARY = set(SPECIALS[14:26])
"""Added tokens that the official tokenizer_config does not call special."""

PUBLISHED_VOCAB = 151_936
PUBLISHED_SPECIALS = 151_643
PUBLISHED_IDS = {"assistant": 77_091, "user": 872}

MERGES = 1500
CORPUS = (
    "assistant user system the quick brown fox jumps over the lazy dog hello world this is a small text to speech test "
    "she sells sea shells by the sea shore one two three four five six seven eight nine ten it's what we've been "
    "saying you're right they'll see i'd go please speak clearly and slowly with a happy voice now read that again "
    "today the weather is very good so let us go out and tell me how your day was before we start working together "
    "今天天气很好 我们一起去公园吧 你好 世界 这是一个语音合成测试 こんにちは 元気ですか 안녕하세요"
)


def write_tokenizer(folder: Path, text_vocab: int) -> dict[str, int]:
    """Write vocab.json, merges.txt and tokenizer_config.json of a Qwen2 tokenizer.

    text_vocab  rows of the text embedding; the special tokens take the last 64 of them, or their published ids
                where it is the published size
    returns     ids of the special tokens and of "assistant"
    """
    published = text_vocab >= PUBLISHED_VOCAB
    base = PUBLISHED_SPECIALS if published else text_vocab - 64
    merges = _train(MERGES)
    tokens = dict.fromkeys([*_alphabet(), *("".join(pair) for pair in merges)])  # two merges may give one token
    vocab = {token: i for i, token in enumerate(tokens)}
    if published:
        for word, wanted in PUBLISHED_IDS.items():
            vocab = _move(vocab, word, wanted)
    taken = set(vocab.values())
    vocab |= {f"<|filler_{i}|>": i for i in range(base) if i not in taken}
    added = {
        str(base + i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token not in ORDINARY,
        }
        for i, token in enumerate(SPECIALS)
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [token for token in SPECIALS[1:] if token not in ORDINARY],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131_072,
        "pad_token": "<|endoftext|>",
        "processor_class": "Qwen3TTSProcessor",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    by_id = dict(sorted(vocab.items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(by_id, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")
    return {token: base + i for i, token in enumerate(SPECIALS)} | {"assistant": vocab["assistant"]}


def _alphabet() -> list[str]:
    """The 256 bytes as printable characters, in the order of GPT-2's and Qwen2's ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def _train(count: int) -> list[tuple[str, str]]:
    """Up to `count` merges of the most frequent pair each time; of equals the first in order of characters."""
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order += [byte for byte in range(256) if byte not in order]
    symbol = dict(zip(order, _alphabet(), strict=True))
    words = Counter(CORPUS.split())
    texts = {word: n for word, n in words.items()} | {" " + word: n for word, n in words.items()} | {"\n\n": 1}
    pieces = {text: [symbol[byte] for byte in text.encode()] for text in texts}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for text, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += texts[text]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for text, parts in pieces.items():
            pieces[text] = _merge(parts, best)
    return merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def _move(vocab: dict[str, int], word: str, wanted: int) -> dict[str, int]:
    """Give `word` the id `wanted`; whoever had it gets the word's old one."""
    old = vocab[word]
    return {token: wanted if token == word else old if i == wanted else i for token, i in vocab.items()}
