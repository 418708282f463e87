"""The command line: `say` over the embedded voice, over a FakeBackend and at a terminal; bad input; doctor, voices."""

import asyncio
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipecat.audio.utils import detect_speech_onset

from pipecat_qwen3 import cli_say
from pipecat_qwen3.__main__ import main
from pipecat_qwen3.backend import FRAME_SAMPLES, SAMPLE_RATE, Request, Result
from pipecat_qwen3.checkpoint import Checkpoint
from pipecat_qwen3.cli_audio import Player, WavFile, find_player
from pipecat_qwen3.cli_recorder import Recorder, Spoken
from pipecat_qwen3.cli_speech import Listener, speak
from pipecat_qwen3.errors import BadRequestError, EngineError
from pipecat_qwen3.local import LocalBackend
from tests.fakes import FakeBackend

ROOT = Path(__file__).parent.parent
HELLO = "Hello there."
LONG = "The first sentence is here. Here comes the second one. The third is short. And the fourth is the last."
EMBEDDED = ROOT / "pipecat_qwen3" / "embedded"
FIELDS = {
    *("frames", "audio_s", "wall_s", "rtf", "first_byte_ms", "first_audible_ms", "seed", "backend", "model", "end"),
    *("device", "dtype", "voice", "layout", "out", "load_s"),
}


