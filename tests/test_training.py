"""What is taught is what runs: training rows are the engine's prompts, training losses are the modules' own."""

import copy
import importlib
import json
import random
import signal
import subprocess
import sys
import wave
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipecat_qwen3.backend import Layout
from pipecat_qwen3.checkpoint import Checkpoint, find
from pipecat_qwen3.codec import CodecDecoder
from pipecat_qwen3.prompt import Prompter, Voice
from pipecat_qwen3.talker import Talker
from pipecat_qwen3.text import encode
from training import codec_loss, evaluate_talker, needs, steps, tokenizer
from training.codebooks import Codebooks, fit, left
from training.evaluate_talker import by_layout, held_out_groups
from training.export import averaged, sharpened
from training.optimizers import optimizer
from training.rows import DROPOUT_SHARE, Choice, Utterance, collate, plan, read_utterances, recut, tokens_and_words
from training.spelling import Spelling
from training.start import start, start_codec
from training.talker_loss import AuxiliaryHeads, TalkerLoss
from training.text import held_out

ROOT = Path(__file__).parent.parent

TEXT = "Dr. Brown will see you at 3:30, please wait."


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open("embedded")


@pytest.fixture(scope="module")
def talker(checkpoint: Checkpoint) -> Talker:
    return checkpoint.load_talker(torch.float32)


def utterance(checkpoint: Checkpoint, frames: int = 30) -> Utterance:
    [(ids, words)] = tokens_and_words(checkpoint.load_tokenizer(), [TEXT])
    some = torch.Generator().manual_seed(3)
    codes = torch.randint(0, checkpoint.config.shape.codes, (frames, checkpoint.config.shape.codebooks), generator=some)
    phones = torch.randint(0, 41, (frames, 4), generator=some)
    spoken = torch.arange(frames) * (max(words) + 1) // frames
    return Utterance(TEXT, ids, words, codes, phones, spoken, 1)


def loss_of(talker: Talker) -> TalkerLoss:
    books = torch.randn(8, 512, 64, generator=torch.Generator().manual_seed(0))
    loss = TalkerLoss(talker, AuxiliaryHeads(talker.config.shape.talker.hidden, 64), books, compiled=False)
    loss.autocast = False
    return loss


@pytest.mark.parametrize("layout", ["whole", "streaming"])
@pytest.mark.parametrize("auto", [False, True])
def test_a_row_begins_with_the_prompt_of_the_engine(
    checkpoint: Checkpoint, talker: Talker, layout: Layout, auto: bool
) -> None:
    config, said = checkpoint.config, utterance(checkpoint)
    role = [config.ids.im_start, config.ids.assistant, *encode(checkpoint.load_tokenizer(), "\n")]
    prompter = Prompter(config, talker.text_table(), talker.model.codec_embedding.weight, role)
    prompt = prompter.build(Voice("rms", "auto" if auto else "english", None), [], said.ids, layout)
    texts = [*prompt.text, config.ids.tts_eos, config.ids.tts_pad] if layout == "streaming" else [config.ids.tts_pad]
    wanted = torch.cat([prompt.shared, prompt.rest, (prompt.pending + prompter.texts(texts[:1])[0])[None]])
    batch = collate(config, [Choice(said, layout, auto)])
    rows = loss_of(talker)._inputs(batch, batch.codes)[0]
    torch.testing.assert_close(rows[: len(wanted)], wanted)
    assert batch.label[0, len(wanted) - 1] == said.codes[0, 0]
    assert batch.label[0, -1] == config.ids.codec_eos


