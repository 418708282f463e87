"""The bots as a developer runs them: processes on loopback, talked to as Pipecat's evals and a telephone carrier do."""

import argparse
import asyncio
import socket
import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pipecat.evals.scenario import EvalScenarioFile
from pipecat.evals.script import EvalScriptScenario
from pipecat.frames.frames import (
    BotStartedSpeakingFrame,
    BotStoppedSpeakingFrame,
    EndFrame,
    Frame,
    InterruptionFrame,
    LLMContextFrame,
    LLMTextFrame,
    MetricsFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.metrics.metrics import TTFAMetricsData
from pipecat.observers.base_observer import FramePushed
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.tests.utils import run_test
from pipecat.workers.runner import WorkerRunner

from bots.latency import LatencyReport
from bots.offline import ScriptedLLMService, hear
from bots.options import BotParser, missing, taken
from bots.picker import offer
from bots.script import GREETING, QUESTIONS, everything, reply, words_of
from pipecat_qwen3.service import Qwen3TTSService
from tests.fakes import FakeBackend
from tests.talking import ROOT, Bot, talking

EVALS = ROOT / "bots" / "evals"
SCENARIOS = sorted(path for path in EVALS.glob("*.yaml") if path.stem not in ("judge", "suite"))
CAPITALS = [sentence for sentence in everything() if sentence.startswith("the capital of")]
COUNT_ENGINES = """
from pipecat_qwen3.engine import Engine
made = Engine.__init__
def count(*arguments, **named):
    print("an engine was made", flush=True)
    made(*arguments, **named)
Engine.__init__ = count
"""

# -- hello ---------------------------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_hello_says_its_sentence_into_a_file(tmp_path: Path) -> None:
    path = tmp_path / "hello.wav"
    done = run("bots.hello", "--wav", str(path))
    assert done.returncode == 0, done.stderr
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24_000, 1, 2)
        pcm = file.readframes(10**9)
    sentences = (*CAPITALS, "hello there how can i help you today")
    assert "how can i help you" in hear(pcm + bytes(24_000), 24_000, sentences)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [(("",), "there is nothing to say"), (("--wav", "/no/such/folder/hello.wav"), "cannot write /no/such/folder")],
)
def test_hello_says_what_is_wrong_in_one_line(arguments: tuple[str, ...], wanted: str) -> None:
    done = run("bots.hello", *arguments)
    assert done.returncode == 2
    assert wanted in done.stderr.splitlines()[-1]


def test_hello_without_speakers_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from bots import hello

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="--wav"):
        hello.speakers()


# -- the voice agent -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def agent() -> Iterator[Bot]:
    with Bot("voice_agent", "--voice", "slt", before=COUNT_ENGINES) as bot:
        yield bot


async def test_a_spoken_question_is_answered_aloud_and_its_time_is_told(agent: Bot) -> None:
    async with talking(agent) as talker:
        await talker.event("bot-stopped-speaking")
        await talker.speak("capital_of_germany")
        heard = await talker.until(lambda m: m["type"] == "user-transcription" and m["data"]["final"])
        assert heard["data"]["text"] == "what is the capital of germany"
        assert "Berlin" in await talker.reply("Berlin")
        assert "berlin" in talker.heard(CAPITALS).split()
        [told] = talker.told("latency")
    assert told["turn"] == 1
    names = [stage["name"] for stage in told["stages"]]
    order = ["endpointing wait", "turn detection", "speech synthesis"]
    assert [name for name in names if name in order] == order
    assert sum(stage["ms"] for stage in told["stages"]) == pytest.approx(told["total_ms"], abs=1)
    assert told["total_ms"] > 500, "half a second of silence ends a turn"
    assert any("from your last sound to the first audible sample" in line for line in agent.lines)


async def test_what_is_typed_cuts_the_bot_off_and_is_answered(agent: Bot) -> None:
    async with talking(agent) as talker:
        await talker.type("Tell me a story.")
        await talker.event("bot-started-speaking")
        await talker.type("What is the capital of France?")
        assert "Paris" in await talker.reply("Paris")
    assert talker.told("barge-in")[-1]["silence_ms"] >= 0


async def test_the_page_is_told_the_voices_and_changes_them(agent: Bot) -> None:
    async with talking(agent) as talker:
        there = await talker.server_message("voices")
        assert (set(there["voices"]), there["languages"]) == ({"rms", "slt"}, ["english"])
        assert (there["voice"], there["language"], there["model"]) == ("slt", None, "embedded")
        assert (there["stt"], there["llm"]) == ("sphinx", "scripted")
        await talker.ask("set-voice", {"voice": "rms"})
        assert (await talker.server_message("voices"))["voice"] == "rms"
        await talker.ask("set-voice", {"voice": "nobody"})
        refused = await talker.event("error-response")
        assert refused["data"]["error"] == "There is no voice nobody; choose one of: rms, slt."
        await talker.type("goodbye")
        assert "Goodbye" in await talker.reply("nice to talk")


