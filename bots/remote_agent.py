"""The voice agent without a model of its own: `pipecat-qwen3 serve` speaks, somewhere else. Needs no torch.

    pipecat-qwen3 serve                         on the machine with the GPU
    python -m bots.remote_agent --url ws://gpu.local:8880/v1/audio/speech/ws

The words go to the server as the language model writes them, and a reply is spoken in one breath. A server with a key
wants it here too, in --api-key or PIPECAT_QWEN3_API_KEY.
"""

import argparse
import os

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
from pipecat.services.tts_service import TextAggregationMode
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
from pipecat_qwen3 import Qwen3WebsocketTTSService, RemoteBackend
from pipecat_qwen3.errors import ConnectionFailedError

URL = "ws://127.0.0.1:8880/v1/audio/speech/ws"

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
    llm = make_llm(args, args.server.languages)
    tts = Qwen3WebsocketTTSService(
        url=args.url,
        api_key=args.api_key,
        text_aggregation_mode=TextAggregationMode.TOKEN,
        settings=Qwen3WebsocketTTSService.Settings(voice=args.voice),
    )

    user_aggregator, assistant_aggregator = LLMContextAggregatorPair(
        LLMContext(),
        user_params=LLMUserAggregatorParams(
            vad_analyzer=SileroVADAnalyzer(),
            user_turn_strategies=UserTurnStrategies(stop=[SpeechTimeoutUserTurnStopStrategy(user_speech_timeout=0.5)]),
        ),
    )
    latency = LatencyReport()
    worker = PipelineWorker(
        Pipeline([transport.input(), stt, user_aggregator, llm, tts, transport.output(), assistant_aggregator]),
        params=PipelineParams(enable_metrics=True, enable_usage_metrics=True),
        idle_timeout_secs=runner_args.pipeline_idle_timeout_secs,
        observers=[latency],
    )
    latency.send = worker.rtvi.send_server_message
    hint = HINT if args.llm == "scripted" else None
    offer(worker, args.server, voice=args.voice, stt=args.stt, llm=args.llm, hint=hint)

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
    """Ask the server who it is, before the first client comes; each client then gets a connection of its own."""
    try:
        args.server = RemoteBackend.open(args.url, api_key=args.api_key)
    except ConnectionFailedError as error:
        raise ConnectionFailedError(f"{error}; start pipecat-qwen3 serve there, or choose --url") from None
    check_voice(args.voice, args.server)


if __name__ == "__main__":
    parser = BotParser(__doc__, prepare, dict.fromkeys(transport_params, ()) | {"twilio": TWILIO})
    parser.add_argument("--url", default=URL, help="the socket of pipecat-qwen3 serve")
    parser.add_argument("--api-key", default=os.getenv("PIPECAT_QWEN3_API_KEY"), help="its key, if it has one")
    mount_page(app)
    main(parser)
