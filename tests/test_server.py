"""The server over HTTP: formats, streaming, refusals, key, limits, health, metrics, draining; on loopback."""

import base64
import io
import json
import logging
import math
import socket
import threading
import time
import urllib.error
import urllib.request
import wave
from collections.abc import Iterator
from typing import Any

import av
import hypothesis
import numpy as np
import pytest
import schemathesis
from prometheus_client.parser import text_string_to_metric_families

from pipecat_qwen3.audio_formats import FORMATS, MIME, encoder
from pipecat_qwen3.backend import PROFILES, SAMPLE_RATE, Chunk, Load, Request
from pipecat_qwen3.errors import EngineError, OverloadedError
from pipecat_qwen3.metrics import Metrics
from pipecat_qwen3.protocol import Text, parse
from pipecat_qwen3.server_log import JsonLines, request_id
from pipecat_qwen3.server_run import listen
from pipecat_qwen3.server_speaker import Limits, Speaker
from tests.fakes import FakeBackend
from tests.serving import Served, serving

HELLO = "Hello there, friend."


@pytest.fixture
def fake() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def server(fake: FakeBackend) -> Iterator[Served]:
    with serving(lambda: fake) as served:
        yield served


class Answer:
    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


def call(url: str, body: Any = None, **headers: str) -> Answer:
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return Answer(answer.status, answer.headers, answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers, error.read())


def speech(server: Served, **body: Any) -> Answer:
    return call(f"{server.http}/v1/audio/speech", {"input": HELLO, "response_format": "pcm", **body})


def decoded(data: bytes) -> tuple[int, np.ndarray]:
    """Rate and samples of an audio file, as FFmpeg reads it."""
    with av.open(io.BytesIO(data), "r") as file:
        stream = file.streams.audio[0]
        frames = [frame for frame in file.decode(stream)]
        mono = np.concatenate([frame.to_ndarray().reshape(-1).astype(np.float64) for frame in frames])
        integer = frames[0].format.name.startswith("s16")
        return frames[0].sample_rate, mono / 32768 if integer else mono


