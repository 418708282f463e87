"""Small models, voices and disturbed launches for the kernels' tests; compiled kernels are shared between all tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from megakernel import cucpu, kernels
from megakernel.cucpu.launcher import SOURCES, CpuLauncher
from megakernel.frame_step import PIECE, FrameStep
from megakernel.kernel_step import KernelFrameStep
from megakernel.kernels import Args
from megakernel.pack import pack_frame
from megakernel.reference import FrameWeights, LayerWeights, StackWeights
from megakernel.sampler import Sampling
from megakernel.schedule import Part
from megakernel.shape import SUPPRESSED, Shape, StackShape

CODES = 64
EOS = CODES + 100
_VOCAB = CODES + SUPPRESSED


def small_shape(talker: StackShape, predictor: StackShape, codebooks: int, projected: bool = False) -> Shape:
    """A shape with small codebooks."""
    return Shape(talker, predictor, codebooks, CODES, _VOCAB, EOS, projected)


PLAIN = small_shape(StackShape(2, 64, 96, 4, 2, 32), StackShape(2, 64, 64, 4, 2, 32), 4)
"""Two query heads share a key head."""

PROJECTED = small_shape(StackShape(2, 128, 256, 4, 4, 32), StackShape(1, 64, 80, 8, 2, 32), 4, projected=True)
"""As the 1.7B: a narrower predictor behind a projection. A key head for each query head, in the predictor for four."""

WIDE = small_shape(StackShape(2, 96, 112, 4, 1, 128), StackShape(2, 96, 112, 4, 1, 128), 3)
"""As the 0.6B: like layers in talker and predictor, heads wider than the hidden size. Four share a key head."""

SHAPES = {"plain": PLAIN, "projected": PROJECTED, "wide": WIDE}


def random_weights(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> FrameWeights:
    """Weights that keep activations near 1, and logits with a standard deviation of 2."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(*sizes: int) -> Tensor:
        return (torch.randn(*sizes, generator=generator) / sizes[-1] ** 0.5).to(dtype)

    def norm(size: int) -> Tensor:
        return (1 + torch.randn(size, generator=generator) / 5).to(dtype)

    def layer(s: StackShape) -> LayerWeights:
        q, k = norm(s.head_dim), norm(s.head_dim)
        return LayerWeights(
            input_norm=norm(s.hidden),
            qkv=matrix(s.q_size + 2 * s.kv_size, s.hidden),
            qk_norm=torch.cat([q.expand(s.heads, -1), k.expand(s.kv_heads, -1)]),
            o=matrix(s.hidden, s.q_size),
            post_norm=norm(s.hidden),
            gate_up=matrix(2 * s.intermediate, s.hidden),
            down=matrix(s.hidden, s.intermediate),
        )

    talker, predictor = shape.talker, shape.predictor
    others = shape.codebooks - 1
    return FrameWeights(
        talker=StackWeights([layer(talker) for _ in range(talker.layers)], norm(talker.hidden)),
        predictor=StackWeights([layer(predictor) for _ in range(predictor.layers)], norm(predictor.hidden)),
        codec_head=2 * matrix(shape.vocab, talker.hidden),
        heads=2 * matrix(others, shape.codes, predictor.hidden),
        embeddings=talker.hidden**0.5 * matrix(shape.codebooks, shape.codes, talker.hidden) / shape.codebooks**0.5,
        inputs=predictor.hidden**0.5 * matrix(others, shape.codes, predictor.hidden),
        projection=(matrix(predictor.hidden, talker.hidden), norm(predictor.hidden)) if shape.projected else None,
    )


weights_of = cache(random_weights)
packed_weights = cache(lambda shape, dtype: pack_frame(weights_of(shape, dtype), shape))


def cast(weights: FrameWeights, dtype: torch.dtype) -> FrameWeights:
    """The same values in another dtype."""

    def stack(s: StackWeights) -> StackWeights:
        layers = [LayerWeights(**{name: value.to(dtype) for name, value in vars(layer).items()}) for layer in s.layers]
        return StackWeights(layers, s.norm.to(dtype))

    projection = weights.projection
    assert isinstance(weights.heads, Tensor)
    return replace(
        weights,
        talker=stack(weights.talker),
        predictor=stack(weights.predictor),
        projection=None if projection is None else (projection[0].to(dtype), projection[1].to(dtype)),
        **{n: getattr(weights, n).to(dtype) for n in ("codec_head", "heads", "embeddings", "inputs")},
    )


# -- launching ---------------------------------------------------------------------------------------------------------


