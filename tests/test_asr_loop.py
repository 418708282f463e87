"""The benchmark that hears: errors are counted, runs go on, are compared and say in one line what they lack."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from bench import asr_loop, recognise, runaways
from bench.speak import Condition, audio_of, read_sentences, speak
from bench.word_errors import Spoken, compare, ends, summary, tables
from pipecat_qwen3.local import LocalBackend
from tests.heard import errors_and_words
from training.evaluate_codec import write_wav


def spoken(sentence: str, errors: int, layout: str = "whole", group: str = "agent") -> Spoken:
    return Spoken(sentence, group, "rms", layout, "greedy", 10, "", errors, 1, 0.1, "eos", 3.0)


def test_word_errors_counts_each_kind() -> None:
    assert errors_and_words("a b c d", "a b c d") == (0, 4)
    assert errors_and_words("a b c d", "a x c") == (2, 4)
    assert errors_and_words("a b", "a b c d") == (2, 2)


def test_words_are_compared_as_they_sound() -> None:
    assert recognise.words_of("Dr. Grey, it's 'okay' at 3 p.m.!") == ["doctor", "gray", "it's", "okay", "at", "pm"]


def test_there_are_two_hundred_held_out_sentences_and_fewer_come_from_all_groups() -> None:
    sentences = read_sentences(None)
    assert len(sentences) >= 200
    assert {s.group for s in read_sentences(12)} == {s.group for s in sentences}
    assert all(s.words for s in sentences)


def test_figures_stand_for_each_condition_and_group() -> None:
    found = tables([spoken("a", 2), spoken("b", 4, group="unseen"), spoken("a", 0, "streaming")])
    assert found["rms whole greedy"]["wer"] == 0.3
    assert found["rms whole greedy unseen"]["wer"] == 0.4
    assert found["rms streaming greedy"]["wer"] == 0.0
    assert found["rms whole greedy"]["flite_wer"] == 0.1


def test_the_interval_of_an_error_rate_is_that_of_the_binomial_for_independent_words() -> None:
    rng = np.random.default_rng(1)
    heard = [spoken(str(i), int(rng.binomial(10, 0.2))) for i in range(200)]
    assert summary(heard)["wer_interval"] == pytest.approx(1.96 * (0.2 * 0.8 / 2000) ** 0.5, rel=0.15)


def test_ends_that_come_late_or_never_are_runaways() -> None:
    found = ends([("eos", 0.1), ("eos", -0.3), ("cap", 9.0), ("runaway", None), ("eos", 3.0), ("eos", -2.0)])
    assert found["runaways_per_1000"] == 500.0
    assert found["cut_short_per_1000"] == 200.0
    assert found["end_error_s"] == 2.0


def test_two_runs_are_compared_by_sentence_whatever_the_sentences_themselves_differ_by() -> None:
    hard = np.random.default_rng(0).integers(0, 8, 100)
    first = [spoken(str(i), int(e)) for i, e in enumerate(hard)]
    second = [spoken(str(i), int(e) + 1) for i, e in enumerate(hard)] + [spoken("only here", 9)]
    found = compare(first, second)["all"]
    assert found["utterances"] == 100
    assert found["difference"] == pytest.approx(0.1)
    assert found["interval"] == [0.1, 0.1]
    noise = np.random.default_rng(1).permutation(hard)
    low, high = compare(first, [spoken(str(i), int(e)) for i, e in enumerate(noise)])["all agent"]["interval"]
    assert low < 0 < high


def test_takes_of_a_sentence_are_drawn_together_and_compared_by_their_mean() -> None:
    hard = np.random.default_rng(0).integers(0, 8, 100)
    once = [spoken(str(i), int(e)) for i, e in enumerate(hard)]
    assert summary(once * 4) == summary(once) | {"words": 4000}
    later = [spoken(str(i), int(e) + more) for more in (0, 2) for i, e in enumerate(hard)]
    assert summary(later)["sentences"] == 100
    found = compare(once, later)["all"]
    assert (found["utterances"], found["difference"], found["interval"]) == (100, 0.1, [0.1, 0.1])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """asr_loop.main on the embedded voice with a recogniser that hears "hello" alone, and no flite."""
    monkeypatch.setattr(recognise, "sphinx", lambda: lambda audio: "hello")
    monkeypatch.setattr(asr_loop, "flite", lambda text, voice: None)

    def main(*arguments: str) -> dict:
        path = tmp_path / "result.json"
        asr_loop.main(["--json", str(path), "--sentences", "3", "--voices", "rms", "--device", "cpu", *arguments])
        return json.loads(path.read_text())

    return main


def test_a_run_goes_on_where_it_was_stopped(
    run: Callable[..., dict], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run("--layouts", "whole")
    begun: list[str] = []
    speak = asr_loop.speak
    monkeypatch.setattr(
        asr_loop, "speak", lambda b, texts, how, **seed: begun.append(str(how)) or speak(b, texts, how, **seed)
    )
    both = run()
    assert begun == ["rms streaming greedy"]
    assert both["utterances"][:3] == first["utterances"]
    assert set(both["figures"]) >= {"rms whole greedy", "rms streaming greedy"}
    assert all(u["end"] == "eos" and u["errors"] for u in both["utterances"])
    assert "going on with" in capsys.readouterr().out


def test_takes_are_sampled_with_other_seeds_and_greedy_speech_has_one(
    run: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict[str, list[np.ndarray]] = {}
    listen = asr_loop.listen

    def kept(texts, utterances, hear, how, teacher):
        said[str(how)] = [audio for audio, _ in utterances]
        return listen(texts, utterances, hear, how, teacher)

    monkeypatch.setattr(asr_loop, "listen", kept)
    found = run("--layouts", "whole", "--sampling", "own", "greedy", "--takes", "2")
    assert len(said["rms whole greedy"]) == 3
    first, second = said["rms whole own"][:3], said["rms whole own"][3:]
    assert len(second) == 3
    assert not any(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(found["utterances"]) == 9


def test_more_takes_are_added_to_those_that_are_there(
    run: Callable[..., dict], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoken: list[tuple[int, int]] = []
    speak = asr_loop.speak

    def counted(backend, texts, how, seed):
        spoken.append((len(texts), seed))
        return speak(backend, texts, how, seed=seed)

    monkeypatch.setattr(asr_loop, "speak", counted)
    arguments = ("--layouts", "whole", "--sampling", "own", "--takes")
    two = run(*arguments, "2")
    three = run(*arguments, "3")
    assert spoken == [(6, 0), (3, 6)]
    assert three["utterances"][:6] == two["utterances"]
    assert three["key"]["takes"] == 3
    assert run(*arguments, "3")["utterances"] == three["utterances"]
    assert spoken == [(6, 0), (3, 6)]
    run(*arguments, "1")
    assert spoken[2:] == [(3, 0)]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--sampling", "own", "--takes", "0"], "a number from 1 on, not 0"),
        (["--takes", "2"], "greedy speech and recordings are the same every time; add --sampling own"),
    ],
)
def test_takes_that_make_no_sense_are_refused_in_one_line(
    run: Callable[..., dict], capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    with pytest.raises(SystemExit):
        run(*arguments)
    assert capsys.readouterr().err.endswith(f"argument --takes: {line}\n")


def test_several_processes_hear_what_one_hears(embedded: LocalBackend) -> None:
    audio = [audio_of(s)[0] for s in speak(embedded, ["Hello there.", "Goodbye."], Condition("rms", "whole", "greedy"))]
    with recognise.sphinxes(1) as one, recognise.sphinxes(2) as two:
        assert two(audio) == one(audio) != ["", ""]


def test_recordings_are_heard_beside_what_the_codec_loses(run: Callable[..., dict], tmp_path: Path) -> None:
    folder = tmp_path / "resynthesis"
    (folder / "rms").mkdir(parents=True)
    numbers = {s.text: n for n, s in enumerate(read_sentences(None))}
    for sentence in read_sentences(3):
        write_wav(folder / "rms" / f"{numbers[sentence.text]:03d}.wav", np.zeros(24_000))
    (folder / "figures.json").write_text('{"rms": {"STOI": 0.9}}')
    found = run("--recordings", str(folder))
    assert found["resynthesis"] == {"rms": {"STOI": 0.9}}
    assert [u["seconds"] for u in found["utterances"]] == [1.0] * 3
    assert found["figures"]["rms recorded codec"]["sentences"] == 3


def test_results_are_compared_from_the_command_line(
    run: Callable[..., dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--layouts", "whole")
    path = str(tmp_path / "result.json")
    asr_loop.main(["--compare", path, path])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split()[:2] == ["all", "3"]
    assert "+0.0 to +0.0" in last


def test_runaways_are_counted_without_decoding_anything(embedded: LocalBackend) -> None:
    conditions = [Condition("rms", "whole", "greedy"), Condition("slt", "streaming", "own")]
    codec = embedded.engine.codec
    rows = runaways.runaways(embedded, conditions, ["Hello there.", "How are you?", "Goodbye now."])
    assert embedded.engine.codec is codec
    assert [row["how"] for row in rows] == ["rms whole greedy"] * 2 + ["slt streaming own"]
    assert all(row["end"] == "eos" and 5 < row["frames"] < 60 for row in rows)
    assert runaways.figures(rows)["all"]["runaways_per_1000"] == 0


def test_whisper_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(SystemExit, match=r"pip install 'pipecat-qwen3\[asr\]'"):
        recognise.whisper()


def stand_in(model: Callable[[str], object]) -> ModuleType:
    module = ModuleType("faster_whisper")
    module.WhisperModel = model  # type: ignore[attr-defined]
    return module


def test_a_whisper_model_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> object:
        raise OSError("no network\nand more")

    monkeypatch.setitem(sys.modules, "faster_whisper", stand_in(offline))
    with pytest.raises(SystemExit, match=r"^the whisper model tiny cannot be had \(no network\); .*--whisper$"):
        recognise.whisper("tiny")


def test_whisper_hears_numbers_as_words(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Model:
        hf_tokenizer = SimpleNamespace(get_vocab=lambda: {" nine": 1, "9": 2, "Ġ90": 3, "%": 4, " percent": 5})

        def __init__(self, name: str) -> None:
            self.name = name

        def transcribe(self, audio: np.ndarray, **options: object) -> tuple[list[SimpleNamespace], None]:
            calls.append((audio.dtype, options))
            return [SimpleNamespace(text=" Nine"), SimpleNamespace(text=" percent.")], None

    monkeypatch.setitem(sys.modules, "faster_whisper", stand_in(Model))
    assert recognise.whisper("tiny")(np.zeros(16_000)) == "Nine percent."
    ((dtype, options),) = calls
    assert dtype == np.float32
    assert options["suppress_tokens"] == [-1, 2, 3, 4]
    assert options["language"] == "en"