async def test_eight_clients_talk_at_once_over_one_engine(agent: Bot) -> None:
    places = {"Germany": "Berlin", "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo"}
    asked = [*places, *list(places)[:3]]

    async def ask(country: str) -> str:
        async with talking(agent) as talker:
            await talker.type(f"What is the capital of {country}?")
            await talker.reply(places[country])
            return talker.heard(CAPITALS)

    heard = await asyncio.gather(*(ask(country) for country in asked))
    assert all(places[country].lower() in words.split() for country, words in zip(asked, heard, strict=True)), heard
    assert agent.lines.count("an engine was made") == 1


def test_the_agent_serves_the_page(agent: Bot) -> None:
    import urllib.request

    page = urllib.request.urlopen(f"http://127.0.0.1:{agent.port}/", timeout=20).read()
    assert page == (ROOT / "bots" / "web" / "built" / "index.html").read_bytes()


# -- the parts -----------------------------------------------------------------------------------------------


def test_the_script_remembers_the_place_and_knows_what_it_does_not_know() -> None:
    assert reply([], []).text == GREETING
    assert reply(["what is the capital of japan"], []).text == "The capital of Japan is Tokyo."
    assert "Rome" in reply(["and of italy", "how many people live there"], []).text
    assert "first" in reply(["how many people live there"], []).text
    assert "script" in reply(["who are you"], []).text
    assert "do not know" in reply(["what is love"], []).text


@pytest.mark.parametrize("languages", [("english",), ("english", "german")])
async def test_a_language_is_switched_to_if_the_voice_speaks_it(languages: tuple[str, ...]) -> None:
    backend = FakeBackend(languages=languages)
    pipeline = Pipeline([ScriptedLLMService(languages=languages), Qwen3TTSService(backend=backend)])
    context = LLMContext([{"role": "user", "content": "Please speak German."}])
    await run_test(pipeline, frames_to_send=[LLMContextFrame(context)], start_timeout=10)
    backend.close()
    spoken = {(request.language, str(request.text).strip()) for request in backend.requests}
    german = {("german", "Gerne."), ("german", "Ich spreche jetzt Deutsch.")}
    english = {(None, "I am sorry."), (None, "My voice speaks English only.")}
    assert spoken == (german if "german" in languages else english)


async def test_a_language_that_was_asked_for_aloud_is_told_to_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend(languages=("english", "german"))
    worker = PipelineWorker(Pipeline([ScriptedLLMService(languages=backend.languages)]))
    told: list[dict[str, Any]] = []

    async def tell(message: dict[str, Any]) -> None:
        told.append(message)

    monkeypatch.setattr(worker.rtvi, "send_server_message", tell)
    offer(worker, backend, voice="slt")
    context = LLMContext([{"role": "user", "content": "Please speak German."}])
    await worker.queue_frames([LLMContextFrame(context), EndFrame()])
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    await runner.run()
    assert [(there["voice"], there["language"]) for there in told] == [("slt", "german")]


async def test_the_script_writes_word_by_word() -> None:
    context = LLMContext([{"role": "user", "content": "who are you"}])
    down, _ = await run_test(ScriptedLLMService(), frames_to_send=[LLMContextFrame(context)], start_timeout=10)
    words = [frame.text for frame in down if isinstance(frame, LLMTextFrame)]
    assert "".join(words).strip() == reply(["who are you"], []).text
    assert len(words) == len("".join(words).split())


async def test_who_was_not_understood_is_told_so_and_not_greeted_again() -> None:
    context = LLMContext([{"role": "assistant", "content": "Hello."}])
    down, _ = await run_test(ScriptedLLMService(), frames_to_send=[LLMContextFrame(context)], start_timeout=10)
    said = "".join(frame.text for frame in down if isinstance(frame, LLMTextFrame)).strip()
    assert said == reply(["mumble"], []).text