@pytest.mark.parametrize("layout", ["whole", "streaming"])
def test_the_training_losses_are_those_of_the_modules(checkpoint: Checkpoint, talker: Talker, layout: Layout) -> None:
    loss, batch = loss_of(talker), collate(checkpoint.config, [Choice(utterance(checkpoint), layout, False)] * 2)
    with torch.no_grad():
        found = loss(batch, noise=False, guided=False, share=1.0)
        hidden = talker(loss._inputs(batch, batch.codes))
        labelled = batch.label >= 0
        rows, columns = (batch.target >= 0).nonzero(as_tuple=True)
        codes = batch.codes[rows, batch.target[rows, columns]]
        first = talker.model.codec_embedding(codes[:, 0])
        logits = talker.code_predictor(hidden[rows, columns], first, codes[:, 1:])
    code0 = F.cross_entropy(talker.codec_head(hidden[labelled]), batch.label[labelled])
    torch.testing.assert_close(found["code0"], code0)
    each = torch.stack([F.cross_entropy(logits[:, g], codes[:, g + 1]) for g in range(logits.shape[1])])
    torch.testing.assert_close(found["predictor"], each)


def test_every_token_belongs_to_its_word(checkpoint: Checkpoint) -> None:
    tokenizer = checkpoint.load_tokenizer()
    [(ids, words)] = tokens_and_words(tokenizer, [TEXT])
    pieces = [""] * len(TEXT.split())
    for token, word in zip(ids, words, strict=True):
        pieces[word] += str(tokenizer.decode([token]))
    assert [p.strip() for p in pieces] == TEXT.split()


@pytest.mark.parametrize("layout", ["whole", "streaming"])
def test_a_shards_figure_is_the_mean_of_all_its_labels(checkpoint: Checkpoint, talker: Talker, layout: Layout) -> None:
    loss = loss_of(talker)
    said = [utterance(checkpoint, frames) for frames in range(1, 33)]
    alone = [(len(u.codes) + 1) * by_layout(loss, "x", [u])[f"x {layout}"] for u in said]
    with torch.no_grad():
        wanted = loss(collate(checkpoint.config, [Choice(said[-1], layout, False)]), False, False, 0.0)["code0"]
    assert alone[-1] == pytest.approx(33 * wanted.item(), rel=1e-5)
    assert by_layout(loss, "x", said)[f"x {layout}"] == pytest.approx(sum(alone) / sum(range(2, 34)), rel=1e-5)


def test_shards_are_evaluated_by_their_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = torch.full((2,), 5, dtype=torch.int32)
    each = {"codes": torch.zeros(10, 8), "phones": torch.zeros(10, 4), "words": torch.zeros(10)}
    shard = {name: x.short() for name, x in each.items()} | {"texts": ["Hello.", "Bye."], "frames": frames}
    paths = [tmp_path / folder / "0003.pt" for folder in ("old", "new")]
    for path in paths:
        path.parent.mkdir()
        torch.save(shard | {"voices": torch.zeros(2, dtype=torch.uint8), "wave": frames}, path)
    json_path = tmp_path / "figures" / "talker.json"
    arguments = ["embedded", "--data", *map(str, paths), "--json", str(json_path)]
    monkeypatch.setattr(sys, "argv", ["evaluate_talker", *arguments])
    evaluate_talker.main()
    [row] = json.loads(json_path.read_text())
    assert row["checkpoint"] == "embedded"
    assert list(row["code 0"]) == [f"{f}/0003 {layout}" for f in ("old", "new") for layout in ("whole", "streaming")]
    assert row["code 0"]["old/0003 whole"] == row["code 0"]["new/0003 whole"] > 0


