"""Text and a voice name in, flite's recording with its phones and words in time out; also flite's lexicon.

Drives the Debian packages `libflite1` (or any flite 2.x with shared libraries) through ctypes. The alignment comes
from the synthesiser itself, so it is exact: each segment's end time and the text token that it belongs to.
"""

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int, c_short, c_void_p
from functools import cache
from typing import Any, NamedTuple

import numpy as np

RATE = 16_000
"""Samples a second of flite's voices."""

STRETCH = {"slt": 1.1, "rms": 1.0}
"""The voices, with their durations' stretch: slt speaks a little slower, the recogniser then hears her better."""

VOICES = tuple(STRETCH)
"""Voice 0 and voice 1 of the shards."""

_PHONES = "pau aa ae ah ao aw ax ay b ch d dh eh er ey f g hh ih iy jh k l m n ng ow oy p r s sh t th uh uw v w y z zh"
PHONES = tuple(_PHONES.split())
"""flite's US English phones; "pau" (a pause) is 0."""


class Phone(NamedTuple):
    """One segment: flite's phone name, its end in seconds, the index of its whitespace-separated word or -1."""

    name: str
    end: float
    word: int


class Recording(NamedTuple):
    """What flite said: int16 samples at 16 kHz, the phones, and how many words it saw."""

    samples: np.ndarray
    phones: list[Phone]
    words: int


class _Wave(ctypes.Structure):
    _fields_ = [
        ("type", c_char_p),
        ("rate", c_int),
        ("count", c_int),
        ("channels", c_int),
        ("samples", POINTER(c_short)),
    ]


@cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    flite = ctypes.CDLL("libflite.so.1", mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL("libflite_usenglish.so.1", mode=ctypes.RTLD_GLOBAL)
    lexicon = ctypes.CDLL("libflite_cmulex.so.1", mode=ctypes.RTLD_GLOBAL)
    flite.flite_init()
    return flite, lexicon


@cache
def _function(name: str, result: type | None, *arguments: type) -> Any:
    function = _libraries()[0][name]
    function.restype, function.argtypes = result, list(arguments)
    return function


@cache
def _voice(name: str) -> int:
    """Address of a registered voice whose stretch is set."""
    _libraries()
    register = ctypes.CDLL(f"libflite_cmu_us_{name}.so.1")[f"register_cmu_us_{name}"]
    register.restype, register.argtypes = c_void_p, [c_void_p]
    voice = register(None)
    features = ctypes.cast(voice, POINTER(c_void_p))[1]  # the second member of struct cst_voice
    _function("feat_set_float", None, c_void_p, c_char_p, c_float)(features, b"duration_stretch", STRETCH[name])
    return voice


def _items(utterance: int, relation: bytes) -> list[int]:
    head = _function("utt_relation", c_void_p, c_void_p, c_char_p)(utterance, relation)
    item, found = _function("relation_head", c_void_p, c_void_p)(head), []
    while item:
        found.append(item)
        item = _function("item_next", c_void_p, c_void_p)(item)
    return found


def _contents(item: int) -> int | None:
    """What an item shares with itself in other relations: the first pointer of struct cst_item."""
    return ctypes.cast(item, POINTER(c_void_p))[0]


def record(text: str, voice: str) -> Recording:
    """Let flite say an ASCII text."""
    utterance = _function("flite_synth_text", c_void_p, c_char_p, c_void_p)(text.encode("ascii"), _voice(voice))
    wave = _function("utt_wave", POINTER(_Wave), c_void_p)(utterance).contents
    samples = np.ctypeslib.as_array(wave.samples, shape=(wave.count,)).copy()
    tokens = {_contents(item): index for index, item in enumerate(_items(utterance, b"Token"))}
    token_of = _function("path_to_item", c_void_p, c_void_p, c_char_p)
    name = _function("item_feat_string", c_char_p, c_void_p, c_char_p)
    end = _function("item_feat_float", c_float, c_void_p, c_char_p)
    phones = []
    for segment in _items(utterance, b"Segment"):
        token = token_of(segment, b"R:SylStructure.parent.parent.R:Token.parent")
        word = tokens.get(_contents(token), -1) if token else -1
        phones.append(Phone(name(segment, b"name").decode(), end(segment, b"end"), word))
    _function("delete_utterance", None, c_void_p)(utterance)
    return Recording(samples, phones, len(tokens))


@cache
def _lexicon() -> int:
    initialise = _libraries()[1].cmu_lex_init
    initialise.restype = c_void_p
    return initialise()


def pronounce(word: str) -> list[str]:
    """Phones of a lower-case ASCII word by flite's lexicon or letter-to-sound rules; vowels carry a stress digit."""
    look = _function("lex_lookup", c_void_p, c_void_p, c_char_p, c_char_p, c_void_p)
    car, cdr = (_function(n, c_void_p, c_void_p) for n in ("val_car", "val_cdr"))
    string = _function("val_string", c_char_p, c_void_p)
    value, phones = look(_lexicon(), word.encode("ascii"), None, None), []
    while value:
        phones.append(string(car(value)).decode())
        value = cdr(value)
    return phones
