"""Codebooks and a tokenizer in, an untrained checkpoint out: where the trainers begin.

    python -m training.start OUT --codebooks BOOKS.pt --tokenizer FOLDER --spellings SPELLINGS.json

Configs and the codec's unused encoder (random) are the base's. Weights are random, but for what is known before any
training: embeddings and heads of codes are linear images of the codebooks, so that the sum of a frame's
embeddings is a linear image of its acoustic vector; text embeddings sound like their tokens (training.lexicon); the
codec has the codebooks themselves.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from pipecat_qwen3.checkpoint import Checkpoint, find
from pipecat_qwen3.codec import CodecDecoder
from pipecat_qwen3.codec_layers import CausalConv, CausalUpsample, ConvNeXt, LayerScale, ResidualUnit
from pipecat_qwen3.errors import program
from pipecat_qwen3.talker import Talker
from training.codebooks import Codebooks
from training.export import write
from training.lexicon import Vocabulary, text_embeddings
from training.merges import forms
from training.spelling import Spellings, read_spellings
from training.steps import leave, on_signals, there
from training.tokenizer import first_special

TEXT_WIDTH = 64
"""Of a text embedding: so many dimensions hold 98.6 % of the variance of what 256 gave the first layer."""

SPECIAL = ("im_start", "im_end", "tts_bos", "tts_eos", "tts_pad")
"""Tokens whose ids are in a checkpoint's config."""

RESIZED = ("talker.model.text_embedding.", "talker.text_projection.")
"""What has another shape than in the base where that has another vocabulary."""


def orthogonal(rows: int, columns: int) -> Tensor:
    """A random map [rows, columns] (rows <= columns) that keeps lengths, times sqrt(columns / rows)."""
    return torch.linalg.qr(torch.randn(columns, rows))[0].T * (columns / rows) ** 0.5


@torch.no_grad()
def start_talker(talker: Talker, books: Tensor, text: Tensor) -> None:
    """Fill a talker; books [8, 512, 64], text [text_vocab, text_hidden]."""
    shape, predictor = talker.config.shape, talker.code_predictor
    for name, parameter in talker.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 0.7 / math.sqrt(parameter.shape[1]))
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_(1 / math.sqrt(2 * shape.talker.layers))
    spread = books[0].std(0)
    whitened = books / spread.clamp(min=float(spread.max()) * 0.02).sqrt()  # half whitened: small directions count too
    whitened = whitened / whitened[0].std()
    dimensions, hidden = books.shape[-1], shape.talker.hidden
    picture = orthogonal(dimensions, hidden)
    talker.model.codec_embedding.weight.normal_(0, 0.35)
    talker.model.codec_embedding.weight[: shape.codes] = 0.5 * whitened[0] @ picture
    talker.codec_head.weight.normal_(0, 0.02)
    talker.codec_head.weight[: shape.codes] = 0.05 * whitened[0] @ orthogonal(dimensions, hidden)
    for g, (table, head) in enumerate(zip(predictor.model.codec_embedding, predictor.lm_head, strict=True), start=1):
        table.weight.copy_(0.5 * whitened[g] @ picture)  # type: ignore[union-attr,operator]
        narrow = whitened[g] / whitened[g].std()
        head.weight.copy_(0.05 * narrow @ orthogonal(dimensions, shape.predictor.hidden))  # type: ignore[union-attr,operator]
    talker.model.text_embedding.weight.copy_(text)
    for layer in (talker.text_projection.linear_fc1, talker.text_projection.linear_fc2):
        layer.weight.normal_(0, 1.4 / math.sqrt(layer.weight.shape[1]))
        layer.bias.zero_()