def test_what_is_held_out_is_cut_as_the_engine_cuts_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tokenizer, engine = checkpoint.load_tokenizer(), checkpoint.load_tokenizer()
    texts = [text for _, text, _ in held_out()]
    frames = torch.ones(len(texts), dtype=torch.int32)
    each = {name: torch.zeros(len(texts), *size) for name, size in (("codes", [8]), ("phones", [4]), ("words", []))}
    torch.save(each | {"texts": texts, "frames": frames, "voices": frames, "wave": frames}, tmp_path / "held_out.pt")
    groups = held_out_groups(tmp_path / "held_out.pt", tokenizer)
    found = sorted(utterance.ids for group in groups.values() for utterance in group)
    assert found == sorted(encode(engine, text) for text in texts)
    utterances = read_utterances([tmp_path / "held_out.pt"], tokenizer)
    passes = [recut(utterances, tokenizer, random.Random(seed)) for seed in range(2)]
    changed = [
        {n for n, (u, v) in enumerate(zip(utterances, taught, strict=True)) if u.ids != v.ids} for taught in passes
    ]
    assert all(0.1 < len(some) / len(texts) < DROPOUT_SHARE for some in changed)
    assert changed[0] != changed[1]
    for taught in passes:
        for before, after in zip(utterances, taught, strict=True):
            assert tokenizer.decode(after.ids) == before.text
            assert len(after.token_words) == len(after.ids)
            assert set(after.token_words) == set(before.token_words)


@pytest.mark.parametrize("muon", [False, True])
def test_a_run_goes_on_as_if_it_had_not_been_stopped(talker: Talker, muon: bool) -> None:
    def run(layers: torch.nn.Module, steps: Iterable[int], saved: dict[str, Any] | None = None) -> dict[str, Any]:
        moved = optimizer(layers, [], 1e-2, muon)
        if saved:
            moved.load_state_dict(saved)
        for step in steps:
            for number, parameter in enumerate(layers.parameters()):
                some = torch.Generator().manual_seed(100 * step + number)
                parameter.grad = torch.randn(parameter.shape, generator=some)
            moved.step()
            moved.zero_grad()
        return moved.state_dict()

    at_once, stopped = (copy.deepcopy(talker.model.layers[0]).requires_grad_(True) for _ in range(2))
    run(at_once, range(3))
    saved = run(stopped, range(2))
    run(stopped, range(2, 3), saved)
    before = talker.model.layers[0].state_dict()
    for name, parameter in stopped.named_parameters():
        torch.testing.assert_close(parameter, at_once.get_parameter(name))
        assert not torch.equal(parameter, before[name])
    change = (at_once.get_parameter("mlp.up_proj.weight") - before["mlp.up_proj.weight"]).detach()
    singular = torch.linalg.svdvals(change)
    assert (singular[0] / singular[-1] < 3) == muon  # Muon's steps are as long in every direction
    with pytest.raises(SystemExit, match="--muon was not the same"):
        optimizer(stopped, [], 1e-2, not muon).load_state_dict(saved)


def test_a_pass_teaches_every_utterance_once_in_batches_of_the_asked_size(checkpoint: Checkpoint) -> None:
    utterances = [utterance(checkpoint, frames) for frames in range(10, 60)]
    groups = plan(utterances, 600, random.Random(0))
    taught = sorted(len(choice.utterance.codes) for group in groups for choice in group)
    assert taught == list(range(10, 60))
    assert max(collate(checkpoint.config, group).text.numel() for group in groups) <= 600


