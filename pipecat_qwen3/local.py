"""The engine in this process as a Backend: opens a checkpoint, checks requests, hands out streams."""

import asyncio
import contextlib
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

import torch

from megakernel.choose import UnavailableError, choose, make_step
from megakernel.sampler import Sampling
from pipecat_qwen3.backend import MAX_LEAD_S, PROFILES, Layout, Load, Request, Stream
from pipecat_qwen3.checkpoint import EMBEDDED, Checkpoint
from pipecat_qwen3.codec_runner import open_codec
from pipecat_qwen3.config import Generation
from pipecat_qwen3.device import pick_device, pick_dtype
from pipecat_qwen3.engine import Engine
from pipecat_qwen3.errors import BackendError, BadRequestError, TTSError, UnknownNameError, choices
from pipecat_qwen3.prompt import Prompter, resolve_voice
from pipecat_qwen3.talker import decode_weights
from pipecat_qwen3.text import TextStream, encode
from pipecat_qwen3.utterance import Utterance
from pipecat_qwen3.words import Rate

MAX_POSITIONS = 4096
"""Compile limit of the kernels; a row of the 0.6B talker takes 470 MB of KV at that length."""

FRAMES_PER_TOKEN = 3
"""Speech takes at least about so many frames a text token: what a request must find room for."""

SMALL = 64_000_000
"""Below so many parameters two torch threads on a CPU wait for each other more than they help."""


