"""Clients that others wrote, unmodified, against `pipecat-qwen3 serve` as a process with the embedded voice."""

import asyncio
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
from pipecat.frames.frames import TTSAudioRawFrame, TTSSpeakFrame, TTSStoppedFrame
from pipecat.services.openai.tts import OpenAITTSService
from pipecat.services.tts_service import TextAggregationMode

from pipecat_qwen3 import Qwen3WebsocketTTSService, RemoteBackend, Request
from pipecat_qwen3.errors import ConnectionFailedError
from pipecat_qwen3.local import LocalBackend
from tests.fakes import FakeBackend
from tests.serving import serving
from tests.test_service import Recorder, count, live, samples, speak, turn, words

ROOT = Path(__file__).parent.parent
HELLO = "Hello there."
KEY = "a-key-of-the-test"


class Process:
    """A server in a process of its own; its address is what it prints."""

    def __init__(self, *arguments: str, key: str = "") -> None:
        env = {**os.environ, "PIPECAT_QWEN3_API_KEY": key, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pipecat_qwen3", "serve", "--port", "0", "--dtype", "fp32", "--device", "cpu"]
        self.process = subprocess.Popen(
            [*command, *arguments], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        self.http = self.process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", self.http), self.process.communicate()[1]
        self.ws = self.http.replace("http", "ws") + "/v1/audio/speech/ws"
        end = time.monotonic() + 120
        while not self._ready():
            assert time.monotonic() < end
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.1)

    def _ready(self) -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.http}/ready", timeout=5).status == 200
        return False

    def end(self, sig: signal.Signals) -> tuple[int, str]:
        """Exit code and log after a signal."""
        self.process.send_signal(sig)
        log = self.process.communicate(timeout=60)[1]
        return self.process.returncode, log


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    process = Process("--max-batch", "8")
    yield process
    code, log = process.end(signal.SIGTERM)
    assert code == 0, log
    lines = [json.loads(line) for line in log.splitlines()]
    assert all(line["request_id"] for line in lines if line["logger"] == "pipecat_qwen3.access")
    assert not [line for line in lines if line["level"] == "error"]


@pytest.fixture(scope="module")
def spoken(embedded: LocalBackend) -> np.ndarray:
    """What the engine says alone."""
    return np.concatenate([chunk.pcm for chunk in embedded.speak(Request(HELLO, voice="rms", seed=7, ahead_s=None))])


def same(heard: bytes | np.ndarray, spoken: np.ndarray) -> bool:
    """Equal but for the last bit, which depends on how many frames the codec decoded at once."""
    got = np.frombuffer(heard, "<i2") if isinstance(heard, bytes) else heard
    return len(got) == len(spoken) and abs(got.astype(int) - spoken).max() <= 4


@pytest.fixture
def client(server: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.http}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_the_openai_sdk_gets_a_whole_file(client: openai.OpenAI, spoken: np.ndarray) -> None:
    answer = client.audio.speech.create(
        model="tts-1", voice="alloy", input=HELLO, response_format="wav", extra_body={"seed": 7}
    )
    with wave.open(io.BytesIO(answer.content)) as file:
        assert same(file.readframes(10**9), spoken)


def test_the_openai_sdk_streams(client: openai.OpenAI, spoken: np.ndarray) -> None:
    with client.audio.speech.with_streaming_response.create(
        model="gpt-4o-mini-tts", voice="rms", input=HELLO, response_format="pcm", extra_body={"seed": 7}
    ) as answer:
        pieces = list(answer.iter_bytes(1920))
    assert same(b"".join(pieces), spoken)


def test_the_openai_sdk_understands_our_refusals(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="speed"):
        client.audio.speech.create(model="tts-1", voice="alloy", input=HELLO, speed=2.0)
    with serving(FakeBackend, api_key=KEY) as other:
        base = f"{other.http}/v1"
        with openai.OpenAI(base_url=base, api_key="no", max_retries=0) as no, pytest.raises(openai.AuthenticationError):
            no.models.list()
        with openai.OpenAI(base_url=base, api_key=KEY, max_retries=0) as right:
            assert [model.id for model in right.models.list()] == ["fake"]
    assert [model.id for model in client.models.list()] == ["embedded"]


