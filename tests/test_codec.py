import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipecat_qwen3.codec import CodecDecoder, FoldedCodec, check_codes
from pipecat_qwen3.codec_layers import Codebook
from pipecat_qwen3.codec_state import CodecState
from pipecat_qwen3.config import CodecConfig, read_codec_config
from pipecat_qwen3.errors import BadRequestError

EMBEDDED = Path(__file__).parent.parent / "pipecat_qwen3" / "embedded"
WEIGHTS = EMBEDDED / "speech_tokenizer" / "model.safetensors"
GOLDEN = Path(__file__).parent / "golden" / "codec.npz"
TINY = CodecConfig(
    codebooks=3,
    codebook_size=16,
    codebook_dim=8,
    latent=12,
    hidden=16,
    intermediate=24,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    window=5,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    decoder_dim=16,
    upsample_rates=(3, 2),
    upsampling_ratios=(2,),
    sample_rate=24_000,
)
OFFICIAL = CodecConfig(
    codebooks=16,
    codebook_size=2048,
    codebook_dim=512,
    latent=1024,
    hidden=512,
    intermediate=1024,
    layers=8,
    heads=16,
    kv_heads=16,
    head_dim=64,
    window=72,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    decoder_dim=1536,
    upsample_rates=(8, 5, 4, 3),
    upsampling_ratios=(2, 2),
    sample_rate=24_000,
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def embedded_weights() -> dict[str, Tensor]:
    prefix = "decoder."
    return {name.removeprefix(prefix): w for name, w in load_file(WEIGHTS).items() if name.startswith(prefix)}


def make_decoder(which: str | CodecConfig) -> CodecDecoder:
    """The embedded codec, or a random one of a geometry, "tiny" or given."""
    if which == "embedded":
        with torch.device("meta"):
            decoder = CodecDecoder(read_codec_config(EMBEDDED))
        decoder.load_state_dict(embedded_weights(), assign=True)
        return decoder.float()
    torch.manual_seed(0)
    decoder = CodecDecoder(TINY if isinstance(which, str) else which)
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if weight.dim() == 1 or name.endswith(
                "gamma"
            ):  # norms, biases, scales: nothing at rest, nothing negligible
                weight.copy_(0.3 * torch.randn_like(weight) + (1.0 if "norm" in name else 0.0))
        decoder.decoder[-1].conv.weight.mul_(0.2)  # type: ignore[union-attr, operator]
    return decoder


@pytest.fixture(scope="module", params=["embedded", "tiny"])
def decoder(request: pytest.FixtureRequest) -> CodecDecoder:
    return make_decoder(request.param)


@pytest.fixture(scope="module")
def tiny() -> FoldedCodec:
    return make_decoder("tiny").fold()


def random_codes(config: CodecConfig, voices: int, frames: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.codebook_size, (voices, config.codebooks, frames), generator=generator)


def row(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def stream(codec: FoldedCodec, codes: Tensor, chunks: list[int]) -> Tensor:
    """Decode one chunk after the other in a state of its own; the last size goes on."""
    voices, _, frames = codes.shape
    state, rows = CodecState.zeros(codec.config, voices), torch.arange(voices)
    pieces, start = [], 0
    while start < frames:
        size = chunks[min(len(pieces), len(chunks) - 1)]
        pieces.append(codec.decode(codes[:, :, start : start + size], state, rows))
        start += size
    return torch.cat(pieces, 1)


def noisy_state(config: CodecConfig, rows: int) -> CodecState:
    state = CodecState.zeros(config, rows)
    state.tails.normal_(std=100.0)
    state.kv.normal_(std=100.0)
    state.frames_done.random_(1, 1000)
    return state


@pytest.mark.parametrize("chunks", [[1], [2], [3], [7], [60], [1, 1, 2, 4, 8]], ids=str)
def test_any_chunk_size_gives_the_samples_of_the_whole_decode(decoder, chunks):
    codes = random_codes(decoder.config, 2, 60)
    with torch.no_grad():
        whole = decoder(codes)
    assert whole.shape == (2, 60 * decoder.config.frame_samples)
    assert 0.01 < whole.std() < 0.9  # neither silent nor clipped, so that an error shows
    torch.testing.assert_close(stream(decoder.fold(), codes, chunks), whole, atol=1e-4, rtol=0)


def test_samples_are_those_of_the_official_decoder():
    golden = np.load(GOLDEN)
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == str(golden["sha256"]), (
        "the embedded codec has changed: run tests/golden/make_codec.py"
    )
    decoder = make_decoder("embedded")
    codes = torch.from_numpy(golden["codes"]).long()
    with torch.no_grad():
        whole = decoder(codes)
    for samples in (whole, stream(decoder.fold(), codes, [1, 1, 2, 4, 8])):
        frames = samples.view(-1, decoder.config.frame_samples).numpy()
        np.testing.assert_allclose(frames[golden["frames"]], golden["samples"], atol=1e-4, rtol=0)
        np.testing.assert_allclose(frames.reshape(-1)[::16], golden["every"], atol=1e-4, rtol=0)


def test_voices_that_came_differently_far_decode_together_as_each_alone(decoder):
    codec, config = decoder.fold(), decoder.config
    codes = random_codes(config, 3, 40)
    alone = [stream(codec, codes[v : v + 1], [1])[0].view(40, -1) for v in range(3)]
    state, begun = CodecState.zeros(config, 5), [0, 3, 31]
    where = [4, 0, 2]
    for voice in (1, 2):
        codec.decode(codes[voice : voice + 1, :, : begun[voice]], state, row(where[voice]))
    for step, order in ((2, (2, 0, 1)), (1, (0, 1, 2)), (5, (1, 2, 0))):
        chunk = torch.stack([codes[v, :, begun[v] : begun[v] + step] for v in order])
        samples = codec.decode(chunk, state, row(*(where[v] for v in order)))
        for got, v in zip(samples, order, strict=True):
            expected = alone[v][begun[v] : begun[v] + step].reshape(-1)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
            begun[v] += step
    assert state.frames_done.tolist() == [begun[1], 0, begun[2], 0, begun[0]]


def test_a_row_that_is_not_named_keeps_every_bit(tiny):
    state = noisy_state(TINY, 4)
    state.reset(1)
    state.reset(3)
    before = [array.clone() for array in state.arrays]
    for frames in (1, 9):
        tiny.decode(random_codes(TINY, 2, frames), state, row(3, 1))
    for array, old in zip(state.arrays, before, strict=True):
        assert torch.equal(array[[0, 2]], old[[0, 2]])
        assert not torch.equal(array[[1, 3]], old[[1, 3]])


def test_what_lies_in_the_ring_beyond_the_decoded_frames_is_never_read(tiny):
    codes = random_codes(TINY, 1, 12)
    state = CodecState.zeros(TINY, 1)
    state.kv.normal_(std=100.0)
    samples = torch.cat([tiny.decode(codes[..., t : t + 1], state, row(0)) for t in range(12)], 1)
    assert torch.equal(samples, stream(tiny, codes, [1]))


def test_a_reset_row_has_forgotten_its_voice_and_its_neighbours_have_not(tiny):
    codes = random_codes(TINY, 1, 9)
    state = noisy_state(TINY, 3)
    neighbours = [array[[0, 2]] for array in state.arrays]
    state.reset(1)
    assert torch.equal(tiny.decode(codes, state, row(1)), stream(tiny, codes, [9]))
    assert all(torch.equal(a[[0, 2]], old) for a, old in zip(state.arrays, neighbours, strict=True))


def test_a_copied_row_goes_on_as_the_original_would(tiny):
    codes = random_codes(TINY, 1, 20)
    expected = stream(tiny, codes, [11, 9])[:, 11 * TINY.frame_samples :]
    state, primed = noisy_state(TINY, 3), CodecState.zeros(TINY, 1)
    tiny.decode(codes[..., :11], primed, row(0))
    state.copy_row(0, 2, source=primed)
    state.copy_row(2, 0)
    both = tiny.decode(codes[..., 11:].expand(2, -1, -1), state, row(0, 2))
    torch.testing.assert_close(both, expected.expand(2, -1), atol=1e-5, rtol=0)
    assert primed.frames_done.tolist() == [11]


def test_what_is_loaded_is_exported_unchanged_under_the_official_names():
    weights = embedded_weights()
    with torch.device("meta"):
        decoder = CodecDecoder(read_codec_config(EMBEDDED))
    decoder.load_state_dict(weights, assign=True)
    decoder.fold()
    exported = decoder.state_dict()
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weight) for name, weight in weights.items())


