"""One text through a real Pipecat pipeline: a Backend and a text in, audio into an Output, measurements out."""

import asyncio
import contextlib
import re
import signal
import time
from collections.abc import Callable, Iterator

from pipecat.audio.utils import detect_speech_onset
from pipecat.frames.frames import (
    EndFrame,
    ErrorFrame,
    Frame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    TTSAudioRawFrame,
    TTSSpeakFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.workers.runner import WorkerRunner

from pipecat_qwen3.backend import SAMPLE_RATE, Backend, Request
from pipecat_qwen3.cli_audio import Output
from pipecat_qwen3.cli_recorder import Recorder, Spoken, words_of
from pipecat_qwen3.errors import EngineError, TTSError
from pipecat_qwen3.service import Qwen3TTSService

_ONE_UTTERANCE = 200
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？]")
_MOST_SENTENCES = 3
_ONSET_SAMPLES = 10 * SAMPLE_RATE


class Listener(FrameProcessor):
    """The end of the pipeline: writes the audio and notes when it came.

    heard  called with the number of samples so far
    """

    def __init__(self, output: Output, recorder: Recorder, heard: Callable[[int], None]) -> None:
        super().__init__()
        self._output, self._recorder, self._heard = output, recorder, heard
        self.began = self.ended = 0.0
        self.samples = 0
        self.arrivals: list[tuple[float, int]] = []
        self.opening = bytearray()
        self.broken: TTSError | None = None

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Write audio, pass everything on."""
        await super().process_frame(frame, direction)
        heard = not self._recorder.interrupted and self.samples < self._recorder.room
        if isinstance(frame, TTSAudioRawFrame) and heard:
            self._take(frame.audio)
        await self.push_frame(frame, direction)

    def _take(self, pcm: bytes) -> None:
        self.ended = time.perf_counter()
        self.arrivals.append((self.ended - self.began, self.samples))
        if self.samples < _ONSET_SAMPLES:
            self.opening += pcm
        self.samples += len(pcm) // 2
        try:
            self._output.write(pcm)
        except TTSError as error:
            self.broken = self.broken or error
            self._recorder.interrupt()
        self._heard(self.samples)

    def first_audible_s(self) -> float | None:
        """When the first audible sample is heard: it waits for every piece up to its own, and for its turn in it."""
        onset = detect_speech_onset(bytes(self.opening), SAMPLE_RATE)
        if onset is None:
            return None
        return max(at + (onset - first) / SAMPLE_RATE for at, first in self.arrivals if first <= onset)


async def speak(
    backend: Backend, request: Request, output: Output, heard: Callable[[int], None] = lambda samples: None
) -> Spoken:
    """Speak request.text into `output` until it is over or Ctrl-C stops it.

    A short text is one utterance; a long one is cut into sentences by Pipecat, all with the same seed.
    Time counts from the moment the text enters the running pipeline. Raises TTSError.
    """
    text = str(request.text)
    recorder = Recorder(backend, request)
    # The language also tells Pipecat how to cut sentences.
    settings = Qwen3TTSService.Settings(language=request.language)
    service = Qwen3TTSService(backend=recorder, skip_silence=False, settings=settings)
    listener = Listener(output, recorder, heard)
    worker = PipelineWorker(
        Pipeline([service, listener]),
        params=PipelineParams(audio_out_sample_rate=SAMPLE_RATE),
        idle_timeout_secs=None,
        enable_rtvi=False,
        enable_turn_tracking=False,
    )
    errors: list[ErrorFrame] = []

    async def begin(_worker: PipelineWorker, _frame: Frame) -> None:
        listener.began = listener.ended = time.perf_counter()
        await worker.queue_frames([*_frames(text), EndFrame()])

    async def failed(_worker: PipelineWorker, frame: ErrorFrame) -> None:
        errors.append(frame)  # what was spoken before it is still on its way; the recorder refuses all further text

    worker.add_event_handler("on_pipeline_started", begin)
    worker.add_event_handler("on_pipeline_error", failed)

    stopping: list[asyncio.Task[None]] = []

    async def stop() -> None:
        # The end of the pipeline waits for the open audio context, and that for audio which will not come.
        if context_id := service.get_active_audio_context_id():
            await service.remove_audio_context(context_id)
        await worker.cancel()

    def interrupt() -> None:
        if not stopping:
            recorder.interrupt()
            output.stop()
            stopping.append(asyncio.get_running_loop().create_task(stop()))

    runner = WorkerRunner(handle_sigint=False)
    with _on_interrupt(interrupt):
        await runner.add_workers(worker)
        await runner.run()
        await asyncio.gather(*stopping)
    spoken = Spoken(
        await recorder.results(),
        listener.samples,
        listener.ended - listener.began,
        listener.arrivals[0][0] if listener.arrivals else None,
        listener.first_audible_s(),
        recorder.interrupted,
    )
    if error := listener.broken or recorder.failed:
        raise error
    if errors and not recorder.interrupted:
        raise EngineError(f"the Pipecat pipeline failed: {errors[0].error}") from errors[0].exception
    return spoken


def _frames(text: str) -> list[Frame]:
    if len(text) <= _ONE_UTTERANCE and len(_SENTENCE_END.findall(text)) <= _MOST_SENTENCES:
        return [TTSSpeakFrame(text)]
    pieces = [LLMTextFrame(piece) for piece in words_of(text)]
    return [LLMFullResponseStartFrame(), *pieces, LLMFullResponseEndFrame()]


@contextlib.contextmanager
def _on_interrupt(handle: Callable[[], None]) -> Iterator[None]:
    """Call `handle` at Ctrl-C instead of raising KeyboardInterrupt, which would cut through the teardown.

    After a Ctrl-C further ones are ignored, until the caller restores the signal: what was spoken is still to be saved.
    """
    loop = asyncio.get_running_loop()
    pressed: list[bool] = []

    def press() -> None:
        pressed.append(True)
        handle()

    loop.add_signal_handler(signal.SIGINT, press)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        if pressed:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
