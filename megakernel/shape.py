"""Every size of a frame, once: read from a checkpoint's config by the caller, used by weights, twin and kernels.

The letters (B columns, S rows, L layers, H hidden, D head_dim, C codebooks, K entries of a codebook, V codec
vocabulary, P positions) are defined in megakernel/README.md.
"""

from dataclasses import dataclass

SUPPRESSED = 1024
"""The last 1024 ids of the codec vocabulary are control, language and speaker ids: never sampled, but for EOS."""


@dataclass(frozen=True)
class StackShape:
    """Sizes of one transformer stack: the talker or the code predictor."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6

    @property
    def q_size(self) -> int:
        """Width of the concatenated query heads; not the hidden size (2048 against 1024 in the 0.6B)."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the concatenated key heads, and of the value heads."""
        return self.kv_heads * self.head_dim

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Shape:
    """Sizes of one frame.

    codebooks   C, codes a frame: 16 in the official checkpoints
    codes       K, entries of a codebook and vocabulary of the code predictor's heads
    vocab       V, vocabulary of code 0: K codes and 1024 control ids
    eos         the id of V that ends the speech
    projected   the predictor's inputs pass small_to_mtp_projection (1.7B), a linear map with bias
    """

    talker: StackShape
    predictor: StackShape
    codebooks: int
    codes: int
    vocab: int
    eos: int
    projected: bool

    @property
    def suppress_from(self) -> int:
        """First suppressed id of the codec vocabulary."""
        return self.vocab - SUPPRESSED