@torch.no_grad()
def start_codec(decoder: CodecDecoder, books: Tensor, scale: float) -> None:
    """Fill a decoder so that the signal keeps its variance on the way; books [8, 512, 64] are multiplied by `scale`."""
    quantizer = decoder.quantizer
    image = torch.linalg.qr(torch.randn(decoder.config.codebook_dim, books.shape[-1]))[0][..., None]
    for part in (quantizer.rvq_first, quantizer.rvq_rest):
        part.output_proj.weight.copy_(image)
    layers = [*quantizer.rvq_first.vq.layers, *quantizer.rvq_rest.vq.layers]
    for layer, book in zip(layers, books, strict=True):
        layer._codebook.embedding_sum.copy_(book * scale)  # type: ignore[union-attr,operator]
        layer._codebook.cluster_usage.fill_(1.0)  # type: ignore[union-attr,operator]
    for name, module in decoder.named_modules():
        if name.startswith("quantizer"):
            continue
        if isinstance(module, CausalConv):
            module.conv.weight.normal_(0, 1 / math.sqrt(module.conv.weight[0].numel()))
        elif isinstance(module, CausalUpsample):
            overlap = module.conv.weight.shape[2] // module.rate
            module.conv.weight.normal_(0, 1 / math.sqrt(overlap * module.conv.weight.shape[0]))
        elif isinstance(module, nn.Linear):
            module.weight.normal_(0, 1 / math.sqrt(module.weight.shape[1]))
        elif isinstance(module, ConvNeXt):
            module.gamma.fill_(0.1)
        elif isinstance(module, LayerScale):
            module.scale.fill_(0.1)
        bias = getattr(getattr(module, "conv", module), "bias", None)
        if isinstance(bias, Tensor) and not isinstance(module, nn.LayerNorm):
            bias.zero_()
    for unit in (m for m in decoder.modules() if isinstance(m, ResidualUnit)):
        unit.conv2.conv.weight.mul_(0.3)
    last = decoder.decoder[-1]
    assert isinstance(last, CausalConv)
    last.conv.weight.mul_(0.05)


def start(base: Path, out: Path, codebooks: Codebooks, tokenizer: Path, spellings: Spellings) -> None:
    """Write the untrained checkpoint into a new folder, which is there only when it is complete."""
    part = out.with_suffix(".part")
    shutil.copytree(base, part, dirs_exist_ok=True)
    shutil.copytree(tokenizer, part, dirs_exist_ok=True)
    config = json.loads((part / "config.json").read_text(encoding="utf-8"))
    shift = first_special(tokenizer) - first_special(base)
    for name in SPECIAL:
        config[f"{name}_token_id"] += shift
    config["talker_config"]["text_vocab_size"] += shift
    config["talker_config"]["text_hidden_size"] = TEXT_WIDTH
    config["assistant_token_id"] = json.loads((part / "vocab.json").read_text(encoding="utf-8"))["assistant"]
    (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    checkpoint = Checkpoint.open(part)
    talker, decoder = Talker(checkpoint.config), CodecDecoder(checkpoint.codec_config)
    rows, width = checkpoint.config.text_vocab, checkpoint.config.text_hidden
    vocabulary = Vocabulary(checkpoint.load_tokenizer(), rows, forms(spellings))
    start_talker(talker, codebooks.books, text_embeddings(vocabulary.features, width))
    start_codec(decoder, codebooks.books, 1 / float(codebooks.vector_scale))
    write(base, part, {f"talker.{n}": x for n, x in talker.state_dict().items()}, resized=RESIZED)
    codec = "speech_tokenizer"
    write(base / codec, part / codec, {f"decoder.{n}": x for n, x in decoder.state_dict().items()})
    part.rename(out)


def main() -> None:
    """Write the untrained checkpoint."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--codebooks", type=there, required=True)
    parser.add_argument("--tokenizer", type=there, required=True)
    parser.add_argument("--spellings", type=there, required=True)
    parser.add_argument("--base", default="embedded", help="checkpoint whose configs are taken")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    on_signals(leave)
    torch.manual_seed(options.seed)
    start(
        find(options.base),
        options.out,
        Codebooks.load(options.codebooks),
        options.tokenizer,
        read_spellings(options.spellings),
    )


if __name__ == "__main__":
    program(main)