class Clock:
    """A time that the test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_a_turn_is_told_up_to_its_first_audible_sample(capsys: pytest.CaptureFixture[str]) -> None:
    clock, told = Clock(), []
    report = LatencyReport(time_source=clock)

    async def tell(message: dict) -> None:
        told.append(message)

    report.send = tell
    speaker = FrameProcessor(name="speaker")

    async def push(frame: Frame) -> None:
        await report.on_push_frame(FramePushed(speaker, speaker, frame, FrameDirection.DOWNSTREAM, 0))
        await asyncio.sleep(0.01)  # handlers of events are tasks

    await push(VADUserStoppedSpeakingFrame(stop_secs=0.2, timestamp=100.0))
    clock.now = 100.5
    await push(BotStartedSpeakingFrame())
    assert not told, "it is not known yet when the first audible sample comes"
    await push(MetricsFrame(data=[TTFAMetricsData(processor="voice", ttfa=0.3, ttfb=0.25, leading_silence=0.05)]))
    assert told[0]["total_ms"] == pytest.approx(750)
    assert told[0]["stages"][0] == {"name": "endpointing wait", "ms": pytest.approx(200)}
    assert told[0]["stages"][-1] == {"name": "leading silence", "ms": 50.0}
    assert "turn 1: 750 ms" in capsys.readouterr().out
    clock.now = 101.0
    await push(InterruptionFrame())
    clock.now = 101.02
    await push(BotStoppedSpeakingFrame())
    assert told[1] == {"type": "barge-in", "turn": 1, "silence_ms": pytest.approx(20)}


# -- what is missing -----------------------------------------------------------------------------------------


def parse(*arguments: str) -> argparse.Namespace:
    """The options as Pipecat's runner parses them."""
    parser = BotParser("a bot", lambda args: None, {"webrtc": (), "twilio": ("A_KEY",)})
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("-t", "--transport")
    parser.add_argument("-x", "--proxy")
    return parser.parse_args(list(arguments))


def test_the_defaults_need_nothing_and_say_what_they_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    args = parse()
    assert (args.stt, args.llm) == ("sphinx", "scripted")
    assert "--stt whisper --llm ollama" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--stt", "deepgram"), "deepgram"),
        (("--llm", "openai"), "set OPENAI_API_KEY"),
        (("--llm", "ollama"), "ollama serve"),
        (("-t", "daily"), "does not speak daily; choose -t webrtc, twilio"),
        (("-t", "twilio"), "needs A_KEY: set"),
        (("--stt", "nobody"), "invalid choice"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    arguments: tuple[str, ...], wanted: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key in ("DEEPGRAM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")
    with pytest.raises(SystemExit) as end:
        parse(*arguments)
    assert end.value.code
    assert wanted in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_package_is_named_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install" in str(missing("whisper"))
    assert "faster-whisper" in str(missing("whisper"))


@pytest.mark.parametrize("bot", ["voice_agent", "remote_agent", "phone"])
def test_a_bot_without_the_packages_of_its_extra_says_what_to_install(bot: str) -> None:
    program = f"""
import importlib.util, runpy
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("fastapi", "soxr") else find(name, *rest)
runpy.run_module("bots.{bot}", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    wanted = "this bot needs packages (fastapi, soxr): run pip install 'pipecat-qwen3[bots]'\n"
    assert (done.returncode, done.stderr) == (1, wanted)


def test_a_taken_port_is_said_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        told = f"cannot listen on 127.0.0.1:{port} (Address already in use); end what runs there, or choose another"
        assert str(taken("127.0.0.1", port)).startswith(told)
    assert taken("127.0.0.1", port) is None


def test_an_address_that_is_none_is_said_in_one_line() -> None:
    assert taken("127.0.0.1", 80_000) == "there is no port 80000: choose one of 0 to 65535"
    assert "end what runs there" not in str(taken("no.such.invalid", 7860))
    if socket.has_ipv6:
        assert taken("::1", 0) is None


def test_twilio_must_know_where_to_call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("A_KEY", "set")
    with pytest.raises(SystemExit):
        parse("-t", "twilio")
    assert "-t twilio needs -x HOST" in capsys.readouterr().err
    assert parse("-t", "twilio", "-x", "example.org").proxy == "example.org"


# -- the evals -----------------------------------------------------------------------------------------------


def test_the_suite_runs_every_scenario() -> None:
    suite = (EVALS / "suite.yaml").read_text()
    assert len(SCENARIOS) == 6
    assert all(path.stem in suite for path in SCENARIOS)
    assert "make eval" in (EVALS / "README.md").read_text()


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_recordings_of_a_scenario_say_what_it_says(path: Path) -> None:
    for scenario in EvalScenarioFile.load(path).scenarios:
        assert isinstance(scenario, EvalScriptScenario)
        for turn in scenario.turns:
            if turn.audio:
                with wave.open(str(turn.audio)) as file:
                    pcm, rate = file.readframes(10**9), file.getframerate()
                assert hear(pcm + bytes(rate), rate, tuple(QUESTIONS)).split() == words_of(str(turn.user))