@cache
def compiled(
    shape: Shape,
    columns: int,
    blocks: int,
    threads: int,
    fp32: bool,
    staged_bytes: int,
    flavour: cucpu.Flavour,
    sources: Path,
) -> cucpu.Library:
    """A library, compiled once for all launchers that are alike."""
    like = CpuLauncher(shape, blocks, threads, fp32=fp32, staged_bytes=staged_bytes)
    talker, predictor = like.cuts[Part.TALKER], like.cuts[Part.PREDICTOR]
    defines = kernels.definitions(shape, talker, predictor, columns, threads, staged_bytes, fp32)
    return cucpu.build(sources / "frame.cu", defines, flavour, [sources])


class _WithBuffers(cucpu.Library):
    """A library of a checked flavour, which must be told all tensors that the arguments point into."""

    def __init__(self, library: cucpu.Library, buffers: Sequence[Tensor]) -> None:
        super().__init__(library.path, library.flavour)
        self.buffers = buffers

    def launch(self, *args, **more) -> None:
        super().launch(*args, **more, buffers=self.buffers)


class TestLauncher(CpuLauncher):
    """CpuLauncher with libraries that all tests share, of any source folder."""

    __test__ = False
    sources = SOURCES
    step: KernelFrameStep

    def instance(self, columns: int) -> cucpu.Library:
        """The instance for so many columns."""
        library = compiled(
            self.shape,
            columns,
            self.blocks,
            self.threads,
            self.fp32,
            self.staged_bytes,
            self.flavour,
            self.sources,
        )
        return library if self.flavour == "plain" else _WithBuffers(library, tensors_of(self.step))


class DisturbedStep(KernelFrameStep):
    """KernelFrameStep whose launches find noise in everything that they must not read, and their voices in any column.

    width     columns of the instance that steps take; 0: the smallest
    at        the column of each named voice; None: in order
    noise     "nan" or "large", or None: whatever the last launch left
    patience  nanoseconds that a block waits for the others
    """

    width = 0
    at: Sequence[int] | None = None
    noise: str | None = None
    patience = 2_000_000_000

    def _args(self, table: str) -> Args:
        args = super()._args(table)
        args.patience = self.patience
        return args

    def _launch(self, table: str, columns: int) -> None:
        named = int((self.columns_host["row"] >= 0).sum())
        if table == "prefill":
            self._disturb(named)
            return super()._launch(table, columns)
        columns = self.width or columns
        at = list(range(named)) if self.at is None else list(self.at[:named])
        filled, text, uniforms = self.columns_host[:named].copy(), self.text[:named].clone(), self.uniforms
        self._disturb(0)
        self.columns_host[at], self.text[at] = filled, text
        if uniforms is not None:
            placed = torch.full((columns, self.shape.codebooks), float("nan"))
            placed[at] = uniforms[:named]
            self.uniforms = placed
        super()._launch(table, columns)
        self.uniforms = uniforms
        self.codes[:named] = self.codes[at].clone()

    def _disturb(self, kept: int) -> None:
        """Noise in the scratch and in all columns but the first `kept`."""
        if kept == 0:
            self.columns_host["row"] = -1
        if self.noise is None:
            return
        empty = self.columns_host["row"] < 0
        self.columns_host[empty] = 1_000_000
        self.columns_host["row"][empty] = -1
        keep = {"talker_rope", "predictor_rope", "barrier"}
        scratch = [tensor for name, tensor in self._scratch.items() if name not in keep]
        for tensor in (*scratch, self.text[kept:], self.codes):
            disturb(tensor, self.noise)


def disturb(tensor: Tensor, noise: str) -> None:
    """Fill with NaN, or with large random numbers; integers with large ones."""
    if not tensor.is_floating_point():
        tensor.random_(-(10**4), 10**4)
    elif noise == "nan":
        tensor.fill_(float("nan"))
    else:
        tensor.uniform_(-1e4, 1e4)


def kernel_step(
    shape: Shape,
    rows: int = 4,
    columns: int = 4,
    positions: int = 64,
    noise: str | None = None,
    kind: type[TestLauncher] = TestLauncher,
    **options,
) -> DisturbedStep:
    """The frame by the kernels on the CPU, with random weights; `options` are those of CpuLauncher.

    noise    fills all rows, and before every launch the scratch and the empty columns
    """
    launcher = kind(shape, **options)
    weights = packed_weights(shape, torch.float32 if launcher.fp32 else torch.bfloat16)
    step = DisturbedStep(weights, shape, rows, columns, positions, launcher)
    launcher.step = step
    if noise is not None:
        step.noise = noise
        for tensor in (step.kv, step.pending, step.history, step.done):
            disturb(tensor, noise)
    return step


