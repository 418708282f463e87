"""Language models over the network, each with a stand-in that speaks its protocol on this machine."""

import argparse
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pipecat.frames.frames import ErrorFrame, LLMContextFrame, LLMTextFrame
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.tests.utils import run_test

from bots import ollama
from bots.options import PROMPT, make_llm

WORDS = ["The ", "capital ", "is ", "Paris."]
KEY = "a-key-of-the-test"


class Completions(BaseHTTPRequestHandler):
    """`/v1/models` and streaming `/v1/chat/completions`, as OpenAI and Ollama answer them."""

    models: list[str]
    asked: list[dict[str, Any]]

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _answer(self, status: int, kind: str, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        data = [{"id": name, "object": "model"} for name in self.models] or None
        self._answer(200, "application/json", json.dumps({"object": "list", "data": data}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body | {"path": self.path})
        if self.headers["Authorization"] not in (f"Bearer {KEY}", "Bearer ollama"):
            error = {"message": "Incorrect API key provided", "code": "invalid_api_key"}
            self._answer(401, "application/json", json.dumps({"error": error}))
            return
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
        deltas = [({"content": word}, None) for word in WORDS] + [({}, "stop")]
        choices = [[{"index": 0, "delta": delta, "finish_reason": end}] for delta, end in deltas]
        events = [json.dumps(chunk | {"choices": choice}) for choice in choices] + ["[DONE]"]
        self._answer(200, "text/event-stream", "".join(f"data: {event}\n\n" for event in events))


@pytest.fixture
def server() -> Iterator[type[Completions]]:
    handler = type("Handler", (Completions,), {"models": ["llama3.2:latest", "qwen3:4b"], "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        handler.address = f"127.0.0.1:{server.server_address[1]}"  # type: ignore[attr-defined]
        yield handler
        server.shutdown()


async def answer(llm: str, model: str | None) -> tuple[list[str], list[str]]:
    """The words of the reply to a question, and the errors."""
    service = make_llm(argparse.Namespace(llm=llm, llm_model=model), ("english",))
    context = LLMContext([{"role": "user", "content": "What is the capital of France?"}])
    down, up = await run_test(service, frames_to_send=[LLMContextFrame(context)], start_timeout=10)
    words = [frame.text for frame in down if isinstance(frame, LLMTextFrame)]
    return words, [frame.error for frame in up if isinstance(frame, ErrorFrame)]


async def test_openai_answers_word_by_word(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://{server.address}/v1")
    assert await answer("openai", "gpt-test") == (WORDS, [])
    [asked] = server.asked
    assert (asked["path"], asked["model"], asked["stream"]) == ("/v1/chat/completions", "gpt-test", True)
    assert [message["content"] for message in asked["messages"]] == [PROMPT, "What is the capital of France?"]


async def test_a_wrong_key_of_openai_is_an_error_that_says_so(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://{server.address}/v1")
    words, errors = await answer("openai", None)
    assert not words
    assert "Incorrect API key" in errors[0]


async def test_ollama_answers_where_its_variable_says_it_is(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", server.address)
    assert ollama.model(None) == "llama3.2:latest", "the one that was used last"
    assert ollama.model("llama3.2") == "llama3.2"
    assert await answer("ollama", "qwen3:4b") == (WORDS, [])
    assert server.asked[0]["model"] == "qwen3:4b"


def test_a_model_that_ollama_does_not_have_is_named_with_how_to_get_it(server: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("OLLAMA_HOST", f"http://{server.address}/")
    with pytest.raises(ollama.OllamaError, match=r"no model gemma \(it has llama3.2:latest, qwen3:4b\): run ollama"):
        ollama.model("gemma")
    server.models = []
    with pytest.raises(ollama.OllamaError, match=r"no model yet \(it has none\): run ollama pull llama3.2"):
        ollama.model(None)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")
    with pytest.raises(ollama.OllamaError, match=r"no Ollama answers at http://127.0.0.1:1/v1: run ollama serve"):
        ollama.model(None)


@pytest.mark.parametrize("variable", ["localhost:abc", "http://[::1", "localhost:99999"])
def test_what_is_no_address_of_ollama_is_said_to_be_none(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", variable)
    with pytest.raises(ollama.OllamaError, match=f"should be HOST, HOST:PORT or a URL, but is {re.escape(variable)}: "):
        ollama.model(None)


@pytest.mark.parametrize(
    ("variable", "address"),
    [
        ("", "http://localhost:11434/v1"),
        ("gpu.local", "http://gpu.local:11434/v1"),
        ("0.0.0.0:8000", "http://localhost:8000/v1"),
        ("https://ollama.example.org", "https://ollama.example.org:443/v1"),
        ("[::1]:11434", "http://[::1]:11434/v1"),
    ],
)
def test_ollamas_address_is_read_as_ollama_reads_it(
    variable: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", variable)
    assert ollama.address() == address
