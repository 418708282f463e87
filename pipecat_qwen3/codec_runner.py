"""Codes go in where the talker left them, samples come out on the host: the codec with the memory of its voices.

On a CPU a call decodes at once; on a GPU it starts a graph and returns (see `codec_graphs.py`). One thread calls.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipecat_qwen3.backend import FRAME_SAMPLES
from pipecat_qwen3.codec import FoldedCodec
from pipecat_qwen3.codec_state import CodecState


class Part:
    """Samples [N, L] fp32 that lie in `memory` after `event`."""

    def __init__(self, memory: Tensor, event: torch.cuda.Event | None = None) -> None:
        self._memory, self._event = memory, event

    def ready(self) -> bool:
        """Whether `fetch` need not wait."""
        return self._event is None or self._event.query()

    def fetch(self) -> np.ndarray:
        """The samples. Once an event has been waited for, they are a copy."""
        if self._event is not None:
            self._event.synchronize()
            self._memory, self._event = self._memory.clone(), None
        return self._memory.numpy()


class Samples:
    """What a decode has made or will have made: parts of its frames for each group of its voices."""

    def __init__(self, groups: list[list[Part]]) -> None:
        self._groups = groups

    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        return all(part.ready() for parts in self._groups for part in parts)

    def wait(self) -> np.ndarray:
        """[N, frame_samples * T] fp32 in [-1, 1]."""
        return np.concatenate([np.concatenate([part.fetch() for part in parts], 1) for parts in self._groups])


class CodecRunner:
    """Decodes at once, with `rows` voices in `state`."""

    def __init__(self, codec: FoldedCodec, rows: int) -> None:
        self.codec, self.state = codec, CodecState.zeros(codec.config, rows, codec.device)

    def decode(self, codes: Tensor, rows: Sequence[int]) -> Samples:
        """Decode T more frames of N voices, each in a row of its own, and advance those rows.

        codes  [N, C, T] int32 or int64; on a GPU they are read later, and those out of range are clamped

        Raises BadRequestError.
        """
        return Samples([[Part(self.codec.decode(codes, self.state, torch.tensor(rows)))]])

    def reset(self, row: int) -> None:
        """Forget one voice."""
        self.state.reset(row)

    def copy_row(self, src: int, dst: int, source: CodecState | None = None) -> None:
        """Make row `dst` a copy of row `src` of this state, or of `source`, which may keep primed voices."""
        self.state.copy_row(src, dst, source)


class Mute(CodecRunner):
    """Stands in where only codes are wanted: silence as long as the speech."""

    def __init__(self) -> None:
        pass

    def decode(self, codes: Tensor, rows: Sequence[int]) -> Samples:
        """Codes [N,C,T] -> zeros [N, samples]."""
        return Samples([[Part(torch.zeros(len(rows), codes.shape[2] * FRAME_SAMPLES))]])

    def reset(self, row: int) -> None:
        """Nothing is remembered."""


def open_codec(codec: FoldedCodec, rows: int, voices: int, own_stream: bool = True) -> CodecRunner:
    """The runner for the device that the codec's weights lie on; on a GPU this compiles and captures.

    rows        voices whose memory is kept
    voices      most that the engine decodes at a time; more take several graphs
    own_stream  on a GPU, let the codec run beside what its caller's stream does next
    """
    if codec.device.type == "cuda":
        from pipecat_qwen3.codec_graphs import Cuda, GraphRunner

        return GraphRunner(codec, rows, voices, Cuda(own_stream))
    return CodecRunner(codec, rows)
