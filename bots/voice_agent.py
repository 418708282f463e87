"""A voice agent: microphone -> VAD -> speech recognition -> language model -> Qwen3-TTS -> speaker.

    python -m bots.voice_agent                  then open http://localhost:7860
    python -m bots.voice_agent --stt whisper --llm ollama --model Qwen/Qwen3-TTS-12Hz-0.6B-CustomVoice
    python -m bots.voice_agent -t webrtc        or websocket, or twilio -x HOST

The defaults need no key and no download. Whisper hears English unless --stt-model is one that knows more. `-t twilio`
wants TWILIO_ACCOUNT_SID and TWILIO_AUTH_TOKEN. Pipecat's evals talk to the bot as well: make eval.
"""

import argparse

import bots.needs  # noqa: F401 - first, so that it can say what to install

# isort: split

from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.evals.transport import EvalTransportParams
from pipecat.frames.frames import LLMRunFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair, LLMUserAggregatorParams
from pipecat.runner.run import app, main
from pipecat.runner.types import RunnerArguments
from pipecat.runner.utils import create_transport
from pipecat.serializers.protobuf import ProtobufFrameSerializer
from pipecat.transports.base_transport import BaseTransport, TransportParams
from pipecat.transports.websocket.fastapi import FastAPIWebsocketParams
from pipecat.turns.user_stop import SpeechTimeoutUserTurnStopStrategy
from pipecat.turns.user_turn_strategies import UserTurnStrategies
from pipecat.workers.runner import WorkerRunner

from bots.latency import LatencyReport
from bots.options import BotParser, check_voice, make_llm, make_stt
from bots.page import mount_page
from bots.picker import offer
from bots.script import HINT
from pipecat_qwen3 import LocalBackend, Qwen3TTSService

TWILIO = ("TWILIO_ACCOUNT_SID", "TWILIO_AUTH_TOKEN")

transport_params = {
    "webrtc": lambda: TransportParams(audio_in_enabled=True, audio_out_enabled=True),
    "eval": lambda: EvalTransportParams(audio_in_enabled=True, audio_out_enabled=True),
    "twilio": lambda: FastAPIWebsocketParams(audio_in_enabled=True, audio_out_enabled=True),
    "websocket": lambda: FastAPIWebsocketParams(
        audio_in_enabled=True, audio_out_enabled=True, serializer=ProtobufFrameSerializer()
    ),
}


async def run_bot(transport: BaseTransport, runner_args: RunnerArguments) -> None:
    """Talk to one client until it leaves."""
    args = runner_args.cli_args
    assert args is not None, "main() has parsed them"
    stt = make_stt(args)
    llm = make_llm(args, args.backend.languages)
    tts = Qwen3TTSService(backend=args.backend, settings=Qwen3TTSService.Settings(voice=args.voice))

    context = LLMContext()
    user_aggregator, assistant_aggregator = LLMContextAggregatorPair(
        context,
        user_params=LLMUserAggregatorParams(
            vad_analyzer=SileroVADAnalyzer(),
            # A pause ends the turn. Leave this out for Pipecat's own model of unfinished sentences, which suits people
            # better than it suits recorded or synthetic callers.
            user_turn_strategies=UserTurnStrategies(stop=[SpeechTimeoutUserTurnStopStrategy(user_speech_timeout=0.5)]),
        ),
    )
    pipeline = Pipeline(
        [
            transport.input(),
            stt,
            user_aggregator,
            llm,
            tts,
            transport.output(),
            assistant_aggregator,
        ]
    )
    latency = LatencyReport()
    worker = PipelineWorker(
        pipeline,
        params=PipelineParams(enable_metrics=True, enable_usage_metrics=True),
        idle_timeout_secs=runner_args.pipeline_idle_timeout_secs,
        observers=[latency],
    )
    latency.send = worker.rtvi.send_server_message
    offer(
        worker,
        args.backend,
        voice=args.voice,
        stt=args.stt,
        llm=args.llm,
        hint=HINT if args.llm == "scripted" else None,
    )

    async def greet(*_: object) -> None:
        await worker.queue_frame(LLMRunFrame())

    async def leave(*_: object) -> None:
        await worker.cancel()

    if getattr(runner_args, "transport_type", None) == "twilio":  # a telephone does not say that it is ready
        transport.add_event_handler("on_client_connected", greet)
    else:
        worker.rtvi.add_event_handler("on_client_ready", greet)
    transport.add_event_handler("on_client_disconnected", leave)

    runner = WorkerRunner(handle_sigint=runner_args.handle_sigint)
    await runner.add_workers(worker)
    await runner.run()


async def bot(runner_args: RunnerArguments) -> None:
    """What Pipecat's runner calls for every client."""
    await run_bot(await create_transport(runner_args, transport_params), runner_args)


def prepare(args: argparse.Namespace) -> None:
    """Load the model, once and before the first client; all clients share it."""
    args.backend = LocalBackend.shared(args.model)
    check_voice(args.voice, args.backend)


if __name__ == "__main__":
    parser = BotParser(__doc__, prepare, dict.fromkeys(transport_params, ()) | {"twilio": TWILIO})
    parser.add_argument("--model", default="embedded", help="the small voice of the package, a folder or owner/name")
    mount_page(app)
    main(parser)
