"""Our side of a comparison with the official package: Requests in; prompts, codes and samples out, in its terms."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pipecat_qwen3.backend import Request, Result
from pipecat_qwen3.local import LocalBackend
from pipecat_qwen3.prompt import resolve_voice
from pipecat_qwen3.text import encode


class Ours:
    """An open backend, asked for what the official package shows."""

    def __init__(self, backend: LocalBackend) -> None:
        self.backend = backend

    def speak(self, requests: Sequence[Request]) -> list[tuple[np.ndarray, Result]]:
        """Speak all requests at the same time: (int16 samples, result) each."""
        streams = [self.backend.speak(replace(request, ahead_s=None)) for request in requests]
        results = [stream.wait(timeout=120) for stream in streams]
        return [
            (np.concatenate([chunk.pcm for chunk in stream] or [np.zeros(0, np.int16)]), result)
            for stream, result in zip(streams, results, strict=True)
        ]

    def prompt(self, request: Request) -> tuple[Tensor, Tensor]:
        """The embeddings that reach the official talker.generate [P,H], and its trailing text embeddings [T,H].

        Ours is cut one position earlier: the last official position is `pending` with the first frame's text on it.
        """
        backend = self.backend
        config, prompter, ids = backend.config, backend.engine.prompter, backend.config.ids
        assert isinstance(request.text, str)
        voice = resolve_voice(config, request.voice, request.language, request.instruct)
        text = encode(backend.tokenizer, request.text)
        prompt = prompter.build(voice, backend._instruct_ids(voice.instruct), text, request.layout or "whole")
        later = [*prompt.text, ids.tts_eos] if prompt.text else [ids.tts_pad, ids.tts_pad]
        added = prompter.texts(later)
        return torch.cat([prompt.shared, prompt.rest, (prompt.pending + added[0])[None]]), added[1:]