def test_the_codec_is_trained_on_the_waves_that_it_speaks(checkpoint: Checkpoint) -> None:
    decoder = checkpoint.load_codec()
    codes = torch.randint(0, 512, (2, 8, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wave, latents = codec_loss.decode(decoder, codes)
        torch.testing.assert_close(wave.clamp(-1, 1), decoder(codes), atol=1e-5, rtol=0)
    assert latents.shape == (2, checkpoint.codec_config.latent, 36)


@pytest.fixture(scope="module")
def codebooks() -> Codebooks:
    some = torch.Generator().manual_seed(0)
    vectors = torch.randn(1500, 20, generator=some) @ torch.randn(20, 648, generator=some)
    phones, speaker = torch.randint(0, 41, (1500, 4), generator=some), torch.randint(0, 2, (1500,), generator=some)
    fitted = fit(vectors, phones, speaker)
    assert left(fitted, vectors, speaker) < 0.5
    return fitted


def test_codes_give_back_what_is_made_of_the_books(codebooks: Codebooks) -> None:
    codes = torch.randint(0, 512, (50, 8), generator=torch.Generator().manual_seed(2))
    wanted = sum(book[code] for book, code in zip(codebooks.books, codes.unbind(1), strict=True))
    torch.testing.assert_close(codebooks.project(codebooks.decode(codes)), wanted, atol=1e-3, rtol=1e-3)


def test_sharpening_keeps_level_and_tilt_and_lifts_the_formants(codebooks: Codebooks) -> None:
    place, basis = (torch.arange(80) + 0.5) / 80, torch.eye(648, 64)
    basis[:, :4] = 0
    for column, cepstrum in enumerate((0, 1, 2, 7)):
        basis[160:240, column] = F.normalize(torch.cos(torch.pi * cepstrum * place), dim=0)
    gains = replace(codebooks, basis=basis).sharpening(1.5)[:4, :4]
    torch.testing.assert_close(gains, torch.diag(torch.tensor([1.0, 1.0, 1.5, 1.5])), atol=1e-5, rtol=0)
    torch.testing.assert_close(codebooks.sharpening(1.0), torch.eye(64), atol=1e-4, rtol=0)


def test_what_the_decoder_is_fed_is_sharpened_in_the_quantizer(codebooks: Codebooks) -> None:
    decoder, sharpening = CodecDecoder(Checkpoint.open("embedded").codec_config), codebooks.sharpening(1.3)
    start_codec(decoder, codebooks.books, 1.0)
    trained = {f"decoder.{name}": x for name, x in decoder.state_dict().items()}
    decoder.load_state_dict({n.removeprefix("decoder."): x for n, x in sharpened(trained, sharpening).items()})
    for book, table in zip(codebooks.books @ sharpening.T, decoder.quantizer.tables(), strict=True):
        torch.testing.assert_close((table - table[0]).norm(dim=1), (book - book[0]).norm(dim=1), rtol=1e-4, atol=1e-3)


def test_the_codebooks_in_the_repository_are_those_of_the_embedded_voice() -> None:
    voice = Codebooks.load(ROOT / "training" / "embedded_codebooks.pt")
    quantizer = Checkpoint.open("embedded").load_codec().quantizer
    layers = [*quantizer.rvq_first.vq.layers, *quantizer.rvq_rest.vq.layers]
    for layer, book in zip(layers, voice.books, strict=True):
        held = layer._codebook.embedding_sum / layer._codebook.cluster_usage[:, None]  # type: ignore[union-attr,operator]
        torch.testing.assert_close(held * voice.vector_scale, book, atol=5e-3 * float(book.abs().max()), rtol=5e-3)
    torch.testing.assert_close(voice.basis.T @ voice.basis, torch.eye(64), atol=2e-3, rtol=0)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer's folder, learnt from gibberish, with the special tokens of the embedded voice behind its own."""
    folder, rng = tmp_path_factory.mktemp("tokenizer"), random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(3, 9))) for _ in range(6000)]
    trained = tokenizer.train(iter([TEXT, *["assistant"] * 20, " ".join(words), " ".join(words[::2])]), 5056)
    assert trained.get_vocab_size() == 5056
    trained.model.save(str(folder))
    tokenizer.write_config(find("embedded"), folder, 5056 - tokenizer.first_special(find("embedded")))
    (folder / "texts.json").write_text(json.dumps({t: trained.encode(t).ids for t in (TEXT, "We'll  see\n12 PM!")}))
    return folder


def test_the_tokenizer_is_read_by_the_model_as_it_was_trained(pieces: Path) -> None:
    from transformers import Qwen2TokenizerFast  # type: ignore[attr-defined]

    read = Qwen2TokenizerFast.from_pretrained(str(pieces))
    for text, ids in json.loads((pieces / "texts.json").read_text()).items():
        assert read(text).input_ids == ids
        assert read.decode(ids) == text
    assert len(read("assistant").input_ids) == 1
    assert len(read("0199").input_ids) == 4
    assert len(read) > min(read("<tts_pad>").input_ids) >= 5056


