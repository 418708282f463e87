"""A voice agent on the telephone: 8 kHz mu-law through Pipecat's Twilio serializer on a WebSocket.

    python -m bots.phone --host 0.0.0.0         a carrier connects to ws://HOST:7860/ws
    python -m bots.phone -t twilio -x HOST      and Twilio's webhook at https://HOST/ points there

With TWILIO_ACCOUNT_SID and TWILIO_AUTH_TOKEN the bot hangs up when it is done; without them the carrier does.
"""

import argparse
import os

import bots.needs  # noqa: F401 - first, so that it can say what to install

# isort: split

from loguru import logger
from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.frames.frames import LLMRunFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair, LLMUserAggregatorParams
from pipecat.runner.run import main
from pipecat.runner.types import RunnerArguments, WebSocketRunnerArguments
from pipecat.runner.utils import parse_telephony_websocket
from pipecat.serializers.twilio import TwilioFrameSerializer
from pipecat.transports.websocket.fastapi import FastAPIWebsocketParams, FastAPIWebsocketTransport
from pipecat.turns.user_stop import SpeechTimeoutUserTurnStopStrategy
from pipecat.turns.user_turn_strategies import UserTurnStrategies
from pipecat.workers.runner import WorkerRunner

from bots.latency import LatencyReport
from bots.options import BotParser, check_voice, make_llm, make_stt
from pipecat_qwen3 import LocalBackend, Qwen3TTSService

RATE = 8_000


async def bot(runner_args: RunnerArguments) -> None:
    """Talk to one caller until the line is dead; Pipecat's runner calls this for every call."""
    args = runner_args.cli_args
    assert args is not None, "main() has parsed them"
    if not isinstance(runner_args, WebSocketRunnerArguments):
        logger.error("this bot speaks with telephones alone; python -m bots.voice_agent speaks with browsers")
        return
    carrier, call = await parse_telephony_websocket(runner_args.websocket)
    if carrier != "twilio":
        logger.error(f"this bot speaks Twilio's protocol, and {carrier} called: its serializer is to be used here")
        await runner_args.websocket.close()
        return
    account, token = os.getenv("TWILIO_ACCOUNT_SID"), os.getenv("TWILIO_AUTH_TOKEN")
    serializer = TwilioFrameSerializer(
        stream_sid=call["stream_id"],
        call_sid=call["call_id"],
        account_sid=account,
        auth_token=token,
        params=TwilioFrameSerializer.InputParams(auto_hang_up=bool(account and token)),
    )
    transport = FastAPIWebsocketTransport(
        websocket=runner_args.websocket,
        params=FastAPIWebsocketParams(audio_in_enabled=True, audio_out_enabled=True, serializer=serializer),
    )

    user_aggregator, assistant_aggregator = LLMContextAggregatorPair(
        LLMContext(),
        user_params=LLMUserAggregatorParams(
            vad_analyzer=SileroVADAnalyzer(),
            user_turn_strategies=UserTurnStrategies(stop=[SpeechTimeoutUserTurnStopStrategy(user_speech_timeout=0.5)]),
        ),
    )
    pipeline = Pipeline(
        [
            transport.input(),
            make_stt(args),
            user_aggregator,
            make_llm(args, args.backend.languages),
            # 24 kHz as the model makes them; the transport resamples to the line's rate.
            Qwen3TTSService(backend=args.backend, settings=Qwen3TTSService.Settings(voice=args.voice)),
            transport.output(),
            assistant_aggregator,
        ]
    )
    worker = PipelineWorker(
        pipeline,
        params=PipelineParams(
            audio_in_sample_rate=RATE, audio_out_sample_rate=RATE, enable_metrics=True, enable_usage_metrics=True
        ),
        idle_timeout_secs=runner_args.pipeline_idle_timeout_secs,
        observers=[LatencyReport()],
        enable_rtvi=False,
    )

    @transport.event_handler("on_client_connected")
    async def greet(_transport: object, _client: object) -> None:
        await worker.queue_frame(LLMRunFrame())

    @transport.event_handler("on_client_disconnected")
    async def leave(_transport: object, _client: object) -> None:
        await worker.cancel()

    runner = WorkerRunner(handle_sigint=runner_args.handle_sigint)
    await runner.add_workers(worker)
    await runner.run()


def prepare(args: argparse.Namespace) -> None:
    """Load the model, once and before the first call; all calls share it."""
    args.backend = LocalBackend.shared(args.model)
    check_voice(args.voice, args.backend)


if __name__ == "__main__":
    parser = BotParser(__doc__, prepare, {"twilio": ()})
    parser.add_argument("--model", default="embedded", help="the small voice of the package, a folder or owner/name")
    main(parser)
