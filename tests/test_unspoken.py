"""Text that was never spoken does not enter the conversation as if it had been."""

from collections.abc import Iterator

import pytest
from pipecat.frames.frames import TTSStoppedFrame, TTSUpdateSettingsFrame
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMAssistantAggregator
from pipecat.services.tts_service import TextAggregationMode

from pipecat_qwen3.backend import Request, Stream
from pipecat_qwen3.errors import EngineError, OverloadedError, TTSError, UnknownNameError
from pipecat_qwen3.service import Qwen3TTSService
from pipecat_qwen3.websocket_service import Qwen3WebsocketTTSService
from tests.fakes import FakeBackend
from tests.serving import serving
from tests.test_service import Loudspeaker, Recorder, count, live, said, turn, words

TEXTS = ("Hello there. ", "The second, it fails (badly)! ", "How are you?")


class Choosy(FakeBackend):
    """Refuses the requests whose number is in `refused`; breaks off in those in `broken`."""

    refused: tuple[int, ...] = ()
    broken: tuple[int, ...] = ()
    error: TTSError = OverloadedError("full")

    def speak(self, request: Request) -> Stream:
        number = len(self.requests)
        self.fail = self.error if number in self.refused else EngineError("it broke") if number in self.broken else None
        self.fail_after = 10 if number in self.broken else None
        return super().speak(request)


@pytest.fixture
def backend() -> Iterator[Choosy]:
    fake = Choosy(seconds_per_char=0.04)
    yield fake
    fake.close()


async def conversation(service: Qwen3TTSService | Qwen3WebsocketTTSService, *texts: str) -> tuple[list[str], list[str]]:
    """What the conversation holds, and what was heard word by word."""
    context = LLMContext()
    ear = Recorder()
    async with live(service, Loudspeaker(), ear, LLMAssistantAggregator(context)) as (worker, recorder):
        await worker.queue_frames(turn(*texts))
        await recorder.until(count(TTSStoppedFrame))
    return said(context), words(ear.frames)


@pytest.mark.parametrize(
    ("refused", "expected"),
    [
        ((0,), "The second, it fails (badly)! How are you?"),
        ((1,), "Hello there. How are you?"),
        ((2,), "Hello there. The second, it fails (badly)!"),
        ((0, 1), "How are you?"),
    ],
)
async def test_a_sentence_that_failed_is_not_in_the_conversation(backend, refused, expected):
    backend.refused = refused
    context, heard = await conversation(Qwen3TTSService(backend=backend), *TEXTS)
    assert context == [expected]
    assert heard == expected.split()


async def test_a_sentence_that_broke_off_is_there_as_far_as_it_was_spoken(backend):
    backend.broken = (1,)  # after ten frames, 0.8 s, 20 characters
    context, _ = await conversation(Qwen3TTSService(backend=backend), *TEXTS)
    assert context == ["Hello there. The second, it fails How are you?"]


async def test_a_sentence_that_was_cut_at_its_length_limit_is_there_as_far_as_it_was_spoken(backend):
    class Cut(Choosy):
        def _run(self, request, stream, pieces, stop):
            text = "".join(iter(pieces.get, None))
            for piece in (" ".join(text.split()[:2]), None):
                pieces.put(piece)
            super()._run(request, stream, pieces, stop)

    cut = Cut(seconds_per_char=0.04, end="cap")
    context, _ = await conversation(Qwen3TTSService(backend=cut), "One two three four. ", "Five six seven.")
    assert context == ["One two Five six"]
    cut.close()


async def test_when_all_fails_the_conversation_holds_nothing(backend):
    backend.refused = (0, 1, 2)
    assert (await conversation(Qwen3TTSService(backend=backend), *TEXTS))[0] == []


async def test_what_an_unusable_service_did_not_speak_is_not_in_the_conversation(backend):
    backend.refused, backend.error = (1,), UnknownNameError("who is that")  # until a setting changes
    context, _ = await conversation(Qwen3TTSService(backend=backend), *TEXTS)
    assert context == ["Hello there."]
    assert len(backend.requests) == 2


async def test_a_service_that_is_usable_again_is_heard_in_the_conversation_again(backend):
    backend.refused, backend.error = (0,), UnknownNameError("who is that")
    context = LLMContext()
    service = Qwen3TTSService(backend=backend)
    async with live(service, Loudspeaker(), LLMAssistantAggregator(context)) as (worker, recorder):
        for number, texts in enumerate([TEXTS[:1], TEXTS[1:2]]):
            await worker.queue_frames(turn(*texts))
            await recorder.until(count(TTSStoppedFrame, number + 1))
        change = Qwen3TTSService.Settings(voice="slt")
        await worker.queue_frames([TTSUpdateSettingsFrame(delta=change), *turn(TEXTS[2])])
        await recorder.until(count(TTSStoppedFrame, 3))
    assert said(context) == ["How are you?"]
    assert len(backend.requests) == 2


@pytest.mark.parametrize("mode", [TextAggregationMode.SENTENCE, TextAggregationMode.TOKEN])
async def test_it_is_so_with_a_server_too_in_both_modes(backend, mode):
    backend.broken = (0,)
    with serving(lambda: backend) as server:
        service = Qwen3WebsocketTTSService(url=server.ws, text_aggregation_mode=mode)
        context, _ = await conversation(service, "One two three four five six seven eight nine ten.")
    assert context == ["One two three four five"]
