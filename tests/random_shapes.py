"""Names and shapes of every tensor of a Qwen3-TTS-12Hz checkpoint: its config.json goes in, a dict comes out.

Checked against the state dicts of the official classes by golden/make.py.
"""

from collections.abc import Iterator, Mapping
from typing import Any

Shapes = Iterator[tuple[str, tuple[int, ...]]]
MELS = 128
RES2NET_SCALE = 8


def model_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of model.safetensors: talker, code predictor and, in a base checkpoint, the speaker encoder."""
    shapes = dict(_talker(config["talker_config"]))
    if "speaker_encoder_config" in config:
        shapes |= dict(_speaker_encoder(config["speaker_encoder_config"]))
    return shapes


def codec_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of speech_tokenizer/model.safetensors: Mimi encoder and decoder."""
    return dict(_encoder(config["encoder_config"])) | dict(_decoder(config["decoder_config"]))


def _talker(c: Mapping[str, Any]) -> Shapes:
    predictor = c["code_predictor_config"]
    hidden, text = c["hidden_size"], c["text_hidden_size"]
    narrow, codes = predictor["hidden_size"], predictor["vocab_size"]
    yield from _stack("talker.model", c)
    yield "talker.model.codec_embedding.weight", (c["vocab_size"], hidden)
    yield "talker.model.text_embedding.weight", (c["text_vocab_size"], text)
    yield from _linear("talker.text_projection.linear_fc1", text, text)
    yield from _linear("talker.text_projection.linear_fc2", text, hidden)
    yield "talker.codec_head.weight", (c["vocab_size"], hidden)
    yield from _stack("talker.code_predictor.model", predictor)
    for i in range(c["num_code_groups"] - 1):
        yield f"talker.code_predictor.model.codec_embedding.{i}.weight", (codes, hidden)
        yield f"talker.code_predictor.lm_head.{i}.weight", (codes, narrow)
    if hidden != narrow:
        yield from _linear("talker.code_predictor.small_to_mtp_projection", hidden, narrow)


def _stack(name: str, c: Mapping[str, Any]) -> Shapes:
    hidden, head, inner = c["hidden_size"], c["head_dim"], c["intermediate_size"]
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    for i in range(c["num_hidden_layers"]):
        layer = f"{name}.layers.{i}"
        yield from _attention(f"{layer}.self_attn", hidden, q, kv)
        yield f"{layer}.self_attn.q_norm.weight", (head,)
        yield f"{layer}.self_attn.k_norm.weight", (head,)
        yield from _swiglu(f"{layer}.mlp", hidden, inner)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield f"{name}.norm.weight", (hidden,)


def _speaker_encoder(c: Mapping[str, Any]) -> Shapes:
    """ECAPA-TDNN; the official class defaults hold where the config is silent."""
    first, *middle, last = c.get("enc_channels", [512, 512, 512, 512, 1536])
    kernels = [5, *(3 for _ in middle), 1]
    squeeze, attention = c.get("enc_se_channels", 128), c.get("enc_attention_channels", 128)
    yield from _conv("speaker_encoder.blocks.0.conv", MELS, first, kernels[0])
    for i, width in enumerate(middle, start=1):
        block = f"speaker_encoder.blocks.{i}"
        yield from _conv(f"{block}.tdnn1.conv", first, width, 1)
        for j in range(RES2NET_SCALE - 1):
            part = width // RES2NET_SCALE
            yield from _conv(f"{block}.res2net_block.blocks.{j}.conv", part, part, kernels[i])
        yield from _conv(f"{block}.tdnn2.conv", width, width, 1)
        yield from _conv(f"{block}.se_block.conv1", width, squeeze, 1)
        yield from _conv(f"{block}.se_block.conv2", squeeze, width, 1)
    yield from _conv("speaker_encoder.mfa.conv", sum(middle), last, kernels[-1])
    yield from _conv("speaker_encoder.asp.tdnn.conv", 3 * last, attention, 1)
    yield from _conv("speaker_encoder.asp.conv", attention, last, 1)
    yield from _conv("speaker_encoder.fc", 2 * last, c["enc_dim"], 1)


def _encoder(c: Mapping[str, Any]) -> Shapes:
    hidden, width, kernel = c["hidden_size"], c["num_filters"], c["kernel_size"]
    yield from _conv("encoder.encoder.layers.0.conv", c["audio_channels"], width, kernel)
    index = 1
    for ratio in reversed(c["upsampling_ratios"]):
        inner = width // c["compress"]
        yield from _conv(f"encoder.encoder.layers.{index}.block.1.conv", width, inner, c["residual_kernel_size"])
        yield from _conv(f"encoder.encoder.layers.{index}.block.3.conv", inner, width, 1)
        yield from _conv(f"encoder.encoder.layers.{index + 2}.conv", width, 2 * width, 2 * ratio)
        width, index = 2 * width, index + 3
    yield from _conv(f"encoder.encoder.layers.{index + 1}.conv", width, hidden, c["last_kernel_size"])
    for i in range(c["num_hidden_layers"]):
        layer = f"encoder.encoder_transformer.layers.{i}"
        yield from _attention(
            f"{layer}.self_attn",
            hidden,
            c["num_attention_heads"] * c["head_dim"],
            c["num_key_value_heads"] * c["head_dim"],
        )
        yield f"{layer}.mlp.fc1.weight", (c["intermediate_size"], hidden)
        yield f"{layer}.mlp.fc2.weight", (hidden, c["intermediate_size"])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{norm}.weight", (hidden,)
            yield f"{layer}.{norm}.bias", (hidden,)
        yield f"{layer}.self_attn_layer_scale.scale", (hidden,)
        yield f"{layer}.mlp_layer_scale.scale", (hidden,)
    yield "encoder.downsample.conv.weight", (hidden, hidden, 4)
    semantic = c["num_semantic_quantizers"]
    for kind, count in (("semantic", semantic), ("acoustic", c["num_quantizers"] - semantic)):
        name, entry = f"encoder.quantizer.{kind}_residual_vector_quantizer", c["codebook_dim"]
        yield from _quantizer_ends(name, hidden, c["vector_quantization_hidden_dimension"])
        for i in range(count):
            book = f"{name}.layers.{i}.codebook"
            yield f"{book}.initialized", (1,)
            yield f"{book}.cluster_usage", (c["codebook_size"],)
            yield f"{book}.embed_sum", (c["codebook_size"], entry)