def tensors_of(step: KernelFrameStep) -> list[Tensor]:
    """Every tensor that a launch is given."""
    weights = [value for value in vars(step.weights).values() if isinstance(value, Tensor)]
    state = [step.kv, step.pending, step.history, step.done, step.text, step.codes, step.report, step._columns]
    return [*weights, *(step.weights.projection or ()), *state, *step._tables.values(), *step._scratch.values()]


# -- voices ------------------------------------------------------------------------------------------------------------


@dataclass
class Voice:
    """One voice: what it starts from, what its text adds, how it is sampled.

    prefix   None, or random keys and values [L, 2, kv_heads, positions, D] in place of a long prompt
    """

    seed: int
    prompt: Tensor
    pending: Tensor
    text: Tensor
    sampling: Sampling
    prefix: Tensor | None = None

    def join(self, step: FrameStep, row: int) -> None:
        step.admit(row, self.pending, self.seed, self.sampling)
        if self.prefix is not None:
            step.load_prefix(row, self.prefix)
        for part in self.prompt.split(PIECE):
            step.prefill(row, part)

    def to(self, dtype: torch.dtype) -> "Voice":
        """The same voice for a model in another dtype."""
        prompt, pending, text = (x.to(dtype) for x in (self.prompt, self.pending, self.text))
        prefix = None if self.prefix is None else self.prefix.to(dtype)
        return replace(self, prompt=prompt, pending=pending, text=text, prefix=prefix)


def voice(shape: Shape, seed: int, positions: int = 0, dtype: torch.dtype = torch.float32, frames: int = 16) -> Voice:
    """A voice whose every property follows from its seed; `positions` of random keys and values before its prompt."""
    g = torch.Generator().manual_seed(seed)
    t = shape.talker
    prefix = torch.randn(t.layers, 2, t.kv_heads, positions, t.head_dim, generator=g).to(dtype) if positions else None
    sampling = Sampling(
        do_sample=seed % 3 > 0,
        temperature=0.7 + seed % 5 / 10,
        top_k=(0, 50, 20, 5)[seed % 4],
        top_p=(1.0, 0.9, 0.6)[seed // 2 % 3],
        repetition_penalty=(1.05, 1.5)[seed % 2],
        predictor_do_sample=seed % 5 > 0,
        predictor_temperature=0.9,
        predictor_top_k=(20, 0, 50)[seed % 3],
        predictor_top_p=(1.0, 0.8)[seed // 3 % 2],
    )
    return Voice(
        seed=seed + (seed << 40),
        prompt=torch.randn(1 + seed * 7 % 19, t.hidden, generator=g).to(dtype),
        pending=torch.randn(t.hidden, generator=g).to(dtype),
        text=torch.randn(frames, t.hidden, generator=g).to(dtype),
        sampling=sampling,
        prefix=prefix,
    )


def speak(step: FrameStep, voices: Mapping[int, Voice], plan: Sequence[Sequence[int]]) -> dict[int, Tensor]:
    """Advance the rows that each entry of the plan names; the codes of every row [frames, C]."""
    codes: dict[int, list[Tensor]] = {row: [] for row in voices}
    for rows in plan:
        text = torch.stack([voices[row].text[len(codes[row])] for row in rows])
        for row, drawn in zip(rows, step.step(rows, text), strict=True):
            codes[row].append(drawn.clone())
    return {row: torch.stack(drawn) for row, drawn in codes.items() if drawn}


def spoken(codes: Tensor, eos: int = EOS) -> Tensor:
    """Codes [frames, C] up to the end of speech; after it only code 0 means anything, and it stays EOS."""
    over = (codes[:, 0] == eos).nonzero()[:, 0]
    if not len(over):
        return codes
    end = int(over[0])
    assert (codes[end:, 0] == eos).all(), "a voice went on after the end of its speech"
    return codes[:end]


def assert_as_good_as(fast: Tensor, torch_bf16: Tensor, oracle: Tensor, slack: float = 2) -> None:
    """The root mean square error of `fast` is at most `slack` times that of torch in bf16."""
    ours, theirs = ((x.double() - oracle).square().mean().sqrt().item() for x in (fast, torch_bf16))
    assert ours <= slack * theirs, f"the error is {ours:.3g}, torch's in bf16 {theirs:.3g}"