def test_a_folded_codec_does_not_follow_later_training():
    decoder = make_decoder("tiny")
    codec, codes = decoder.fold(), random_codes(TINY, 1, 6)
    before = stream(codec, codes, [6])
    with torch.no_grad():
        for array in decoder.state_dict().values():
            array.add_(0.1)
    assert torch.equal(stream(codec, codes, [6]), before)


def test_gradients_of_the_whole_decode_reach_every_parameter_it_uses():
    decoder = make_decoder("tiny")
    decoder(random_codes(TINY, 2, 8)).square().sum().backward()
    without = {name for name, weight in decoder.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert without == {f"quantizer.{part}.input_proj.weight" for part in ("rvq_first", "rvq_rest")}


def test_latents_decode_as_the_codes_that_chose_them():
    decoder = make_decoder("tiny")
    codes = random_codes(TINY, 1, 8)
    latents = decoder.quantizer(codes).detach().requires_grad_()
    samples = decoder.forward_latents(latents)
    assert torch.equal(samples, decoder(codes))
    samples.sum().backward()
    assert latents.grad is not None
    assert latents.grad.any()


def test_a_voice_takes_less_than_six_megabytes_in_the_official_geometry():
    state = CodecState.zeros(OFFICIAL, 1, device="meta")
    # counted by hand, layer by layer: convolutions; keys and values of the 71 frames behind and of eight new ones
    assert state.row_bytes == 4 * (135_232 + 1_163_264 * 79 // 71) + 8


def test_decoding_never_asks_the_device_for_a_value():
    with torch.device("meta"):  # where there are no values, so that asking raises
        codec = CodecDecoder(OFFICIAL).fold()
        state, codes = CodecState.zeros(OFFICIAL, 5, "meta"), torch.zeros(3, 16, 2, dtype=torch.int64)
        assert codec.decode(codes, state, torch.zeros(3, dtype=torch.int64)).shape == (3, 2 * 1920)


def test_an_entry_that_hardly_any_vector_chose_counts_as_chosen_a_hundred_thousandth_times():
    codebook = Codebook(3, 2)
    codebook.embedding_sum.copy_(torch.tensor([[1.0, 2.0], [1e-5, 2e-5], [3.0, 9.0]]))
    codebook.cluster_usage.copy_(torch.tensor([0.5, 0.0, 3.0]))
    torch.testing.assert_close(codebook.entries(), torch.tensor([[2.0, 4.0], [1.0, 2.0], [1.0, 3.0]]))


def test_a_window_of_one_frame_has_no_past():
    torch.manual_seed(0)
    decoder = CodecDecoder(replace(TINY, window=1))
    codes = random_codes(TINY, 1, 6)
    with torch.no_grad():
        torch.testing.assert_close(stream(decoder.fold(), codes, [1]), decoder(codes), atol=1e-4, rtol=0)


GOOD = random_codes(TINY, 2, 4)


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        (GOOD.index_fill(2, row(3), -1), "0..15, but reach from -1 to "),
        (GOOD.clone().fill_(16), "0..15, but reach from 16 to 16"),
        (GOOD.float(), "int64 or int32, but are torch.float32"),
        (GOOD[0], r"[voices, 3, frames], but have [3, 4]"),
        (GOOD.transpose(1, 2), r"[voices, 3, frames], but have [2, 4, 3]"),
        (GOOD[:, :2], r"[voices, 3, frames], but have [2, 2, 4]"),
        (GOOD[:, :, :0], r"[voices, 3, frames], but have [2, 3, 0]"),
    ],
    ids=["padding", "too large", "floats", "no voices", "frames first", "a codebook short", "no frames"],
)
def test_bad_codes_are_refused_in_one_line_before_anything_changes(tiny, codes, words):
    state = CodecState.zeros(TINY, 2)
    calls = (
        lambda: check_codes(codes, TINY),
        lambda: tiny.decode(codes, state, row(0, 1)),
        lambda: make_decoder("tiny")(codes),
    )
    for call in calls:
        with pytest.raises(BadRequestError) as caught:
            call()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not any(array.any() for array in state.arrays)


@pytest.mark.parametrize("rows", [torch.tensor([0]), torch.tensor([0, 1], dtype=torch.int32)], ids=["short", "int32"])
def test_rows_that_do_not_fit_the_codes_are_refused_in_one_line(tiny, rows):
    with pytest.raises(BadRequestError, match=r"^rows should be int64 \[2\].*") as caught:
        tiny.decode(GOOD, CodecState.zeros(TINY, 2), rows)
    assert "\n" not in str(caught.value)


def test_codes_may_be_int32_as_a_frame_step_returns_them(tiny):
    assert torch.equal(stream(tiny, GOOD.int(), [2]), stream(tiny, GOOD, [2]))