def _decoder(c: Mapping[str, Any]) -> Shapes:
    hidden, latent, width = c["hidden_size"], c["latent_dim"], c["decoder_dim"]
    entry, semantic = c["codebook_dim"] // 2, c["num_semantic_quantizers"]
    for kind, count in (("rvq_first", semantic), ("rvq_rest", c["num_quantizers"] - semantic)):
        name = f"decoder.quantizer.{kind}"
        yield from _quantizer_ends(name, c["codebook_dim"], entry)
        for i in range(count):
            yield f"{name}.vq.layers.{i}._codebook.cluster_usage", (c["codebook_size"],)
            yield f"{name}.vq.layers.{i}._codebook.embedding_sum", (c["codebook_size"], entry)
    yield from _conv("decoder.pre_conv.conv", c["codebook_dim"], latent, 3)
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    for i in range(c["num_hidden_layers"]):
        layer = f"decoder.pre_transformer.layers.{i}"
        yield from _attention(f"{layer}.self_attn", hidden, q, kv)
        yield from _swiglu(f"{layer}.mlp", hidden, c["intermediate_size"])
        for part in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            yield f"{layer}.{part}", (hidden,)
        for part in ("self_attn_layer_scale.scale", "mlp_layer_scale.scale"):
            yield f"{layer}.{part}", (hidden,)
    yield "decoder.pre_transformer.norm.weight", (hidden,)
    yield from _linear("decoder.pre_transformer.input_proj", latent, hidden)
    yield from _linear("decoder.pre_transformer.output_proj", hidden, latent)
    for i, ratio in enumerate(c["upsampling_ratios"]):
        yield from _transposed(f"decoder.upsample.{i}.0.conv", latent, latent, ratio)
        block = f"decoder.upsample.{i}.1"
        yield f"{block}.gamma", (latent,)
        yield f"{block}.dwconv.conv.weight", (latent, 1, 7)
        for part in ("dwconv.conv.bias", "norm.weight", "norm.bias"):
            yield f"{block}.{part}", (latent,)
        yield from _linear(f"{block}.pwconv1", latent, 4 * latent)
        yield from _linear(f"{block}.pwconv2", 4 * latent, latent)
    yield from _conv("decoder.decoder.0.conv", latent, width, 7)
    for i, rate in enumerate(c["upsample_rates"], start=1):
        block = f"decoder.decoder.{i}.block"
        yield from _snake(f"{block}.0", width)
        yield from _transposed(f"{block}.1.conv", width, width // 2, 2 * rate)
        width //= 2
        for unit in (2, 3, 4):
            yield from _snake(f"{block}.{unit}.act1", width)
            yield from _conv(f"{block}.{unit}.conv1.conv", width, width, 7)
            yield from _snake(f"{block}.{unit}.act2", width)
            yield from _conv(f"{block}.{unit}.conv2.conv", width, width, 1)
    last = len(c["upsample_rates"]) + 1
    yield from _snake(f"decoder.decoder.{last}", width)
    yield from _conv(f"decoder.decoder.{last + 1}.conv", width, 1, 7)


def _attention(name: str, hidden: int, q: int, kv: int) -> Shapes:
    for part, size in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
        yield f"{name}.{part}.weight", (size, hidden)
    yield f"{name}.o_proj.weight", (hidden, q)


def _swiglu(name: str, hidden: int, inner: int) -> Shapes:
    yield f"{name}.gate_proj.weight", (inner, hidden)
    yield f"{name}.up_proj.weight", (inner, hidden)
    yield f"{name}.down_proj.weight", (hidden, inner)


def _linear(name: str, n_in: int, n_out: int) -> Shapes:
    yield f"{name}.weight", (n_out, n_in)
    yield f"{name}.bias", (n_out,)


def _conv(name: str, n_in: int, n_out: int, kernel: int) -> Shapes:
    yield f"{name}.weight", (n_out, n_in, kernel)
    yield f"{name}.bias", (n_out,)


def _transposed(name: str, n_in: int, n_out: int, kernel: int) -> Shapes:
    yield f"{name}.weight", (n_in, n_out, kernel)
    yield f"{name}.bias", (n_out,)


def _snake(name: str, width: int) -> Shapes:
    yield f"{name}.alpha", (width,)
    yield f"{name}.beta", (width,)


def _quantizer_ends(name: str, outside: int, inside: int) -> Shapes:
    yield f"{name}.input_proj.weight", (inside, outside, 1)
    yield f"{name}.output_proj.weight", (outside, inside, 1)
