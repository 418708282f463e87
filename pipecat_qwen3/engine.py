"""Utterances in, audio on their streams out: many voices advance together, one frame a tick, on one thread.

A tick: take in text and cancels, admit voices to free rows, prefill a few pieces, advance every voice that can
go on by one frame, decode the chunks that are due. Joining, leaving and cancelling happen between frames. On a GPU the
codec works beside the talker: what one tick decodes is delivered by the next, when its frame is under way.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from megakernel import gpu
from megakernel.frame_step import PIECE, FrameStep
from pipecat_qwen3.backend import End, Load
from pipecat_qwen3.codec_runner import CodecRunner, Samples
from pipecat_qwen3.errors import BadRequestError, EngineError, OverloadedError, TextTimeoutError, TTSError
from pipecat_qwen3.exits import at_exit, forget
from pipecat_qwen3.prompt import Prompter, Voice
from pipecat_qwen3.utterance import TEXT_TIMEOUT_S, Utterance

logger = logging.getLogger(__name__)

PREFIX_POSITIONS = 2048
"""Positions of all prefixes whose KV is kept: 230 MB on the official sizes, 200 voices without instructions."""

UNTAKEN_S = 60.0
"""A live voice whose audio nobody begins to take gives its row back after so long."""

NO_ENDS: Mapping[int, End] = MappingProxyType({})


class Chunks(NamedTuple):
    """Decoded chunks that are still to be handed out: of which voices, and which of these are over, and how.

    samples is None for voices that are over and have nothing more to say.
    """

    samples: Samples | None
    voices: list[Utterance]
    ends: Mapping[int, End]


class Engine:
    """Owns the thread, the rows and the codec state.

    step      the resident voices; codec: the decoder with its memory, one row for each of step's rows
    waiting   utterances that may queue for a row; more are refused with OverloadedError
    prefills  pieces of prompts that may be read between two frames
    threads   torch threads of the engine's work on a CPU; None leaves the process's setting alone
    """

    def __init__(
        self,
        step: FrameStep,
        codec: CodecRunner,
        prompter: Prompter,
        waiting: int = 256,
        prefills: int = 1,
        threads: int | None = None,
    ) -> None:
        self.step, self.codec, self.prompter = step, codec, prompter
        self._max_waiting, self._prefills, self._threads = waiting, prefills, threads
        self._inbox: deque[Utterance] = deque()
        self._waiting: deque[Utterance] = deque()
        self._resident: list[Utterance] = []
        self._decoding: deque[Chunks] = deque()
        self._free = list(range(step.rows))[::-1]
        self._prefixes: OrderedDict[Voice, Tensor] = OrderedDict()
        self._frame_cost_s = 0.0
        self._changed = threading.Condition()
        self._awake = False
        self._closing = False
        self._closed = "the engine is closed; open the model again"
        self._thread = threading.Thread(target=self._run, name="pipecat-qwen3 engine", daemon=True)
        self._thread.start()
        at_exit(self.close)

    # -- any thread ------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """False once closed or dead."""
        return self._thread.is_alive() and not self._closing

    @property
    def load(self) -> Load:
        """How busy the engine is."""
        free = len(self._free)
        return Load(self.step.rows, self.step.rows - free, len(self._inbox) + len(self._waiting))

    def submit(self, utterance: Utterance) -> None:
        """Queue an utterance and return at once. Raises OverloadedError or EngineError."""
        with self._changed:
            if not self.alive:
                raise EngineError(self._closed)
            if len(self._inbox) + len(self._waiting) >= self._max_waiting:
                raise OverloadedError(f"{self._max_waiting} utterances are waiting already; try again later")
            self._inbox.append(utterance)
        self.wake()

    def wake(self) -> None:
        """Something changed: a text, a cancel, a submit."""
        with self._changed:
            self._awake = True
            self._changed.notify()

    def close(self, timeout_s: float = 10.0) -> None:
        """End every voice and the thread; idempotent."""
        with self._changed:
            self._closing = True
        forget(self.close)
        self.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    # -- the engine thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while not self._closing:
                try:
                    busy = self._tick()
                except Exception as error:
                    logger.exception("a tick of the engine failed")
                    first = str(error).partition("\n")[0]  # CUDA adds several lines of advice for programmers
                    if _gpu_is_lost(error):
                        self._closed, self._closing = gpu.LOST, True
                    self._end_all(EngineError(f"the engine failed: {type(error).__name__}: {first}"))
                    busy = True
                if not busy:
                    self._sleep()
            self._end_all(EngineError("the engine was closed while this voice was speaking"))

    def _sleep(self) -> None:
        """Wait for a wake-up, or until a voice's credit or its patience with late text runs out."""
        now = time.monotonic()
        waits = [u.last_text_at + TEXT_TIMEOUT_S - now for u in [*self._resident, *self._waiting] if u.starving]
        waits += [max(u.early_s, 0.02) for u in self._resident if u.is_prefilled and u.has_text]
        waits += [max(u.early_s, 0.02) for u in self._waiting if u.can_start and u.early_s >= 0]
        with self._changed:
            if not self._awake:
                self._changed.wait(max(0.0, min(waits)) if waits else None)
            self._awake = False

    def _tick(self) -> bool:
        """One frame for everybody who can; False if there was nothing to do."""
        with self._changed:
            self._awake = False
            self._waiting.extend(self._inbox)
            self._inbox.clear()
        self._take_in()
        self._admit()
        pieces = 0
        while pieces < self._prefills and self._prefill():
            pieces += 1
        self._deliver(wait=False)
        ready = self._ready()
        self._hand_over([u for u in self._resident if u not in ready])
        self._deliver(wait=False)
        if ready:
            started = time.monotonic()
            self._advance(ready)
            self._frame_cost_s += 0.1 * (time.monotonic() - started - self._frame_cost_s)
        else:
            self._deliver(wait=True)
        return bool(pieces or ready)

    def _take_in(self) -> None:
        """Read every voice's inbox; end those that were cancelled, failed, or ran out of patience."""
        now = time.monotonic()
        for u in [*self._waiting, *self._resident]:
            error = _guarded(u.read_inbox)
            if u.stream.cancelled:
                self._end(u, "cancelled")
            elif error is not None:
                self._end(u, "error", error)
            elif u.text.ended and not u.tokens:
                self._end(u, "eos")  # a text stream that never said anything
            elif u.text.ended and u.resting and not u.can_start:  # nothing but a full stop was left
                u.finished_text = True
                self._leave(u)
                self._hand_over([u], {id(u): "eos"})
            elif u.stream.first_taken_at is None and u.codes and now - u.first_frame_at > UNTAKEN_S:
                self._end(u, "error", EngineError(f"nobody took the audio for {UNTAKEN_S:.0f} s; take it or cancel"))
            elif u.starving and now - u.last_text_at > TEXT_TIMEOUT_S:
                late = TextTimeoutError(
                    f"no text came for {TEXT_TIMEOUT_S:.0f} s; end the text stream when it is complete"
                )
                self._end(u, "error", late)

    def _admit(self) -> None:
        """Give rows to voices that can start and may; the last quarter of them only to voices with something to say."""
        for u in [u for u in self._waiting if u.can_start and u.early_s < 0]:
            if len(self._free) <= (0 if u.has_text else self.step.rows // 4):
                continue
            self._waiting.remove(u)
            u.row = self._free.pop()
            self._resident.append(u)
            error = _guarded(self._start, u, u.row)
            if error is not None:
                self._end(u, "error", error)

    def _start(self, u: Utterance, row: int) -> None:
        text = list(u.text_ids) if u.layout == "whole" else []
        prompt = u.prompt = self.prompter.build(u.voice, u.instruct_ids, text, u.layout)
        if prompt.positions >= self.step.positions:
            raise BadRequestError(
                f"the prompt has {prompt.positions} positions and its row holds {self.step.positions}; "
                "shorten the text or the instruction, or open the model with more positions"
            )
        self.step.admit(row, prompt.pending, (u.stream.seed + u.restarts) % 2**63, u.sampling)
        self.codec.reset(row)
        prefix = self._prefixes.get(u.voice)
        if prefix is not None:
            self._prefixes.move_to_end(u.voice)
            self.step.load_prefix(row, prefix)
            u.prefilled = prompt.shared.shape[0]

    def _prefill(self) -> bool:
        """One piece for the voice that has waited longest, of those with text if there are any.

        Cut at the same borders with a cached prefix and without.
        """
        u = min((u for u in self._resident if not u.is_prefilled), key=lambda u: not u.has_text, default=None)
        if u is None or u.prompt is None or u.row is None:
            return False
        start, shared = u.prefilled, u.prompt.shared.shape[0]
        part, offset, end = (
            (u.prompt.shared, 0, shared) if start < shared else (u.prompt.rest, shared, u.prompt.positions)
        )
        stop = min((start // PIECE + 1) * PIECE, end)
        error = _guarded(self.step.prefill, u.row, part[start - offset : stop - offset])
        if error is not None:
            self._end(u, "error", error)
            return True
        u.prefilled = stop
        if stop == shared:
            self._remember(u.voice, self.step.save_prefix(u.row))
        return True

    def _remember(self, voice: Voice, prefix: Tensor) -> None:
        """Keep a prefix's KV [L, 2, kv_heads, positions, D], and forget the least recently used beyond the limit."""
        self._prefixes[voice] = prefix
        while len(self._prefixes) > 1 and sum(p.shape[3] for p in self._prefixes.values()) > PREFIX_POSITIONS:
            self._prefixes.popitem(last=False)

    def _ready(self) -> list[Utterance]:
        """Voices that can speak a frame now; when columns are short, those least ahead of their playback."""
        ready = [u for u in self._resident if u.is_prefilled and u.has_text and u.early_s < 0]
        if len(ready) > self.step.columns:
            ready.sort(key=lambda u: u.delivery.ahead(len(u.codes)))
        return ready[: self.step.columns]

    def _advance(self, ready: list[Utterance]) -> None:
        """One frame for the ready voices; what was decoded before is handed out, what is due now is decoded."""
        ids = self.prompter.config.ids
        text = self.prompter.texts([u.next_text(ids.tts_eos, ids.tts_pad) for u in ready])
        rows = [u.row for u in ready if u.row is not None]
        codes = self.step.step(rows, text)
        self._deliver(wait=True)  # while the GPU is at this frame
        ends: dict[int, End] = {}
        early: list[Utterance] = []
        for b, (u, row, values) in enumerate(zip(ready, rows, codes.cpu().numpy(), strict=True)):
            if values[0] == ids.codec_eos:
                if u.ended_early:
                    early.append(u)
                else:
                    ends[id(u)] = "eos"
                continue
            u.spoke(values)
            u.buffered.append(codes[b])
            end = u.must_end(self.step.positions - self.step.position(row))
            if end is not None:
                ends[id(u)] = end
        cost = self._frame_cost_s
        due = [u for u in ready if id(u) in ends or u in early or u.delivery.due(len(u.buffered), len(u.codes), cost)]
        self._hand_over(due, ends)
        for u in ready:
            if id(u) in ends:
                self._leave(u)
        for u in early:
            logger.warning("a voice ended before its text, which goes on as another one (seed %d)", u.stream.seed)
            self._leave(u)
            u.rest()
            self._waiting.appendleft(u)
        self._deliver(wait=False)

    def _hand_over(self, voices: list[Utterance], ends: Mapping[int, End] = NO_ENDS) -> None:
        """Start to decode all buffered frames of voices whose chunk is due, or that cannot go on for now.

        Voices with equally many frames are decoded in one call; `ends` says which of them are over, and how.
        """
        groups: dict[int, list[Utterance]] = {}
        silent = [u for u in voices if not u.buffered and id(u) in ends]
        for u in voices:
            if u.buffered and (id(u) in ends or not u.stream.cancelled):
                groups.setdefault(len(u.buffered), []).append(u)
        for members in groups.values():
            frames = torch.stack([frame for u in members for frame in u.buffered])  # in one launch on a GPU
            codes = frames.unflatten(0, (len(members), -1)).mT
            samples = self.codec.decode(codes, [u.row for u in members if u.row is not None])
            for u in members:
                u.buffered.clear()
                u.delivery.chunks += 1
            self._decoding.append(Chunks(samples, members, ends))
        for u in silent:  # its last words come after what is still being decoded
            self._decoding.append(Chunks(None, [u], ends))

    def _deliver(self, wait: bool) -> None:
        """Hand out what has been decoded, in order; `wait` for what has not."""
        while self._decoding:
            samples, voices, ends = self._decoding[0]
            if samples is not None and not wait and not samples.ready():
                return
            waves = samples.wait() if samples is not None else [None]
            self._decoding.popleft()
            for u, wave in zip(voices, waves, strict=True):
                end = ends.get(id(u))
                if wave is not None and not u.stream.cancelled:
                    u.delivery.deliver(wave, (end or "eos") != "eos", self._frame_cost_s)
                if end is not None:
                    u.delivery.last_words(natural=end == "eos" and u.finished_text)
                    self._end(u, end)

    def _leave(self, u: Utterance) -> None:
        """Free the voice's row, or its place in the queue."""
        if u in self._resident:
            self._resident.remove(u)
        if u in self._waiting:
            self._waiting.remove(u)
        if u.row is not None:
            self.step.release(u.row)
            self._free.append(u.row)
            u.row = None

    def _end(self, u: Utterance, end: End, error: TTSError | None = None) -> None:
        """Free the voice's row and tell its listener."""
        self._leave(u)
        if u.stream.cancelled:
            end, error = "cancelled", None
        u.finish(end, error)

    def _end_all(self, error: EngineError) -> None:
        with self._changed:
            self._waiting.extend(self._inbox)
            self._inbox.clear()
        over = [u for chunks in self._decoding for u in chunks.voices if id(u) in chunks.ends]
        self._decoding.clear()
        for u in [*over, *self._resident, *self._waiting]:
            self._end(u, "error", error)


def _gpu_is_lost(error: Exception) -> bool:
    return isinstance(error, torch.AcceleratorError) or gpu.LOST in str(error)


def _guarded(work: Callable[..., TTSError | None], *arguments: object) -> TTSError | None:
    """Do one voice's work; what goes wrong in it is returned, so that it ends this voice and no other.

    Where the GPU is lost, it is raised.
    """
    try:
        return work(*arguments)
    except TTSError as error:
        return error
    except Exception as error:
        if _gpu_is_lost(error):
            raise
        logger.exception("an utterance failed")
        return EngineError(f"the utterance failed: {type(error).__name__}: {error}")