def until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- speech ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_the_speech(fake: FakeBackend, server: Served, name: str) -> None:
    answer = speech(server, response_format=name)
    assert (answer.status, answer.headers["content-type"]) == (200, MIME[name])
    spoken = fake.speech(HELLO)
    if name == "pcm":
        assert np.array_equal(np.frombuffer(answer.body, np.int16), spoken)
        return
    rate, heard = decoded(answer.body)
    assert abs(len(heard) / rate - len(spoken) / SAMPLE_RATE) < 0.12  # lossy codecs pad to whole frames
    middle = heard[len(heard) // 4 : len(heard) // 2]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert spectrum.argmax() * rate / len(middle) == pytest.approx(220, abs=rate / len(middle))
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(8000 / 32768 / math.sqrt(2), rel=0.1)
    if name in ("wav", "flac"):
        assert np.array_equal(np.round(heard * 32768).astype(np.int16), spoken)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_streams(name: str) -> None:
    tone = (8000 * np.sin(2 * np.pi * 440 / SAMPLE_RATE * np.arange(SAMPLE_RATE))).astype(np.int16)
    encoding = encoder(name)  # type: ignore[arg-type]
    sizes = [len(encoding.encode(tone[i : i + 1920])) for i in range(0, len(tone), 1920)]
    first = next(i for i, size in enumerate(sizes) if size)
    assert first <= 2  # 240 ms at most are held back
    assert sum(sizes) > 0.8 * (sum(sizes) + len(encoding.finish()))


def test_a_wav_can_be_read_by_the_standard_library(server: Served) -> None:
    with wave.open(io.BytesIO(speech(server, response_format="wav").body)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, SAMPLE_RATE)


def test_without_a_format_it_is_mp3_as_at_openai(server: Served) -> None:
    answer = call(f"{server.http}/v1/audio/speech", {"input": HELLO, "model": "tts-1", "voice": "alloy"})
    assert answer.headers["content-type"] == "audio/mpeg"


def test_audio_leaves_as_it_is_made(fake: FakeBackend, server: Served) -> None:
    fake.pace = 0.5
    request = urllib.request.Request(
        f"{server.http}/v1/audio/speech",
        json.dumps({"input": HELLO, "response_format": "pcm"}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.read(3840)
        assert fake.streams[0].result is None  # the rest is not made yet
        assert answer.read()


def test_events_carry_the_audio_and_its_end(fake: FakeBackend, server: Served) -> None:
    answer = speech(server, stream_format="sse")
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line.removeprefix("data: ")) for line in answer.body.decode().split("\n\n") if line]
    assert [event["type"] for event in events[-2:]] == ["speech.audio.delta", "speech.audio.done"]
    audio = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    assert np.array_equal(np.frombuffer(audio, np.int16), fake.speech(HELLO))
    assert events[-1]["usage"]["input_tokens"] == len(HELLO)


def test_what_only_we_have_reaches_the_backend(fake: FakeBackend, server: Served) -> None:
    ours = {
        "voice": "slt", "language": "english", "instruct": "softly", "seed": 7, "greedy": True, "temperature": 0.5,
        "top_k": 3, "top_p": 0.5, "repetition_penalty": 1.5, "predictor_temperature": 0.75, "predictor_top_k": 4,
        "predictor_top_p": 0.25, "max_frames": 3, "layout": "streaming", "skip_silence": True, "ramp": [2, 3],
    }  # fmt: skip
    assert speech(server, **ours).status == 200
    assert fake.requests == [Request(HELLO, **{**ours, "ramp": (2, 3)}, ahead_s=None)]


@pytest.mark.parametrize(
    ("body", "field", "value"),
    [
        ({"instructions": "softly"}, "instruct", "softly"),
        ({"non_streaming_mode": False, "stream": True}, "layout", "streaming"),
        ({"voice": "alloy"}, "voice", "rms"),
        ({"voice": "ash"}, "voice", "slt"),
        ({"voice": {"id": "slt"}}, "voice", "slt"),
        ({"model": "fake", "speed": 1.0}, "voice", None),
    ],
)
def test_what_other_clients_call_it_is_understood(fake: FakeBackend, server: Served, body, field, value) -> None:
    assert speech(server, **body).status == 200
    assert getattr(fake.requests[0], field) == value


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"speed": 1.5}, "speed 1.0 only"),
        ({"input": ""}, "input"),
        ({"input": "   "}, "empty"),
        ({"input": "x" * 5000}, "4096"),
        ({"input": 7}, "string"),
        ({"voice": "nobody"}, "nobody"),
        ({"voice": {}}, "voice"),
        ({"model": "gpt-9"}, "gpt-9"),
        ({"response_format": "midi"}, "mp3"),
        ({"nonsense": 1}, "no field 'nonsense'"),
        ({"instruct": "a", "instructions": "b"}, "two different"),
        ({"instruct": "x" * 5000}, "4096"),
        ({"seed": -1}, "seed"),
        ({"seed": "7"}, "integer"),
    ],
)
def test_what_cannot_be_spoken_is_refused_in_openais_shape(fake: FakeBackend, server: Served, body, says) -> None:
    answer = speech(server, **body)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert says in answer.error["message"]
    assert "\n" not in answer.error["message"]
    assert not [stream for stream in fake.streams if stream.result is None]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 5000, b'{"input":NaN}'])
def test_a_body_that_is_no_request_is_refused(server: Served, body: bytes) -> None:
    assert call(f"{server.http}/v1/audio/speech", body).status == 400


@pytest.mark.parametrize(("failure", "status"), [(OverloadedError("full"), 429), (EngineError("it broke"), 503)])
def test_failures_before_the_first_sample_have_a_status(fake: FakeBackend, server: Served, failure, status) -> None:
    fake.fail = failure
    answer = speech(server)
    assert (answer.status, answer.error["message"], answer.headers["retry-after"]) == (status, str(failure), "1")


