"""The environment in, Ollama's address and the model to talk to out, or one line that says what to do."""

import json
import os
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

PORT = 11434


class OllamaError(Exception):
    """Ollama does not answer, or does not have the model; the message says what to run."""


def address() -> str:
    """Where Ollama is by OLLAMA_HOST, as its own programs read it: HOST, HOST:PORT or a URL. This machine if unset.

    Raises OllamaError for what is none.
    """
    given = os.getenv("OLLAMA_HOST") or "localhost"
    port = {"http": 80, "https": 443}.get(given.split("://")[0], PORT)
    try:
        there = urlsplit(given if "://" in given else f"http://{given}")
        port = there.port or port
    except ValueError as error:
        raise OllamaError(f"OLLAMA_HOST should be HOST, HOST:PORT or a URL, but is {given}: {error}") from None
    host = {"0.0.0.0": "localhost", "::": "localhost"}.get(there.hostname or "", there.hostname or "localhost")
    return f"{there.scheme}://{f'[{host}]' if ':' in host else host}:{port}/v1"


def model(wanted: str | None) -> str:
    """The wanted model, or the one that was used or pulled last. Raises OllamaError."""
    try:
        with urlopen(f"{address()}/models", timeout=5) as answer:
            there = [str(model["id"]) for model in json.load(answer)["data"] or []]
    except (URLError, OSError, ValueError, KeyError, TypeError):
        raise OllamaError(f"no Ollama answers at {address()}: run ollama serve, or set OLLAMA_HOST") from None
    if wanted in there or f"{wanted}:latest" in there:
        return str(wanted)
    if wanted or not there:
        have = f"it has {', '.join(there)}" if there else "it has none"
        raise OllamaError(f"Ollama has no model {wanted or 'yet'} ({have}): run ollama pull {wanted or 'llama3.2'}")
    return there[0]
