"""One voice in the engine: its text queue, its frames, its place in the prompt, its answer.

Owned by the engine thread; only `feed`, `end` and `fail` (which append to an inbox) and the stream's cancel flag are
touched from outside.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from megakernel.sampler import Sampling
from pipecat_qwen3.backend import SAMPLE_RATE, End, Layout, Request, Result, Stream
from pipecat_qwen3.delivery import FRAME_SECONDS, Delivery
from pipecat_qwen3.errors import BadRequestError, TTSError
from pipecat_qwen3.prompt import Prompt, Voice
from pipecat_qwen3.text import TextStream, well_formed
from pipecat_qwen3.words import Rate, WordTimes

TEXT_TIMEOUT_S = 30.0
"""An open text stream that sends nothing for so long is ended with an error."""

CAP_BASE, CAP_PER_TOKEN = 50, 15
"""Length cap in frames; speech needs about 4 frames a token."""

SAME_CODE_FRAMES = 38
"""So many frames (3 s) of one code 0 after the text has ended are a runaway."""

SILENCE_S = 3.0
"""So much silence after the text has ended is a runaway."""


@dataclass(eq=False)
class Utterance:
    """A request on its way through the engine.

    text_ids      ids not yet spoken, in the streaming layout; all ids so far, in the whole layout
    tokens        text ids seen so far, for the length cap
    finished_text EOS has been fed: from here on every frame adds PAD
    restarts      times the talker ended before its text, the rest of which was then spoken as from a new prompt
    """

    request: Request
    stream: Stream
    voice: Voice
    layout: Layout
    sampling: Sampling
    instruct_ids: list[int]
    text: TextStream
    rate: Rate
    wake: Callable[[], None]
    words: WordTimes = field(init=False)
    delivery: Delivery = field(init=False)
    text_ids: deque[int] = field(default_factory=deque)
    tokens: int = 0
    finished_text: bool = False
    restarts: int = 0
    row: int | None = None
    prompt: Prompt | None = None
    prefilled: int = 0
    codes: list[np.ndarray] = field(default_factory=list)
    buffered: list[Tensor] = field(default_factory=list)
    same_code: int = 0
    stop_reading: Callable[[], None] = lambda: None
    last_text_at: float = field(default_factory=time.monotonic)
    first_frame_at: float = 0.0
    _half: str = ""
    _inbox: deque[str | TTSError | None] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.words = WordTimes(self.rate)
        self.delivery = Delivery(self.stream, self.request, self.words)

    # -- any thread ------------------------------------------------------------------------------------------

    def feed(self, text: str) -> None:
        """Append text. Raises BadRequestError for what is no string."""
        if not isinstance(text, str):
            raise BadRequestError(f"a piece of text should be a string, but is {text!r}")
        # JSON deltas may cut an emoji between its two surrogates: the first one waits for the second.
        text = self._half + text
        cut = len(text) - 1 if text and "\ud800" <= text[-1] <= "\udbff" else len(text)
        self._half = text[cut:]
        self._inbox.append(well_formed(text[:cut]))
        self.wake()

    def end(self) -> None:
        """No more text will come."""
        self._inbox.append(None)
        self.wake()

    def cancelled(self) -> None:
        """The stream was cancelled."""
        self.stop_reading()
        self.wake()

    def fail(self, error: TTSError) -> None:
        """The text cannot be had: end with an error."""
        self._inbox.append(error)
        self.wake()

    # -- the engine thread -----------------------------------------------------------------------------------

    def read_inbox(self) -> TTSError | None:
        """Take in what was fed; returns an error to end with, if there is one."""
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, TTSError):
                return item
            if self.text.ended:
                continue
            if item is None:
                self.words.end()
                self._take(self.text.end())
            else:
                self.words.feed(item)
                self._take(self.text.feed(item))
                self.last_text_at = time.monotonic()
        return None

    def _take(self, ids: list[int]) -> None:
        self.text_ids.extend(ids)
        self.tokens += len(ids)

    @property
    def starving(self) -> bool:
        """Nothing can happen before more text, or its end, has come."""
        nothing = self.layout == "whole" or not self.text_ids or (self.resting and not self.can_start)
        return not self.text.ended and nothing

    @property
    def can_start(self) -> bool:
        """The prompt can be built: at once in the streaming layout, when all text is there in the whole layout.

        For text that is left over, when there is a word in it.
        """
        if self.layout == "whole":
            return self.text.ended
        return not self.resting or self.text.says_something(self.text_ids)

    @property
    def resting(self) -> bool:
        """The talker ended before its text, and has not begun again."""
        return self.restarts > 0 and self.row is None

    @property
    def ended_early(self) -> bool:
        """An end of speech now would leave text behind that is still to be read.

        A text given as a whole ends as the official code ends it.
        """
        more = bool(self.text_ids) or not self.text.ended
        return more and self.layout == "streaming" and not isinstance(self.request.text, str)

    def rest(self) -> None:
        """The talker ended before its text: be as before the first frame, with the words that were not spoken yet.

        Which those are is what the word times say: the talker reads faster than it speaks.
        """
        self.restarts += 1
        seconds = len(self.codes) * FRAME_SECONDS - self.delivery.skipped / SAMPLE_RATE
        self.text_ids.clear()
        self.text, ids = self.text.again(self.words.unspoken(seconds))
        self.text_ids.extend(ids)  # they are counted already, so the cap holds however often this happens
        self.prompt, self.prefilled, self.same_code = None, 0, 0
        self.last_text_at = time.monotonic()

    @property
    def early_s(self) -> float:
        """Seconds until the listener has heard enough for the next frame; below 0: it may be spoken now."""
        limit = self.request.ahead_s
        return -math.inf if limit is None else self.delivery.ahead(len(self.codes)) - limit

    @property
    def is_prefilled(self) -> bool:
        """Every prompt position is in the row."""
        return self.prompt is not None and self.prefilled == self.prompt.positions

    @property
    def has_text(self) -> bool:
        """The next frame knows what text to add: an id, EOS, or PAD."""
        return bool(self.text_ids) or self.text.ended

    def next_text(self, eos: int, pad: int) -> int:
        """The id that the next frame adds to its input."""
        if self.layout == "streaming" and self.text_ids:
            self.last_text_at = time.monotonic()  # patience with late text begins when the talker runs out of it
            return self.text_ids.popleft()
        ended_before, self.finished_text = self.finished_text, True
        return pad if ended_before or self.layout == "whole" else eos

    def spoke(self, code: np.ndarray) -> None:
        """Account for a spoken frame's codes, int [C]."""
        if not self.codes:
            self.first_frame_at = time.monotonic()
        same = self.finished_text and bool(self.codes) and self.codes[-1][0] == code[0]
        self.same_code = self.same_code + 1 if same else 1
        if not self.finished_text:
            self.delivery.silent_s = 0.0
        self.codes.append(code)

    def must_end(self, room: int) -> End | None:
        """Whether to stop after the frame just spoken, with `room` positions left in the row."""
        frames = len(self.codes)
        if self.request.max_frames is not None:
            return "cap" if frames >= self.request.max_frames or room < 1 else None
        if frames >= CAP_BASE + CAP_PER_TOKEN * self.tokens or room < 1:
            return "cap"
        stuck = self.same_code >= SAME_CODE_FRAMES or self.delivery.silent_s >= SILENCE_S
        return "runaway" if self.finished_text and stuck else None

    def finish(self, end: End, error: TTSError | None = None) -> None:
        """Tell the listener how it ended, and read no more text."""
        self.stop_reading()
        codes = np.stack(self.codes).astype(np.int16) if self.codes else None
        self.stream.finish(
            Result(
                *(end, len(self.codes), self.stream.seed, error),
                skipped_samples=self.delivery.skipped,
                restarts=self.restarts,
                codes=codes,
            )
        )
