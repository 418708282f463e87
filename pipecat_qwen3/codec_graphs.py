"""The codec on a GPU: one CUDA graph for each power of two of voices and frames, on a stream beside the caller's.

All graphs are captured when the runner is made, share one memory pool and work on the same state, whose rows they are
told by an index. Codes are copied on the device; samples go to pinned memory, and only who wants them waits.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pipecat_qwen3.codec import FoldedCodec, check_layout
from pipecat_qwen3.codec_runner import CodecRunner, Part, Samples
from pipecat_qwen3.codec_state import MAX_FRAMES, CodecState
from pipecat_qwen3.errors import BadRequestError

HOST_BUFFERS = 16
"""Replays whose samples may be on their way to the host before another waits for the oldest: several ticks of them."""


class Cuda:
    """What GraphRunner asks of a GPU. With `own_stream` it runs beside the caller's next work, else in line with it."""

    def __init__(self, own_stream: bool = True) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream() if own_stream else None

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """A call that does the same work on the same tensors again. Runs it twice first: compilers, caches."""
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
            work()
        side.synchronize()
        with torch.cuda.graph(graph, self._pool, side, capture_error_mode="thread_local"):
            work()
        return graph.replay

    @contextmanager
    def after_caller(self, codes: Tensor | None = None) -> Iterator[None]:
        """Inside, work is enqueued behind what the caller has enqueued so far, such as what writes `codes`."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        if codes is not None and codes.is_cuda:
            codes.record_stream(self._stream)  # their memory is not given away before they are read
        with torch.cuda.stream(self._stream):
            yield

    def host(self, size: int, dtype: torch.dtype) -> Tensor:
        """Pinned memory, with which copies do not wait."""
        return torch.empty(size, dtype=dtype, pin_memory=True)

    def mark(self) -> torch.cuda.Event:
        """The end of what has been enqueued."""
        event = torch.cuda.Event()
        event.record()
        return event


class GraphRunner(CodecRunner):
    """A CodecRunner that replays graphs for up to `voices` voices; a row behind the others fills their empty places."""

    def __init__(self, codec: FoldedCodec, rows: int, voices: int, device: Cuda) -> None:
        super().__init__(codec, rows + 1)
        self._device, self._spare, self._most = device, rows, 1 << (voices - 1).bit_length()
        sizes = [
            (1 << n, 1 << t)
            for n in reversed(range(self._most.bit_length()))
            for t in reversed(range(MAX_FRAMES.bit_length()))
        ]  # the largest first, since the others fit into its memory
        self._graphs = {size: _Graph(codec, self.state, *size, device) for size in sizes}
        samples = self._most * MAX_FRAMES * codec.config.frame_samples
        self._buffers = deque(_Buffer(device, self._most, samples) for _ in range(HOST_BUFFERS))

    def decode(self, codes: Tensor, rows: Sequence[int]) -> Samples:
        """As CodecRunner.decode, but returns before anything is done."""
        check_layout(codes, self.codec.config)
        if len(rows) != len(codes):
            raise BadRequestError(f"rows should be {len(codes)}, one for each voice of codes, but are {list(rows)}")
        most = self._most
        with self._device.after_caller(codes):
            return Samples([self._decode(part, rows[i * most :][:most]) for i, part in enumerate(codes.split(most))])

    def reset(self, row: int) -> None:
        """Forget one voice, after what has been enqueued for it."""
        with self._device.after_caller():
            super().reset(row)

    def copy_row(self, src: int, dst: int, source: CodecState | None = None) -> None:
        """As CodecRunner.copy_row, after what has been enqueued."""
        with self._device.after_caller():
            super().copy_row(src, dst, source)

    def _decode(self, codes: Tensor, rows: Sequence[int]) -> list[Part]:
        voices = 1 << (len(rows) - 1).bit_length()
        padded = torch.tensor([*rows, *[self._spare] * (voices - len(rows))])
        parts, start, frames = [], 0, codes.shape[2]
        while start < frames:
            size = min(1 << ((frames - start).bit_length() - 1), MAX_FRAMES)
            parts.append(self._replay(self._graphs[voices, size], codes[..., start : start + size], padded))
            start += size
        return parts

    def _replay(self, graph: "_Graph", codes: Tensor, rows: Tensor) -> Part:
        buffer = self._buffers[0]
        self._buffers.rotate(-1)
        if buffer.part is not None:
            buffer.part.fetch()
        buffer.rows[: len(rows)] = rows
        graph.rows.copy_(buffer.rows[: len(rows)], non_blocking=True)
        graph.codes[: len(codes)].copy_(codes)
        graph.replay()
        made = graph.samples[: len(codes)]
        memory = buffer.samples[: made.numel()].view(made.shape)
        memory.copy_(made, non_blocking=True)
        buffer.part = Part(memory, self._device.mark())
        return buffer.part


class _Graph:
    """One captured decode, and the tensors that it reads and writes."""

    samples: Tensor

    def __init__(self, codec: FoldedCodec, state: CodecState, voices: int, frames: int, device: Cuda) -> None:
        self.codes = torch.zeros(voices, codec.config.codebooks, frames, dtype=torch.int32, device=codec.device)
        self.rows = torch.full((voices,), len(state.frames_done) - 1, device=codec.device)

        def work() -> None:
            self.samples = codec.decode(self.codes, state, self.rows)

        self.replay = device.capture(work)


class _Buffer:
    """Host memory of one replay, and the part that used it last."""

    def __init__(self, device: Cuda, voices: int, samples: int) -> None:
        self.rows = device.host(voices, torch.int64)
        self.samples = device.host(samples, torch.float32)
        self.part: Part | None = None
