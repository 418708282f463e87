"""The smallest bot: one pipeline says one sentence, to the speakers or with --wav into a file.

    python -m bots.hello
    python -m bots.hello "Good morning." --wav hello.wav

The speakers need PyAudio: pip install "pipecat-ai[local]".
"""

import argparse
import asyncio
import importlib.util
import wave
from pathlib import Path

from loguru import logger
from pipecat.frames.frames import EndFrame, Frame, TTSAudioRawFrame, TTSSpeakFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.workers.runner import WorkerRunner

from pipecat_qwen3 import LocalBackend, Qwen3TTSService

SENTENCE = "Hello there. How can I help you today?"


class WavWriter(FrameProcessor):
    """Writes the speech that passes into a WAV file."""

    def __init__(self, path: str) -> None:
        """Create the file. Raises OSError."""
        super().__init__()
        self._file = Path(path).open("wb")  # noqa: SIM115 - closed in cleanup
        self._wav = wave.open(self._file)  # noqa: SIM115 - closed in cleanup
        self._wav.setparams((1, 2, 24_000, 0, "NONE", ""))

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Take the audio, let everything pass."""
        await super().process_frame(frame, direction)
        if isinstance(frame, TTSAudioRawFrame):
            self._wav.writeframes(frame.audio)
        await self.push_frame(frame, direction)

    async def cleanup(self) -> None:
        """Finish the file."""
        await super().cleanup()
        self._wav.close()
        self._file.close()


def speakers() -> FrameProcessor:
    """This machine's speakers. Exits with one line if there are none."""
    if importlib.util.find_spec("pyaudio") is None:
        raise SystemExit('the speakers need PyAudio: run pip install "pipecat-ai[local]", or use --wav hello.wav')
    import pyaudio
    from pipecat.transports.local.audio import LocalAudioTransport, LocalAudioTransportParams

    try:
        pyaudio.PyAudio().get_default_output_device_info()
    except OSError:
        raise SystemExit("this machine has no speakers; use --wav hello.wav") from None
    return LocalAudioTransport(LocalAudioTransportParams(audio_out_enabled=True)).output()


async def main(text: str, output: FrameProcessor) -> None:
    """Say the text and end."""
    tts = Qwen3TTSService(backend=LocalBackend.shared())
    worker = PipelineWorker(Pipeline([tts, output]))
    runner = WorkerRunner()
    await runner.add_workers(worker)
    await worker.queue_frames([TTSSpeakFrame(text), EndFrame()])
    await runner.run()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Say one sentence.")
    parser.add_argument("text", nargs="?", default=SENTENCE)
    parser.add_argument("--wav", metavar="FILE", help="write a file, use no speakers")
    args = parser.parse_args()
    if not args.text.strip():
        parser.error("there is nothing to say: give a sentence")
    logger.remove()
    try:
        output = WavWriter(args.wav) if args.wav else speakers()
    except OSError as error:
        parser.error(f"cannot write {args.wav}: {error.strerror}")
    LocalBackend.shared()  # load the model before the event loop runs; the service finds it
    asyncio.run(main(args.text, output))