def test_the_beginning_opens_as_a_checkpoint_with_its_own_tokenizer(
    pieces: Path, codebooks: Codebooks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.lexicon.pronounce", lambda word: list(word))  # flite may not be here
    spellings = {"doctor": Spelling((("d",), ("aa1",), ("k",), ("t",), ("er0",), ()), 5.0, False)}
    start(find("embedded"), tmp_path / "blank", codebooks, pieces, spellings)
    blank = Checkpoint.open(tmp_path / "blank")
    said = blank.load_tokenizer()("<|im_start|>assistant<tts_text_bos><tts_text_eod><tts_pad>").input_ids
    assert said == [
        getattr(blank.config.ids, name) for name in ("im_start", "assistant", "tts_bos", "tts_eos", "tts_pad")
    ]
    tables = blank.load_codec().quantizer.tables()
    for book, table in zip(codebooks.books, tables, strict=True):  # turned and scaled, and kept in bfloat16
        wanted = torch.cdist(book, book) / codebooks.vector_scale
        torch.testing.assert_close(torch.cdist(table, table), wanted, rtol=0.02, atol=0.02 * float(wanted.max()))


def test_a_trainer_is_stopped_between_two_steps() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = steps.Stop()
        assert not stop.asked
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        ({"PACKAGES": ("torch", "no_such_package")}, "training needs no_such_package; run: pip install"),
        ({"LIBRARIES": ("libno_such.so.1",)}, "apt-get install libflite1 flite"),
        ({"WORDNET": Path("nowhere")}, "apt-get install wordnet-base"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    broken: dict[str, object], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ({"PACKAGES": (), "LIBRARIES": ()} | broken).items():
        monkeypatch.setattr(needs, name, value)
    with pytest.raises(SystemExit) as missing:
        needs.check()
    assert line in str(missing.value)
    assert "\n" not in str(missing.value)


@pytest.fixture
def installed() -> None:
    try:
        needs.check()
    except SystemExit as missing:
        pytest.skip(str(missing))


def recipe(work: Path, interrupt_at: str = "") -> tuple[int, str]:
    """Exit status and output of the whole recipe at the size of a toy; Ctrl-C is pressed at a certain line."""
    sizes = "--shards 2 --utterances 16 --sentences 2 --talker-steps 9 --codec-steps 6 --listener-steps 6"
    sizes += " --positions 500 --crops 2 --judge-steps 6 --reinforce-steps 6 --texts 2"
    command = [sys.executable, "-m", "training", str(work), *sizes.split(), "--eager", "--jobs", "1", "--threads", "1"]
    said = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if interrupt_at and line.startswith(interrupt_at):
                process.send_signal(signal.SIGINT)
        return process.wait(), "".join(said)


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_the_recipe_makes_a_voice_from_nothing_though_it_is_interrupted(tmp_path: Path) -> None:
    status, said = recipe(tmp_path, interrupt_at="train_talker: 32 utterances")
    assert status == steps.INTERRUPTED, said
    step = torch.load(tmp_path / "talker" / "last.pt", weights_only=True)["step"]
    assert 0 < step < 9
    status, said = recipe(tmp_path)
    assert status == 0, said
    assert f"train_talker: resumed at step {step}" in said
    assert "-m training.tokenizer" not in said
    examined = {line.partition(":")[0] for line in said.splitlines() if '"held out"' in line}
    assert examined == {"train_talker", "train_codec", "reinforce"}
    taught, voice = (Checkpoint.open(tmp_path / name).load_talker(torch.float32) for name in ("taught", "voice"))
    assert not torch.equal(taught.codec_head.weight, voice.codec_head.weight)  # it has listened to itself
    assert json.loads((tmp_path / "resynthesis" / "figures.json").read_text())["rms"]["STOI"] < 0.9
    assert json.loads((tmp_path / "asr_loop.json").read_text())["figures"]["rms whole greedy"]["sentences"] == 2
    wav = tmp_path / "said.wav"
    say = [sys.executable, "-m", "pipecat_qwen3", "say", "--model", str(tmp_path / "voice"), "--max-frames", "5"]
    subprocess.run([*say, "-o", str(wav), "Hello there."], cwd=ROOT, check=True)
    with wave.open(str(wav)) as file:
        assert file.getnframes() == 5 * 1920
        assert any(file.readframes(9600))


def test_what_the_command_line_gets_wrong_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, voice = str(tmp_path), str(find("embedded"))
    sound = str(ROOT / "docs" / "samples" / "rms.wav")
    readme, books = (str(ROOT / "training" / name) for name in ("README.md", "embedded_codebooks.pt"))
    wrong = [
        (["data", folder, "--shards", "5"], "argument --shards: 5 is not FIRST:END, such as 0:60"),
        (["data", folder, "--codebooks", "gone.pt"], "argument --codebooks: there is no gone.pt"),
        (["train_talker", "gone", folder, "--run", folder], "argument base: there is no gone"),
        (["export", folder, f"{folder}/out"], "is no voice: it has no model.safetensors; give a folder like"),
        (
            ["train_talker", voice, folder, "--run", folder, "--codebooks", readme],
            "README.md is no file of training.codebooks: it cannot be read",
        ),
        (
            ["train_talker", voice, folder, "--run", folder, "--codebooks", books, "--init", books],
            "embedded_codebooks.pt is no file of training.train_talker: it holds no average, talker",
        ),
        (
            ["train_talker", voice, folder, "--run", folder, "--codebooks", books, "--spellings", readme],
            "README.md is no file of training.spelling: it cannot be read",
        ),
        (
            ["reinforce", voice, folder, "--run", folder, "--codebooks", books, "--judge", sound],
            "rms.wav is no file of training.judge: it cannot be read",
        ),
        (
            ["export", voice, f"{folder}/out", "--talker", books],
            "is no file of training.train_talker or training.train_codec: it holds no average",
        ),
    ]
    for arguments, said in wrong:
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as left_with:
            importlib.import_module(f"training.{arguments[0]}").main()
        assert said in f"{left_with.value} {capsys.readouterr().err}"
    with pytest.raises(SystemExit, match=r"no recordings in .*; make some: python -m training.data"):
        steps.shards([tmp_path])
    assert not (tmp_path / "out").exists()


def test_of_several_runs_the_weighted_mean_is_exported(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 5.0)):
        torch.save({"average": {"norm.weight": torch.full((3,), value)}}, tmp_path / name)
    one, both = averaged([str(tmp_path / "a")], "talker."), [f"{tmp_path / 'a'}=3", f"{tmp_path / 'b'}=1"]
    assert one["talker.norm.weight"].tolist() == [1.0, 1.0, 1.0]
    assert averaged(both, "talker.")["talker.norm.weight"].tolist() == [2.0, 2.0, 2.0]


def test_a_voice_counts_in_the_mean_as_a_run_does(tmp_path: Path, talker: Talker) -> None:
    torch.save({"average": {n: x + 1 for n, x in talker.state_dict().items()}}, tmp_path / "last.pt")
    mean = averaged([f"{find('embedded')}=1", f"{tmp_path / 'last.pt'}=3"], "talker.")
    assert mean.keys() == {f"talker.{name}" for name in talker.state_dict()}
    torch.testing.assert_close(mean["talker.model.norm.weight"], talker.state_dict()["model.norm.weight"] + 0.75)
    with pytest.raises(SystemExit, match=r"no weights decoder\.\*; give the last.pt of a trainer"):
        averaged([str(find("embedded"))], "decoder.")
    for wrong in (tmp_path / "gone.pt", tmp_path):  # a trainer's folder is none of a voice
        with pytest.raises(SystemExit, match=r"holds no weights; give the last.pt of a trainer"):
            averaged([str(wrong)], "talker.")