def samples(path: Path) -> np.ndarray:
    """int16 [n] of a WAV whose header is read byte by byte, as a player would."""
    data = path.read_bytes()
    assert (data[:4], data[8:12], data[12:16], data[36:40]) == (b"RIFF", b"WAVE", b"fmt ", b"data")
    assert struct.unpack("<IHHIIHH", data[16:36]) == (16, 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
    assert struct.unpack("<I", data[4:8]) == (len(data) - 8,)
    assert struct.unpack("<I", data[40:44]) == (len(data) - 44,)
    return np.frombuffer(data[44:], np.int16)


class Borrowed:
    """The session's backend, which `say` may not close."""

    def __init__(self, backend: LocalBackend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def close(self) -> None:
        pass


Say = Callable[..., dict[str, Any]]


@pytest.fixture
def say(
    embedded: LocalBackend, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Say:
    """say(TEXT, OPTION, …) in this process, with the embedded voice in fp32; the JSON it prints."""
    monkeypatch.setattr(cli_say, "open_backend", lambda args, progress: Borrowed(embedded))
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> dict[str, Any]:
        code = main(["say", "--json", *args])
        out, err = capsys.readouterr()
        assert code == 0, err
        assert out.count("\n") == 1
        return json.loads(out)

    return run


# -- with the embedded voice ---------------------------------------------------------------------------------------


def test_say_writes_a_wav_as_long_as_its_frames_and_tells_all_it_measured(say: Say) -> None:
    facts = say(HELLO, "-o", "hello.wav", "--seed", "3")
    assert set(facts) == FIELDS
    audio = samples(Path("hello.wav"))
    assert len(audio) == facts["frames"] * FRAME_SAMPLES == round(facts["audio_s"] * SAMPLE_RATE)
    assert (facts["end"], facts["seed"], facts["voice"], facts["layout"]) == ("eos", 3, "rms", "whole")
    assert (facts["model"], facts["backend"], facts["device"], facts["dtype"]) == ("embedded", "numba", "cpu", "fp32")
    assert facts["out"] == "hello.wav"
    assert 0 < facts["first_byte_ms"] <= facts["first_audible_ms"]
    assert facts["first_byte_ms"] <= 1000 * facts["wall_s"]
    assert facts["rtf"] == pytest.approx(facts["wall_s"] / facts["audio_s"], rel=0.01)
    onset = detect_speech_onset(audio.tobytes(), SAMPLE_RATE)
    assert onset is not None
    assert facts["first_audible_ms"] - facts["first_byte_ms"] >= 1000 * onset / SAMPLE_RATE - 0.1


def test_the_codes_are_those_of_the_wav(say: Say) -> None:
    facts = say(HELLO, "-o", "a.wav", "--codes", "a.npy")
    codes = np.load("a.npy")
    assert codes.shape == (facts["frames"], 8)
    assert np.issubdtype(codes.dtype, np.integer)
    decoder = Checkpoint.open("embedded").load_codec()
    with torch.inference_mode():
        whole = decoder(torch.from_numpy(codes.T.astype(np.int64))[None])[0].numpy()
    assert np.abs(whole * 32767 - samples(Path("a.wav"))).max() < 4


@pytest.mark.parametrize(("option", "layout"), [((), "whole"), (("--stream-text",), "streaming")])
def test_the_pipeline_speaks_what_the_backend_speaks(
    say: Say, embedded: LocalBackend, option: tuple[str, ...], layout: Any
) -> None:
    facts = say(HELLO, *option, "--seed", "11", "--voice", "SLT", "--language", "English", "--codes", "a.npy")
    request = Request(HELLO, voice="slt", language="english", layout=layout, seed=11, ahead_s=None)
    direct = embedded.speak(request).wait(60)
    assert (facts["layout"], facts["voice"], facts["end"]) == (layout, "slt", direct.end)
    np.testing.assert_array_equal(np.load("a.npy"), direct.codes)


def test_a_seed_says_the_same_again_and_another_one_does_not(say: Say) -> None:
    for out, seed in (("a.wav", 5), ("b.wav", 5), ("c.wav", 6)):
        say(HELLO, "-o", out, "--seed", str(seed))
    a, b, c = (Path(name).read_bytes() for name in ("a.wav", "b.wav", "c.wav"))
    assert a == b
    assert a != c


def test_without_a_seed_one_is_drawn_and_told(say: Say) -> None:
    first = say("Yes.", "-o", "a.wav")
    assert first["seed"] != say("Yes.", "-o", "b.wav")["seed"]
    say("Yes.", "-o", "c.wav", "--seed", str(first["seed"]))
    assert Path("a.wav").read_bytes() == Path("c.wav").read_bytes()


def test_greedy_speech_needs_no_seed(say: Say) -> None:
    for out, seed in (("a.wav", "1"), ("b.wav", "2")):
        say("Yes.", "-o", out, "--greedy", "--seed", seed)
    assert Path("a.wav").read_bytes() == Path("b.wav").read_bytes()


def test_max_frames_is_a_cap(say: Say) -> None:
    facts = say(HELLO, "--max-frames", "3", "-o", "a.wav")
    assert (facts["frames"], facts["end"]) == (3, "cap")
    assert len(samples(Path("a.wav"))) == 3 * FRAME_SAMPLES


def test_a_long_text_is_spoken_sentence_by_sentence_with_one_seed(say: Say, embedded: LocalBackend) -> None:
    facts = say(LONG, "--seed", "2", "--max-frames", "8", "-o", "a.wav", "--codes", "a.npy")
    sentences = [f"{part.strip()}." for part in LONG.split(".") if part]
    requests = [Request(s, layout="whole", seed=2, max_frames=8, ahead_s=None) for s in sentences]
    results = [embedded.speak(request).wait(60) for request in requests]
    codes = [result.codes for result in results if result.codes is not None]
    np.testing.assert_array_equal(np.load("a.npy"), np.concatenate(codes))
    assert len(samples(Path("a.wav"))) == facts["frames"] * FRAME_SAMPLES == 4 * 8 * FRAME_SAMPLES
    assert (facts["end"], facts["seed"]) == ("cap", 2)


def test_a_text_comes_from_a_file(say: Say) -> None:
    Path("text.txt").write_text(f"{HELLO}\n", encoding="utf-8")
    say("@text.txt", "--seed", "1", "-o", "a.wav")
    say(HELLO, "--seed", "1", "-o", "b.wav")
    assert Path("a.wav").read_bytes() == Path("b.wav").read_bytes()


def test_for_a_person_the_report_names_file_times_and_end(
    say: Say, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["say", "Yes.", "-o", "a.wav", "--seed", "9"]) == 0
    out, err = capsys.readouterr()
    assert re.match(r"a\.wav: \d+\.\d\d s, \d+ frames, end eos\n", out)
    for part in ("first byte", "first audible sample", "real-time factor", "rms", "seed 9", "loaded in"):
        assert part in out
    assert err == ""


# -- over a FakeBackend --------------------------------------------------------------------------------------------


class Heard:
    """An Output that keeps what it is given."""

    def __init__(self) -> None:
        self.pcm = b""
        self.stopped = False

    def write(self, pcm: bytes) -> None:
        self.pcm += pcm

    def close(self) -> None:
        pass

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def fake() -> Iterator[Callable[..., FakeBackend]]:
    made: list[FakeBackend] = []

    def make(**options: Any) -> FakeBackend:
        made.append(FakeBackend(**options))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


def test_every_option_reaches_the_request(fake: Callable[..., FakeBackend]) -> None:
    backend = fake()
    asked = Request(
        HELLO,
        voice="slt",
        language="english",
        instruct="calmly",
        layout="whole",
        seed=4,
        greedy=True,
        temperature=0.5,
        top_k=3,
        top_p=0.7,
        repetition_penalty=1.1,
        max_frames=20,
        ahead_s=None,
    )
    heard = Heard()
    spoken = asyncio.run(speak(backend, asked, heard))
    assert backend.requests == [asked]
    assert heard.pcm == backend.speech(HELLO)[: 20 * FRAME_SAMPLES].tobytes()
    assert (spoken.samples, spoken.end) == (len(heard.pcm) // 2, "eos")


@pytest.mark.parametrize(
    ("text", "utterances"),
    [
        ("One. Two! Three?", 1),
        ("Version 3.11.7 is out.", 1),
        ("word " * 39 + "end", 1),
        ("One. Two. Three. Four.", 4),
        (("word " * 25 + "end. ") * 2, 2),
        ("一。二。三。四。五。", 5),
        ("One. Two. Three. ... Five.", 4),
    ],
)
def test_a_short_text_is_one_utterance_and_a_long_one_is_cut_into_sentences(
    fake: Callable[..., FakeBackend], text: str, utterances: int
) -> None:
    backend = fake()
    heard = Heard()
    language = "chinese" if "。" in text else None
    backend.languages = (*backend.languages, "chinese")
    asyncio.run(speak(backend, Request(text, seed=4, language=language, layout="whole", ahead_s=None), heard))
    texts = [str(request.text) for request in backend.requests]
    spoken = "".join("".join(texts).split())
    assert spoken.replace("...", "") == "".join(text.split()).replace("...", "")
    assert len(texts) == utterances
    assert {request.seed for request in backend.requests} == {4}


def test_the_end_of_many_sentences_is_the_worst_of_theirs() -> None:
    results = [Result(end, 1, 0) for end in ("eos", "runaway", "cap", "eos")]
    assert Spoken(results).end == "runaway"
    assert Spoken(results[:1] + results[2:]).end == "cap"
    assert Spoken(results[:1]).end == "eos"


def test_stream_text_feeds_the_text_word_by_word(fake: Callable[..., FakeBackend]) -> None:
    backend = fake()
    heard = Heard()
    asyncio.run(speak(backend, Request(HELLO, layout="streaming", ahead_s=None), heard))
    assert not isinstance(backend.requests[0].text, str)
    assert heard.pcm == backend.speech(HELLO).tobytes()


def test_a_failure_in_the_middle_keeps_what_was_spoken(fake: Callable[..., FakeBackend], tmp_path: Path) -> None:
    backend = fake(fail=EngineError("the engine fell over"), fail_after=3)
    wav = WavFile(tmp_path / "a.wav")
    with pytest.raises(EngineError, match="the engine fell over"):
        asyncio.run(speak(backend, Request(HELLO, ahead_s=None), wav))
    wav.stop()
    np.testing.assert_array_equal(samples(wav.path), backend.speech(HELLO)[: 3 * FRAME_SAMPLES])


def test_a_refused_request_leaves_an_existing_file_alone(fake: Callable[..., FakeBackend], tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"precious")
    wav = WavFile(tmp_path / "a.wav")
    with pytest.raises(BadRequestError, match="unknown voice"):
        asyncio.run(speak(fake(), Request(HELLO, voice="nobody", ahead_s=None), wav))
    wav.stop()
    assert wav.path.read_bytes() == b"precious"


def test_a_full_disk_is_an_error_in_one_line_and_stops_the_speech(
    fake: Callable[..., FakeBackend], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    backend = fake(pace=0.2)
    monkeypatch.setattr(cli_say, "open_backend", lambda args, progress: backend)
    assert main(["say", "word " * 30, "-o", "/dev/full"]) != 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "/dev/full: No space left on device" in err


def test_ctrl_c_stops_the_speech_and_keeps_the_file_valid(fake: Callable[..., FakeBackend], tmp_path: Path) -> None:
    backend = fake(pace=1.0)
    wav = WavFile(tmp_path / "a.wav")
    pressed: list[int] = []

    def press(heard: int) -> None:
        if heard >= 5 * FRAME_SAMPLES and not pressed:
            pressed.append(heard)
            os.kill(os.getpid(), signal.SIGINT)

    spoken = asyncio.run(speak(backend, Request("word " * 30, ahead_s=None), wav, press))
    wav.close()
    assert (spoken.interrupted, spoken.end) == (True, "cancelled")
    assert len(backend.cancelled) == 1
    assert len(samples(wav.path)) == spoken.samples == spoken.frames * FRAME_SAMPLES
    assert spoken.samples <= pressed[0] + FRAME_SAMPLES


def test_the_first_audible_sample_waits_for_its_piece_and_its_turn() -> None:
    """Silence of 100 ms, then a tone; pieces of 80 ms arrive at 50, 60 and 500 ms."""
    tone = (8000 * np.sin(np.arange(SAMPLE_RATE) * 2 * np.pi * 220 / SAMPLE_RATE)).astype(np.int16)
    pcm = np.concatenate([np.zeros(SAMPLE_RATE // 10, np.int16), tone])
    onset = detect_speech_onset(pcm.tobytes(), SAMPLE_RATE) or 0
    assert onset == pytest.approx(SAMPLE_RATE // 10, abs=SAMPLE_RATE // 100)

    def audible(arrivals: list[float]) -> float | None:
        listener = Listener(Heard(), Recorder(FakeBackend(), Request("")), lambda samples: None)
        listener.opening = bytearray(pcm.tobytes())
        listener.arrivals = [(at, i * FRAME_SAMPLES) for i, at in enumerate(arrivals)]
        return listener.first_audible_s()

    assert audible([0.05, 0.06, 0.5]) == pytest.approx(0.05 + onset / SAMPLE_RATE)
    assert audible([0.05, 0.4, 0.5]) == pytest.approx(0.4 + (onset - FRAME_SAMPLES) / SAMPLE_RATE)


def test_silence_is_never_audible() -> None:
    listener = Listener(Heard(), Recorder(FakeBackend(), Request("")), lambda samples: None)
    listener.opening = bytearray(2 * SAMPLE_RATE)
    listener.arrivals = [(0.05, 0)]
    assert listener.first_audible_s() is None


# -- players -------------------------------------------------------------------------------------------------------


@pytest.fixture
def player(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Put a shell script on an otherwise empty PATH under a player's name; returns the file it may write."""

    def install(name: str, script: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        program = folder / name
        program.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\nheard='{tmp_path}/heard'\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return tmp_path / "heard"

    return install


def test_no_player_is_found_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_player() is None


@pytest.mark.parametrize(
    ("name", "script", "header"), [("aplay", 'cat > "$heard"', 0), ("ffplay", 'cat > "$heard"', 0)]
)
def test_a_player_gets_every_sample(player: Callable[[str, str], Path], name: str, script: str, header: int) -> None:
    heard = player(name, script)
    assert find_player() == name
    playing = Player(name)
    for piece in (b"ab", b"cd", b"ef"):
        playing.write(piece)
    playing.close()
    playing.wait()
    assert heard.read_bytes() == b"abcdef"


def test_a_player_of_files_gets_a_wav(player: Callable[[str, str], Path]) -> None:
    heard = player("afplay", 'cp "$1" "$heard"')
    playing = Player("afplay")
    playing.write(b"abcd")
    playing.close()
    playing.wait()
    assert samples(heard).tobytes() == b"abcd"


@pytest.mark.parametrize(("name", "script"), [("aplay", "exec sleep 60"), ("afplay", "exec sleep 60")])
def test_stopping_a_player_ends_its_program(player: Callable[[str, str], Path], name: str, script: str) -> None:
    player(name, script)
    playing = Player(name)
    playing.write(bytes(1_000_000))
    playing.close()
    threading.Timer(0.3, playing.stop).start()
    playing.wait()


def test_a_player_that_dies_does_not_take_the_speech_with_it(player: Callable[[str, str], Path]) -> None:
    player("aplay", "exit 1")
    playing = Player("aplay")
    for _ in range(20):
        playing.write(bytes(100_000))
    playing.close()
    playing.wait()


# -- bad input -----------------------------------------------------------------------------------------------------


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pipecat-qwen3: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("", "no command"),
        ("sya Hello.", "did you mean 'say'"),
        ("say", "no TEXT"),
        ("say Hello there.", "there is no place for 'there.'"),
        ("say --voice slr Hello.", "did you mean 'slt'"),
        ("say --language englisch Hello.", "did you mean 'english'"),
        ("say --language en Hello.", "did you mean 'english'"),
        ("say --model embeded Hello.", "did you mean 'embedded'"),
        ("say --model /nowhere Hello.", "no model '/nowhere'"),
        ("say --model {tmp} Hello.", "config.json"),
        ("say --sed 3 Hello.", "did you mean '--seed'"),
        ("say --seed", "expected one argument"),
        ("say --seed -1 Hello.", "at least 0"),
        ("say --seed 9223372036854775808 Hello.", "9223372036854775807"),
        ("say --seed x Hello.", "a whole number"),
        ("say --temperature nan Hello.", "a number above 0"),
        ("say --temperature inf Hello.", "a number above 0"),
        ("say --temperature 0 Hello.", "a number above 0"),
        ("say --top-p 1.5 Hello.", "at most 1"),
        ("say --top-k -1 Hello.", "at least 0"),
        ("say --repetition-penalty 0 Hello.", "above 0"),
        ("say --max-frames -5 Hello.", "at least 1"),
        ("say --max-frames 0 Hello.", "at least 1"),
        ("say --backend grahp Hello.", "did you mean 'graph'"),
        ("say --dtype fp16 Hello.", "fp32"),
        ("say --device gpu Hello.", "one of auto, cpu, cuda"),
        ("say ...", "nothing to speak"),
        ("say @{tmp}/none", "No such file"),
        ("say @{tmp}", "Is a directory"),
        ("say @~nobody-of-this-name/text", "cannot read ~nobody-of-this-name/text: No such file"),
        ("say Hi --model ~nobody-of-this-name/model", "~nobody-of-this-name/model"),
        ("say @{tmp}/latin1", "not UTF-8"),
        ("say Hello. -o {tmp}", "it is a folder"),
        ("say Hello. -o {tmp}/none/a.wav", "there is no folder"),
        ("say Hello. --codes {tmp}/none/a.npy", "there is no folder"),
        ("say --backend persistent --device cpu Hello.", "persistent"),
        ("say --json", "no TEXT"),
        ("voices --model embeded", "did you mean 'embedded'"),
        ("voices --jsn", "did you mean '--json'"),
        ("doctor now", "there is no place for 'now'"),
    ],
)
def test_bad_input_is_one_line_that_helps(
    args: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latin1").write_bytes("Grüße".encode("latin-1"))
    monkeypatch.setattr(sys, "stdin", Path(os.devnull).open())  # noqa: SIM115 - pytest closes it
    monkeypatch.chdir(tmp_path)
    code = main(args.format(tmp=tmp_path).split())
    assert says in complaint(capsys)
    assert code == (1 if says in ("config.json", "persistent") else 2)
    assert not Path("out.wav").exists()


def test_text_with_bytes_that_are_no_utf_8_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["say", os.fsdecode(b"Gr\xfc\xdfe")]) == 2
    assert "not UTF-8" in complaint(capsys)


def test_debug_shows_where_it_failed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPECAT_QWEN3_DEBUG", "1")
    assert main(["say", "..."]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_one_line_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fall_over(source: str) -> str:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(cli_say, "read_text", fall_over)
    assert main(["say", HELLO]) == 1
    assert "ZeroDivisionError: division by zero" in complaint(capsys)


def test_a_missing_library_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pipecat_qwen3.cli_say", None)
    monkeypatch.delattr("pipecat_qwen3.cli_say")
    assert main(["say", HELLO]) == 1
    complaint(capsys)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def edit(key: str, value: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads(path.read_text())
        place = config
        *parents, last = key.split(".")
        for parent in parents:
            place = place[parent]
        place[last] = value
        path.write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("model.safetensors", truncate, "model.safetensors"),
        ("model.safetensors", empty, "model.safetensors"),
        ("model.safetensors", Path.unlink, "model.safetensors"),
        ("speech_tokenizer/model.safetensors", truncate, "speech_tokenizer"),
        ("speech_tokenizer/config.json", Path.unlink, "speech_tokenizer"),
        ("config.json", truncate, "config.json"),
        ("config.json", edit("talker_config.intermediate_size", 648), "shape"),
        ("config.json", edit("talker_config.num_hidden_layers", 6), "layers.5"),
        ("config.json", edit("talker_config.hidden_size", "big"), "hidden_size"),
        ("vocab.json", truncate, "vocab.json"),
    ],
)
def test_a_broken_checkpoint_is_one_line_that_names_the_file(
    file: str, damage: Callable[[Path], None], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    damage(folder / file)
    assert main(["say", HELLO, "--model", str(folder), "-o", str(tmp_path / "a.wav"), "--dtype", "fp32"]) == 1
    said = complaint(capsys)
    assert says in said
    assert str(folder) in said
    assert not (tmp_path / "a.wav").exists()


# -- voices and doctor ---------------------------------------------------------------------------------------------


def test_voices_lists_what_the_checkpoint_has(capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path]) -> None:
    assert main(["voices", "--json"]) == 0
    listing = json.loads(capsys.readouterr().out)
    assert (sorted(listing["voices"]), listing["default"], listing["languages"]) == (["rms", "slt"], "rms", ["english"])
    assert main(["voices"]) == 0
    out = capsys.readouterr().out
    assert "rms  (default)\n" in out
    assert "languages: english\n" in out
    assert main(["voices", "--model", str(tiny("voice_design"))]) == 0
    assert "no named voices" in capsys.readouterr().out


def test_doctor_says_what_runs_here_and_why_not_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--device", "cpu"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["problems"] == []
    assert findings["libraries"]["torch"] == torch.__version__
    assert (findings["device"], findings["backend"], findings["voices"]) == ("cpu", "numba", ["slt", "rms"])
    assert findings["backend_reason"]
    config = json.loads((EMBEDDED / "config.json").read_text())["talker_config"]
    row = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    pool = findings["kv_pool"]
    itemsize = {"bf16": 2, "fp32": 4}[findings["dtype"]]
    assert pool["bytes"] == row * pool["rows"] * pool["positions"] * itemsize
    assert main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for part in ("Python", f"torch {torch.__version__}", "cpu", "gpu", "backend", "kv pool", "rms"):
        assert part in out


def test_the_pool_that_doctor_tells_is_the_one_that_the_engine_holds(
    embedded: LocalBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["doctor", "--json", "--device", "cpu", "--dtype", "fp32"])
    pool = json.loads(capsys.readouterr().out)["kv_pool"]
    kv = embedded.engine.step.kv  # type: ignore[attr-defined]
    assert (pool["rows"], pool["positions"]) == (embedded.engine.step.rows, embedded.engine.step.positions)
    assert pool["bytes"] == kv.numel() * kv.element_size()


def test_doctor_lists_what_is_wrong_and_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--json", "--model", str(tmp_path)]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert len(findings["problems"]) == 1
    assert "config.json" in findings["problems"][0]
    assert findings["libraries"]["torch"] == torch.__version__


def test_doctor_survives_a_missing_library(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from pipecat_qwen3 import doctor

    monkeypatch.setattr(doctor, "_LIBRARIES", ("torch", "no-such-library"))
    assert main(["doctor"]) == 1
    assert "no-such-library is not installed" in capsys.readouterr().out


# -- as a program --------------------------------------------------------------------------------------------------

SAY = [sys.executable, "-m", "pipecat_qwen3", "say", "--dtype", "fp32", "--device", "cpu"]


def test_names_are_refused_before_torch_is_imported() -> None:
    program = """if True:
        import sys
        from pipecat_qwen3.__main__ import main
        for args in ("--voice nobody x", "--model nothing x", "--sed 1 x", "...", "-o / x"):
            main(["say", *args.split()])
        main(["voices"])
        try:
            main(["say", "--help"])
        except SystemExit:
            print()
        print(*[name for name in ("torch", "transformers", "pipecat") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
    assert done.stderr.count("\n") == 5


def test_the_program_reads_standard_input_and_prints_one_line(tmp_path: Path) -> None:
    out = tmp_path / "a.wav"
    command = [*SAY, "-", "-o", str(out), "--json", "--max-frames", "5", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, input=f"{HELLO}\n", capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    facts = json.loads(done.stdout)
    assert (facts["frames"], facts["dtype"]) == (5, "fp32")
    assert len(samples(out)) == 5 * FRAME_SAMPLES


def test_ctrl_c_leaves_a_valid_wav_of_what_was_spoken(tmp_path: Path) -> None:
    out, codes = tmp_path / "a.wav", tmp_path / "a.npy"
    command = [*SAY, f"{LONG} " * 20, "-o", str(out), "--codes", str(codes), "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        try:
            until = time.monotonic() + 120
            while time.monotonic() < until and not (out.exists() and out.stat().st_size > 10_000):
                time.sleep(0.02)
                assert program.poll() is None
            program.send_signal(signal.SIGINT)
            printed, complained = program.communicate(timeout=60)
        finally:
            program.kill()
    assert (program.returncode, complained) == (130, "")
    facts = json.loads(printed)
    assert facts["end"] == "cancelled"
    assert len(samples(out)) == facts["frames"] * FRAME_SAMPLES > 0
    assert np.load(codes).shape == (facts["frames"], 8)


class Terminal:
    """A program at a terminal: type lines, wait for what it shows."""

    # The terminal must be the program's own for Ctrl-C to reach it; forking this process, which has threads, may hang.
    _OWN = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"

    def __init__(self, command: list[str], **env: str) -> None:
        self.fd, theirs = pty.openpty()
        self.program = subprocess.Popen(
            [sys.executable, "-c", self._OWN, *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=ROOT,
            env={**os.environ, "TERM": "dumb", **env},
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def until(self, pattern: str, seconds: float = 120) -> re.Match[str]:
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < end, f"{pattern!r} was not shown, but {self.shown[-2000:]!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                self.shown += os.read(self.fd, 4096).decode(errors="replace")
        self.shown = self.shown[found.end() :]
        return found

    def leave(self) -> int:
        """The exit code, after everything was shown."""
        try:
            while os.read(self.fd, 4096):
                pass
        except OSError:  # how Linux says that the other side is closed
            pass
        return self.program.wait(60)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    made = Terminal([*SAY, "-o", str(tmp_path / "o.wav")], XDG_STATE_HOME=str(tmp_path / "state"))
    yield made
    made.program.kill()
    made.program.wait()
    os.close(made.fd)


def test_at_a_terminal_every_line_is_spoken_until_quit(terminal: Terminal, tmp_path: Path) -> None:
    terminal.until(r"written to \S+o-1\.wav")
    terminal.until("> ")
    terminal.type("/voise slt\n")
    terminal.until("did you mean 'voice'")
    terminal.type("/voice nobody\n")
    terminal.until("this model has rms, slt")
    terminal.type("/voice slt\n/seed 5\nYes.\n")
    terminal.until(r"o-1\.wav: .* end eos, seed 5")
    terminal.type("/voice rms\nYes.\n")
    terminal.until(r"o-2\.wav: .* end eos, seed 5")
    terminal.type(f"{LONG} {LONG}\n")
    until = time.monotonic() + 60
    while not (tmp_path / "o-3.wav").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    terminal.type("\x03")
    terminal.until(r"o-3\.wav: .* end cancelled")
    terminal.until("> ")
    terminal.type("half a li")
    terminal.until("half a li")
    time.sleep(0.3)  # Python's readline misses a Ctrl-C that comes while it still reads a key
    terminal.type("\x03")
    terminal.until("> ")
    terminal.type("...\n")
    terminal.until("nothing to speak")
    terminal.type("/help\n")
    terminal.until("/instruct HOW")
    terminal.type("/quit\n")
    assert terminal.leave() == 0
    slt, rms, cut = (samples(tmp_path / f"o-{n}.wav") for n in (1, 2, 3))
    assert not np.array_equal(slt, rms)
    assert 0 < len(cut) < 20 * SAMPLE_RATE
    assert "/voice slt" in (tmp_path / "state" / "pipecat-qwen3" / "history").read_text()


def test_at_a_terminal_a_player_plays_what_is_said(
    say: Say, player: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipecat_qwen3 import cli_talk

    heard = player("aplay", 'cat > "$heard"')
    lines = iter(["/seed 4", "Yes.", "/language", "/instruct softly", "/instruct", "/seed", "/seed x"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or cli_talk._quit(""))
    monkeypatch.setattr(cli_talk, "open_backend", cli_say.open_backend)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setenv("XDG_STATE_HOME", str(Path.cwd()))
    assert main(["say"]) == 0
    out = capsys.readouterr().out
    assert "played by aplay" in out
    assert "auto, english" in out
    assert "a seed should be a whole number" in out
    say("Yes.", "--seed", "4", "-o", "a.wav")
    assert heard.read_bytes() == samples(Path("a.wav")).tobytes()


def test_a_second_and_a_third_ctrl_c_change_nothing(tmp_path):
    out, codes = tmp_path / "a.wav", tmp_path / "a.npy"
    text = " ".join(["The old man walked slowly down the road and smiled at the river."] * 6)
    command = [sys.executable, "-m", "pipecat_qwen3", "say", text, "-o", str(out), "--codes", str(codes), "--json"]
    speaker = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not out.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    for _ in range(3):
        speaker.send_signal(signal.SIGINT)
        time.sleep(0.05)
    said, complained = speaker.communicate(timeout=30)
    assert (speaker.returncode, complained) == (130, "")
    facts = json.loads(said)
    assert facts["end"] == "cancelled"
    assert np.load(codes).shape == (facts["frames"], 8)
    with wave.open(str(out)) as heard:
        assert heard.getnframes() == facts["frames"] * 1920


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["say", "Hi", "-o", "same.wav", "--codes", "same.wav"], "name the same file"),
        (["say", "@text.txt", "-o", "text.txt"], "name the same file"),
        (["say", "@"], "a file without a name"),
        (["say", "Hi", "-o", "a" * 300], "File name too long"),
    ],
)
def test_files_that_cannot_be_meant_are_refused(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Hello.")
    assert main(arguments) == 2
    complaint = capsys.readouterr().err
    assert says in complaint
    assert complaint.count("\n") == 1
    assert (tmp_path / "text.txt").read_text() == "Hello."


def test_a_byte_order_mark_and_control_characters_are_not_spoken():
    assert cli_say.speakable(b"\xef\xbb\xbfHel\x00lo\x07 there.") == "Hello there."