def test_a_failure_in_the_middle_leaves_the_answer_without_its_end(fake: FakeBackend, server: Served) -> None:
    fake.fail, fake.fail_after = EngineError("it broke"), 3
    with pytest.raises(Exception, match="IncompleteRead"):
        speech(server)


# -- key, limits, slow and vanishing readers ---------------------------------------------------------------------


def test_with_a_key_only_health_is_open() -> None:
    with serving(FakeBackend, api_key="s3cret") as server:
        for path in ("/v1/models", "/v1/voices", "/metrics", "/openapi.json", "/v1/audio/speech"):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
                answer = call(server.http + path, **headers)
                assert (answer.status, answer.error["code"]) == (401, "unauthorized")
        assert call(f"{server.http}/v1/models", authorization="Bearer s3cret").status == 200
        assert call(f"{server.http}/health").status == call(f"{server.http}/ready").status == 200


def test_health_says_so_when_the_backend_has_failed(fake: FakeBackend) -> None:
    with serving(lambda: fake) as server:
        assert call(f"{server.http}/health").status == 200
        fake.ready = False
        for path in ("/health", "/ready"):
            answer = call(server.http + path)
            assert (answer.status, json.loads(answer.body)) == (503, {"status": "failed"})


def test_a_body_over_the_limit_is_refused_with_and_without_a_length(fake: FakeBackend) -> None:
    with serving(lambda: fake, limits=Limits(body=1000)) as server:
        assert call(f"{server.http}/v1/audio/speech", b" " * 1001).status == 413
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(
                b"POST /v1/audio/speech HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"transfer-encoding: chunked\r\n\r\n" + b"400\r\n" + b" " * 1024 + b"\r\n"
            )
            assert b" 413 " in raw.recv(1000)


def test_connections_over_the_limit_are_refused_and_health_still_answers(fake: FakeBackend) -> None:
    fake.pace = math.inf
    with serving(lambda: fake, limits=Limits(connections=2)) as server:
        body = json.dumps({"input": HELLO}).encode()
        head = "POST /v1/audio/speech HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        for raw in held:
            raw.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: server.speaker.open_voices == 2)
        assert call(f"{server.http}/v1/models").status == 429
        assert call(f"{server.http}/health").status == 200
        for raw in held:
            raw.close()
        until(lambda: not server.speaker.open_voices)
        assert len(fake.cancelled) == 2
        until(lambda: call(f"{server.http}/v1/models").status == 200)


def test_one_address_may_not_take_all_connections(fake: FakeBackend) -> None:
    fake.pace = math.inf
    with serving(lambda: fake, limits=Limits(per_client=1)) as server:
        body = json.dumps({"input": HELLO}).encode()
        head = f"POST /v1/audio/speech HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body)
            until(lambda: server.speaker.open_voices == 1)
            answer = speech(server)
            assert (answer.status, answer.error["code"]) == (429, "overloaded")
            assert "of this address" in answer.error["message"]
            server.speaker.close()  # in the middle of the wait for a first sample
            assert b" 503 " in raw.recv(1000)


def test_a_reader_that_stops_reading_loses_its_voice(fake: FakeBackend) -> None:
    fake.seconds_per_char = 30.0  # ten minutes of audio: more than all buffers on the way hold
    with serving(lambda: fake, limits=Limits(write_s=0.5)) as server:
        body = json.dumps({"input": HELLO, "response_format": "pcm"}).encode()
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect(("127.0.0.1", server.port))
            raw.sendall(
                f"POST /v1/audio/speech HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\n\r\n".encode()
                + body
            )
            raw.recv(100)
            until(lambda: server.speaker.open_voices == 1)
            until(lambda: server.speaker.open_voices == 0)
        assert speech(server, max_frames=2).status == 200


# -- the rest of the API -----------------------------------------------------------------------------------------