async def test_pipecats_openai_service_speaks_through_us(server: Process) -> None:
    service = OpenAITTSService(
        base_url=f"{server.http}/v1",
        api_key=KEY,
        settings=OpenAITTSService.Settings(voice="nova"),
        stop_frame_timeout_s=30,  # a busy machine may need more than the usual three seconds
    )
    down, errors = await speak(service, *turn(HELLO))
    await service._client.close()  # Pipecat leaves its connection open
    assert not errors
    heard = samples(down)
    assert 0.4 < len(heard) / 24000 < 3
    assert abs(heard.astype(int)).max() > 2000


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_pipes_wav_into_a_player(server: Process, spoken: np.ndarray) -> None:
    # The player is FFmpeg, which reads a pipe as ffplay would.
    player = """
import sys, av, numpy
file = av.open(sys.stdin.buffer)
sys.stdout.buffer.write(b"".join(frame.to_ndarray().tobytes() for frame in file.decode(audio=0)))
"""
    body = json.dumps({"input": HELLO, "voice": "rms", "seed": 7, "response_format": "wav"})
    curl = subprocess.Popen(
        [
            *("curl", "-sSN", f"{server.http}/v1/audio/speech"),
            *("-H", "Content-Type: application/json", "-d", body),
        ],
        stdout=subprocess.PIPE,
    )
    played = subprocess.run([sys.executable, "-c", player], stdin=curl.stdout, capture_output=True, check=True)
    assert curl.stdout
    curl.stdout.close()
    assert curl.wait() == 0
    assert same(played.stdout, spoken)


def test_the_websockets_command_line_holds_a_conversation(server: Process) -> None:
    command = [sys.executable, "-m", "websockets", server.ws]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as talk:
        assert talk.stdin
        assert talk.stdout
        talk.stdin.write(json.dumps({"type": "text", "context_id": "a", "text": HELLO, "flush": True}) + "\n")
        talk.stdin.flush()
        seen = ""
        while '"done"' not in seen:
            seen += talk.stdout.readline()
        talk.stdin.close()
    assert '"protocol": 1' in seen
    assert '"Hello"' in seen
    assert "(binary)" in seen


async def test_our_service_speaks_sentences_and_tokens(server: Process) -> None:
    for mode in (TextAggregationMode.SENTENCE, TextAggregationMode.TOKEN):
        service = Qwen3WebsocketTTSService(url=server.ws, text_aggregation_mode=mode)
        down, errors = await speak(service, *turn("Hello ", "there. How ", "are you?"))
        assert not errors
        assert words(down) == ["Hello", "there.", "How", "are", "you?"]
        assert 1 < len(samples(down)) / 24000 < 5


async def test_a_server_killed_in_the_middle_is_an_error_within_a_second_and_the_bot_recovers() -> None:
    process = Process("--max-batch", "2", key=KEY)
    remote = RemoteBackend.open(process.ws, api_key=KEY)
    stream = remote.speak(Request("A long sentence that will be cut off by somebody. " * 3))
    await anext(stream)
    service = Qwen3WebsocketTTSService(url=process.ws, api_key=KEY)
    recorder: Recorder
    async with live(service) as (worker, recorder):
        await worker.queue_frame(TTSSpeakFrame("A long sentence that will be cut off in the middle of it."))
        await recorder.until(count(TTSAudioRawFrame))
        process.end(signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(ConnectionFailedError):
            async for _ in stream:
                pass
        assert time.monotonic() - killed < 1  # a promise to bots, not a measure of speed
        await recorder.until(count(TTSStoppedFrame))
        assert service.is_usable
        again = Process("--max-batch", "2", "--port", process.ws.split(":")[2].split("/")[0], key=KEY)
        async with asyncio.timeout(20):
            while not (service._remote.ready and service.is_usable):  # noqa: ASYNC110 - the network thread's
                await asyncio.sleep(0.05)
        before = len(recorder.frames)
        await worker.queue_frame(TTSSpeakFrame(HELLO))
        await recorder.until(lambda frames: count(TTSStoppedFrame)(frames[before:]))
        assert len(samples(recorder.frames[before:])) > 10_000
    remote.close()
    assert again.end(signal.SIGTERM)[0] == 0
