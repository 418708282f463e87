"""What is taught is what runs: training rows are the engine's prompts, training losses are the modules' own."""

import random

import pytest
import torch
import torch.nn.functional as F

from pipecat_qwen3.backend import Layout
from pipecat_qwen3.checkpoint import Checkpoint
from pipecat_qwen3.prompt import Prompter, Voice
from pipecat_qwen3.talker import Talker
from pipecat_qwen3.text import encode
from training import codec_loss
from training.rows import Choice, Utterance, collate, plan, tokens_and_words
from training.talker_loss import AuxiliaryHeads, TalkerLoss

TEXT = "Dr. Brown will see you at 3:30, please wait."


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open("embedded")


@pytest.fixture(scope="module")
def talker(checkpoint: Checkpoint) -> Talker:
    return checkpoint.load_talker(torch.float32)


def utterance(checkpoint: Checkpoint, frames: int = 30) -> Utterance:
    ids, words = tokens_and_words(checkpoint.load_tokenizer(), TEXT)
    some = torch.Generator().manual_seed(3)
    codes = torch.randint(0, checkpoint.config.shape.codes, (frames, checkpoint.config.shape.codebooks), generator=some)
    phones = torch.randint(0, 41, (frames, 4), generator=some)
    spoken = torch.arange(frames) * (max(words) + 1) // frames
    return Utterance(ids, words, codes, phones, spoken, 1)


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
    ids, words = tokens_and_words(tokenizer, TEXT)
    pieces = [""] * len(TEXT.split())
    for token, word in zip(ids, words, strict=True):
        pieces[word] += str(tokenizer.decode([token]))
    assert [p.strip() for p in pieces] == TEXT.split()


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