def test_models_and_voices_are_those_of_the_backend(server: Served) -> None:
    models = json.loads(call(f"{server.http}/v1/models").body)
    assert [model["id"] for model in models["data"]] == ["fake"]
    assert json.loads(call(f"{server.http}/v1/models/fake").body)["id"] == "fake"
    assert call(f"{server.http}/v1/models/other").status == 404
    voices = json.loads(call(f"{server.http}/v1/voices").body)
    assert (voices["voices"], voices["languages"]) == (["rms", "slt"], ["english"])
    assert len(voices["aliases"]) == 13
    assert set(voices["aliases"].values()) == {"rms", "slt"}


def test_a_voice_of_ours_that_is_called_like_one_of_openais_is_ours() -> None:
    speaker = Speaker(lambda: FakeBackend(voices=("echo", "rms")))
    speaker.start()
    until(lambda: speaker.ready)
    assert speaker.voice_name("Echo") == "Echo"
    assert speaker.voice_name("alloy") == "echo"
    assert speaker.voice_name("nobody") == "nobody"  # the backend says what it thinks of that
    speaker.close()


def test_a_profile_decides_what_the_client_leaves_open(fake: FakeBackend, server: Served) -> None:
    speech(server)
    assert (fake.requests[0].ramp, fake.requests[0].ahead_s) == ((1, 1, 2, 4, 8), None)  # HTTP has no playback
    speaker = Speaker(lambda: fake, profile=PROFILES["throughput"])
    speaker.start()
    until(lambda: speaker.ready)
    said = parse('{"type":"text","context_id":"a","text":"x"}')
    assert isinstance(said, Text)
    asked = speaker.request("x", said.settings())
    assert (asked.ramp, asked.ahead_s) == ((4, 8, 16), 30.0)
    said = parse('{"type":"text","context_id":"a","text":"x","ramp":[2],"ahead_s":null}')
    assert isinstance(said, Text)
    asked = speaker.request("x", said.settings())
    assert (asked.ramp, asked.ahead_s) == ((2,), None)


def test_it_is_ready_only_when_warm_and_says_so_until_then() -> None:
    loaded = threading.Event()
    fake = FakeBackend()
    speaker = Speaker(lambda: loaded.wait(20) and fake)  # type: ignore[arg-type, return-value]
    speaker.start()
    assert not speaker.ready
    with pytest.raises(EngineError, match="loading"):
        speaker.speak(Request(HELLO))
    loaded.set()
    until(lambda: speaker.ready)
    speaker.close()
    assert not fake.ready


def test_the_openapi_document_describes_the_request(server: Served) -> None:
    document = json.loads(call(f"{server.http}/openapi.json").body)
    fields = document["components"]["schemas"]["SpeechRequest"]["properties"]
    assert {"input", "voice", "seed", "instruct", "response_format", "stream_format"} <= fields.keys()
    assert call(f"{server.http}/docs").status == 200


def test_metrics_count_what_happened(fake: FakeBackend, server: Served) -> None:
    speech(server)
    fake.end = "runaway"
    speech(server)
    speech(server, voice="nobody")
    text = call(f"{server.http}/metrics").body.decode()
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["pipecat_qwen3_utterances_total", "eos"] == 1
    assert found["pipecat_qwen3_utterances_total", "runaway"] == 1
    assert found["pipecat_qwen3_utterances_total", "error"] == 1
    assert found["pipecat_qwen3_errors_total", "unknown_name"] == 1
    assert found["pipecat_qwen3_first_audible_seconds_count",] == 2
    assert found["pipecat_qwen3_rtf_count",] == 2
    assert found["pipecat_qwen3_voices_speaking",] == found["pipecat_qwen3_voices_waiting",] == 0
    assert found["pipecat_qwen3_ready",] == 1
    audio = 2 * len(fake.speech(HELLO)) / SAMPLE_RATE
    assert found["pipecat_qwen3_audio_seconds_total",] == pytest.approx(audio)