class LocalBackend:
    """A checkpoint in this process. Opening loads and warms it, so call `open` before the event loop runs."""

    _shared: dict[tuple[str, str, str], "LocalBackend"] = {}  # noqa: RUF012 - the process's engines
    _shared_lock = threading.Lock()

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        max_batch: int,
        device: torch.device,
        dtype: torch.dtype,
        backend: str,
        positions: int,
        profile: str,
        progress: Callable[[str], None],
    ) -> None:
        began = time.monotonic()
        self.checkpoint, self.config, self.max_batch = checkpoint, checkpoint.config, max_batch
        self.device, self.dtype = device, dtype
        progress("choosing the backend")
        try:
            choice = choose(backend, device.type, dtype, self.config.shape, max_batch)
        except UnavailableError as error:
            raise BackendError(str(error)) from None
        self.backend_name, self.backend_reason = choice.name, choice.reason
        self.tokenizer = checkpoint.load_tokenizer()
        self._rates: dict[str | None, Rate] = {}
        progress("loading weights")
        talker = checkpoint.load_talker(dtype)
        progress("folding tables")
        text_table = talker.text_table(device)
        weights = decode_weights(talker, device)
        small = device.type == "cpu" and sum(p.numel() for p in talker.parameters()) < SMALL
        codec_table = talker.model.codec_embedding.weight.detach().to(device)
        del talker
        rows = max_batch if device.type == "cpu" else 4 * max_batch
        threads = 1 if small else torch.get_num_threads()
        step = make_step(choice, weights, self.config.shape, rows, max_batch, positions, threads)
        del weights  # the step has packed copies
        codec = open_codec(checkpoint.load_codec().to(device).fold(), rows, max_batch)
        ids = self.config.ids
        role = [ids.im_start, ids.assistant, *encode(self.tokenizer, "\n")]
        prompter = Prompter(self.config, text_table, codec_table, role)
        prefills = PROFILES[profile].prefills
        self.engine = Engine(
            step, codec, prompter, prefills=prefills, threads=threads if device.type == "cpu" else None
        )
        progress("warming; the first time, compiling for this CPU" if choice.name == "numba" else "warming")
        try:
            self._warm()
        except BaseException:
            self.engine.close()
            raise
        self.load_s = time.monotonic() - began

    @classmethod
    def open(
        cls,
        model: str = EMBEDDED,
        *,
        max_batch: int = 8,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        positions: int = 1024,
        profile: str = "latency",
        progress: Callable[[str], None] | None = None,
    ) -> Self:
        """Load and warm a checkpoint; blocks for seconds.

        model      "embedded", a folder, or "owner/name" on Hugging Face
        max_batch  voices that advance together, 1..32
        device     "auto" | "cpu" | "cuda"; dtype "auto" | "bf16" | "fp32"
        backend    "auto" | "persistent" | "graph" | "numba" | "torch"
        positions  prompt and frames that one voice can hold, up to 4096
        profile    "latency", or "throughput" for many voices at once: how much may be read between two frames
        progress   called with what is being done

        Raises TTSError: CheckpointError, DownloadError, UnknownNameError, or BackendError for a device, dtype or
        backend that was asked for by name and cannot be had.
        """
        if not _is_integer(max_batch) or not 1 <= max_batch <= 32:
            raise BadRequestError(f"max_batch should be an integer in 1..32, but is {max_batch!r}")
        if not _is_integer(positions) or not 64 <= positions <= MAX_POSITIONS:
            raise BadRequestError(f"positions should be an integer in 64..{MAX_POSITIONS}, but is {positions!r}")
        if profile not in PROFILES:
            raise UnknownNameError(f"profile should be one of {choices(PROFILES)}, but is {profile!r}")
        where = pick_device(device)
        number_format = pick_dtype(dtype, where)
        if where.type == "cuda":
            # The codec's 1e-4 agreement with the official decoder does not survive TF32 convolutions.
            torch.backends.cudnn.allow_tf32 = False
        return cls(
            Checkpoint.open(model),
            max_batch=max_batch,
            device=where,
            dtype=number_format,
            backend=backend,
            positions=positions,
            profile=profile,
            progress=progress or (lambda _: None),
        )

    @classmethod
    def shared(cls, model: str = EMBEDDED, *, device: str = "auto", dtype: str = "auto") -> "LocalBackend":
        """The process's one engine for (model, device, dtype), opened by whoever asks first; blocks meanwhile."""
        where = pick_device(device)
        key = (model, where.type, str(pick_dtype(dtype, where)))
        with cls._shared_lock:
            backend = cls._shared.get(key)
            if backend is None or not backend.ready:
                backend = cls._shared[key] = cls.open(model, device=device, dtype=dtype)
            return backend

    @property
    def model(self) -> str:
        """The model as it was asked for."""
        return self.checkpoint.name

    @property
    def voices(self) -> tuple[str, ...]:
        """Named voices, the default one first."""
        first = self.config.default_speaker
        return tuple(sorted(self.config.speakers, key=lambda name: name != first))

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages, without "auto"."""
        return tuple(self.config.languages)

    @property
    def load(self) -> Load:
        """How busy the engine is."""
        return self.engine.load

    @property
    def ready(self) -> bool:
        """True until closed: opening has warmed it."""
        return self.engine.alive

    def close(self) -> None:
        """End every voice and the engine thread; idempotent."""
        self.engine.close()
        for key, backend in list(self._shared.items()):
            if backend is self:
                self._shared.pop(key, None)

    def speak(self, request: Request) -> Stream:
        """Queue an utterance and return its stream at once.

        A text given as an async iterator is read by a task on the running event loop.
        Raises BadRequestError, UnknownNameError, OverloadedError or EngineError.
        """
        utterance = self._utterance(request)
        text = request.text
        if isinstance(text, str):
            utterance.feed(text)
            utterance.end()
            self._check_room(utterance, text)
            self.engine.submit(utterance)
            return utterance.stream
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise BadRequestError("a text iterator is read by an event loop: call speak() from a coroutine") from None
        reader = loop.create_task(_read(text, utterance))

        def stop_reading() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                loop.call_soon_threadsafe(reader.cancel)

        utterance.stop_reading = stop_reading
        try:
            self.engine.submit(utterance)
        except TTSError:
            reader.cancel()
            raise
        return utterance.stream

    def _utterance(self, request: Request) -> Utterance:
        _check(request)
        voice = resolve_voice(self.config, request.voice, request.language, request.instruct)
        seed = request.seed if request.seed is not None else secrets.randbits(63)
        layout: Layout = request.layout or ("whole" if isinstance(request.text, str) else "streaming")
        instruct = self._instruct_ids(voice.instruct)
        utterance = Utterance(
            request=request,
            stream=Stream(
                seed,
                on_cancel=lambda: utterance.cancelled(),
                on_feed=None if isinstance(request.text, str) else lambda piece: utterance.feed(piece),
                on_end=lambda: utterance.end(),
            ),
            voice=voice,
            layout=layout,
            sampling=_sampling(self.config.generation, request),
            instruct_ids=instruct,
            text=TextStream(self.tokenizer),
            rate=self._rates.setdefault(voice.speaker, Rate()),
            wake=self.engine.wake,
        )
        return utterance

    def _instruct_ids(self, instruct: str | None) -> list[int]:
        if instruct is None:
            return []
        ids, newline = self.config.ids, encode(self.tokenizer, "\n")
        return [ids.im_start, *encode(self.tokenizer, f"user\n{instruct}"), ids.im_end, *newline]

    def _check_room(self, utterance: Utterance, text: str) -> None:
        tokens = len(encode(self.tokenizer, text))
        prompt = 16 + len(utterance.instruct_ids) + (tokens if utterance.layout == "whole" else 0)
        frames = min(FRAMES_PER_TOKEN * tokens, utterance.request.max_frames or self.engine.step.positions)
        if prompt + frames > self.engine.step.positions:
            raise BadRequestError(
                f"the text has {tokens} tokens, which with their speech do not fit into {self.engine.step.positions} "
                "positions; speak it sentence by sentence, or open the model with more positions"
            )

    def _warm(self) -> None:
        """Speak a few frames that nobody hears, so that the first request finds everything built."""
        if self.config.variant == "base":
            return
        instruct = "A calm voice." if self.config.variant == "voice_design" else None
        for layout in ("whole", "streaming"):
            stream = self.speak(
                Request(text="Warm.", instruct=instruct, seed=0, max_frames=4, layout=layout, ahead_s=None)
            )
            for _ in stream:
                pass


async def _read(text: AsyncIterator[str], utterance: Utterance) -> None:
    try:
        async for piece in text:
            utterance.feed(piece)
        utterance.end()
    except asyncio.CancelledError:
        utterance.fail(BadRequestError("the text iterator was cancelled before the text had ended"))
        raise
    except TTSError as error:
        utterance.fail(error)
    except Exception as error:
        utterance.fail(BadRequestError(f"the text iterator failed: {type(error).__name__}: {error}"))


def _check(request: Request) -> None:
    """Refuse values that no checkpoint can take, with what was wanted and what came."""
    if isinstance(request.text, str) and not request.text.strip():
        raise BadRequestError("the text is empty; give at least one word")
    if not isinstance(request.text, (str, AsyncIterator)):
        raise BadRequestError(f"text should be a string or an async iterator of strings, but is {request.text!r}")
    if request.layout not in (None, "whole", "streaming"):
        raise BadRequestError(f"layout should be 'whole' or 'streaming', but is {request.layout!r}")
    for name, least in (("seed", 0), ("top_k", 0), ("predictor_top_k", 0), ("max_frames", 1)):
        value = getattr(request, name)
        if value is not None and not (_is_integer(value) and least <= value < 2**63):
            raise BadRequestError(f"{name} should be an integer from {least} to 2^63-1, but is {value!r}")
    for name, least, most in (
        ("temperature", 0.001, 100.0),
        ("predictor_temperature", 0.001, 100.0),
        ("repetition_penalty", 0.01, 100.0),
        ("top_p", 0.001, 1.0),
        ("predictor_top_p", 0.001, 1.0),
    ):
        value = getattr(request, name)
        if value is not None and not (isinstance(value, int | float) and least <= value <= most):
            hint = "; for no sampling at all set greedy" if "temperature" in name else ""
            raise BadRequestError(f"{name} should be a number from {least} to {most:g}, but is {value!r}{hint}")
    if not request.ramp or not all(_is_integer(size) and size >= 1 for size in request.ramp):
        raise BadRequestError(f"ramp should hold chunk sizes of at least one frame, but is {request.ramp}")
    if request.ahead_s is not None and not (isinstance(request.ahead_s, int | float) and request.ahead_s > 0):
        raise BadRequestError(f"ahead_s should be a number above 0, or None, but is {request.ahead_s!r}")
    if not (isinstance(request.lead_s, int | float) and 0 <= request.lead_s <= MAX_LEAD_S):
        raise BadRequestError(f"lead_s should be a number from 0 to {MAX_LEAD_S:g}, but is {request.lead_s!r}")
    for name in ("voice", "language", "instruct"):
        value = getattr(request, name)
        if value is not None and not isinstance(value, str):
            raise BadRequestError(f"{name} should be a string, but is {value!r}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _sampling(files: Generation, request: Request) -> Sampling:
    """The request's parameters over the checkpoint's, which also says whether to sample, unless greedy is asked for."""

    def either(asked: Any, default: Any) -> Any:
        return default if asked is None else asked

    return Sampling(
        do_sample=files.do_sample and not request.greedy,
        temperature=either(request.temperature, files.temperature),
        top_k=either(request.top_k, files.top_k),
        top_p=either(request.top_p, files.top_p),
        repetition_penalty=either(request.repetition_penalty, files.repetition_penalty),
        predictor_do_sample=files.predictor_do_sample and not request.greedy,
        predictor_temperature=either(request.predictor_temperature, files.predictor_temperature),
        predictor_top_k=either(request.predictor_top_k, files.predictor_top_k),
        predictor_top_p=either(request.predictor_top_p, files.predictor_top_p),
    )
