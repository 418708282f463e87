"""The voice agent as it is, but a tone for a voice: a machine that runs a browser too may have no core left to speak.

python -m tests.web.tone_bot -t webrtc --port 7860
"""

import runpy

from pipecat_qwen3 import LocalBackend
from pipecat_qwen3.backend import Request, Stream
from tests.fakes import FakeBackend


class Tone(FakeBackend):
    """Prints in which voice it was asked to speak."""

    def speak(self, request: Request) -> Stream:
        print(f"speaks as {request.voice}: {request.text}", flush=True)
        return super().speak(request)


if __name__ == "__main__":
    backend = Tone(languages=("english", "german"))
    backend.model = "tone"
    LocalBackend.shared = lambda *_args, **_kwargs: backend  # type: ignore[method-assign]
    runpy.run_module("bots.voice_agent", run_name="__main__", alter_sys=True)