def test_metrics_show_the_slots_and_the_queue_of_an_engine(fake: FakeBackend, server: Served) -> None:
    def seen() -> list[float | None]:
        registry = server.speaker.metrics.registry
        return [registry.get_sample_value(f"pipecat_qwen3_{name}") for name in ("slots", "slots_used", "queue")]

    assert seen() == [0, 0, 0]  # a backend that does not say
    fake.load = Load(8, 5, 3)  # type: ignore[attr-defined]
    assert seen() == [8, 5, 3]


def test_a_player_without_buffer_runs_dry_when_a_chunk_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr("pipecat_qwen3.metrics.time.monotonic", lambda: now[0])
    metrics = Metrics()
    watch = metrics.watch()
    silence, tone = np.zeros(2400, np.int16), np.full(2400, 8000, np.int16)
    for at, pcm in ((10.1, silence), (10.15, silence), (10.45, tone)):  # the third is 150 ms late
        now[0] = at
        watch.sent(Chunk(pcm, 0))
    assert metrics.registry.get_sample_value("pipecat_qwen3_underruns_total") == 1
    assert metrics.registry.get_sample_value("pipecat_qwen3_stalled_seconds_total") == pytest.approx(0.15)
    assert metrics.registry.get_sample_value("pipecat_qwen3_first_byte_seconds_sum") == pytest.approx(0.1)
    assert metrics.registry.get_sample_value("pipecat_qwen3_first_audible_seconds_sum") == pytest.approx(0.45)


def test_every_answer_and_every_line_of_log_has_the_id_of_its_request(server: Served) -> None:
    assert call(f"{server.http}/v1/models", **{"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = call(f"{server.http}/v1/models", **{"x-request-id": "not ours\t"}).headers["x-request-id"]
    assert len(made) == 32
    token = request_id.set("mine-2")
    record = logging.makeLogRecord({"name": "x", "levelname": "INFO", "msg": "said %s", "args": ("it",), "code": 7})
    line = json.loads(JsonLines().format(record))
    request_id.reset(token)
    assert (line["message"], line["request_id"], line["code"], line["level"]) == ("said it", "mine-2", 7, "info")


def test_while_it_drains_voices_finish_and_new_ones_are_sent_away(fake: FakeBackend, server: Served) -> None:
    fake.pace = 0.5
    got: list[Answer] = []
    thread = threading.Thread(target=lambda: got.append(speech(server)))
    thread.start()
    until(lambda: server.speaker.open_voices == 1)
    server.server.handle_exit(15, None)
    until(lambda: server.speaker.draining)
    assert call(f"{server.http}/ready").status == 503
    assert speech(server).status == 429
    thread.join()
    assert np.array_equal(np.frombuffer(got[0].body, np.int16), fake.speech(HELLO))
    until(lambda: not fake.ready)  # the backend was closed behind the last voice


def test_a_port_that_is_taken_is_one_line(server: Served) -> None:
    with pytest.raises(Exception, match=f"cannot listen on 127.0.0.1:{server.port} .*--port"):
        listen("127.0.0.1", server.port, 1)


# -- fuzz --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requests", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_requests_made_from_the_openapi_document_never_break_the_server(requests: int) -> None:
    fake = FakeBackend(seconds_per_char=0.005)
    sent = 0
    with serving(lambda: fake) as server:
        schema: Any = schemathesis.openapi.from_url(f"{server.http}/openapi.json")

        def check(case: schemathesis.Case) -> None:
            nonlocal sent
            sent += 1
            answer = case.call(timeout=30)
            assert answer.status_code < 500, case.as_curl_command()
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"]

        # Most operations have nothing to vary: hypothesis stops there by itself.
        while sent < requests:
            for found in schema.get_all_operations():
                fuzzed = hypothesis.given(case=found.ok().as_strategy())(check)
                slow = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much]
                options = hypothesis.settings(
                    max_examples=requests // 4, deadline=None, database=None, suppress_health_check=slow
                )
                options(fuzzed)()
        until(lambda: not server.speaker.open_voices)
        assert np.array_equal(np.frombuffer(speech(server).body, np.int16), fake.speech(HELLO))
