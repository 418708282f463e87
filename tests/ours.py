"""Our side of a comparison with the official package: cases in; prompts, codes and samples out, in its terms."""

from collections.abc import Mapping, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from megakernel.frame_step import PIECE
from megakernel.sampler import Sampling
from pipecat_qwen3.backend import Request, Result
from pipecat_qwen3.local import LocalBackend
from pipecat_qwen3.prompt import resolve_voice
from pipecat_qwen3.text import encode


class Ours:
    """An open backend that has spoken all its cases at the same time, so that modes and parameters share batches.

    cases   what goldens.json says of a case: "name" and "requests"
    spoken  int16 samples and the result of each utterance, by (case's name, row)
    """

    def __init__(self, backend: LocalBackend, cases: Sequence[Mapping[str, Any]]) -> None:
        self.backend = backend
        keys = [(case["name"], row) for case in cases for row in range(len(case["requests"]))]
        requests = [Request(**request, ahead_s=None) for case in cases for request in case["requests"]]
        streams = [backend.speak(request) for request in requests]
        self.spoken: dict[tuple[str, int], tuple[np.ndarray, Result]] = {}
        for key, stream in zip(keys, streams, strict=True):
            pieces = [chunk.pcm for chunk in stream]
            self.spoken[key] = np.concatenate([*pieces, np.zeros(0, np.int16)]), stream.wait(timeout=1)

    def prompt(self, request: Request) -> tuple[Tensor, Tensor]:
        """The embeddings that reach the official talker.generate [P,H], and its trailing text embeddings [T,H].

        Ours is cut one position earlier: the last official position is `pending` with the first frame's text on it.
        """
        backend = self.backend
        prompter, ids = backend.engine.prompter, backend.config.ids
        assert isinstance(request.text, str)
        voice = resolve_voice(backend.config, request.voice, request.language, request.instruct)
        text = encode(backend.tokenizer, request.text)
        prompt = prompter.build(voice, backend._instruct_ids(voice.instruct), text, request.layout or "whole")
        later = [*prompt.text, ids.tts_eos] if prompt.text else [ids.tts_pad, ids.tts_pad]
        added = prompter.texts(later)
        return torch.cat([prompt.shared, prompt.rest, (prompt.pending + added[0])[None]]), added[1:]

    @torch.inference_mode()
    def logits(self, request: Request, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher-forced logits of the decode loop along `codes` [F, C].

        returns fp32 [F, V] for code 0 and fp32 [F, C-1, K] for the others

        The engine must be idle: its row 0 is used, and what the sampler would pick is replaced.
        """
        step, prompter, ids = self.backend.engine.step, self.backend.engine.prompter, self.backend.config.ids
        voice = resolve_voice(self.backend.config, request.voice, request.language, request.instruct)
        assert isinstance(request.text, str)
        text = encode(self.backend.tokenizer, request.text)
        prompt = prompter.build(voice, self.backend._instruct_ids(voice.instruct), text, request.layout or "whole")
        frames, books = codes.shape
        seen: list[Tensor] = []

        def forced(logits: Tensor, *_: object) -> Tensor:
            seen.append(logits[0].clone())
            return codes.flatten()[len(seen) - 1].expand(logits.shape[0])

        step.admit(0, prompt.pending, 0, Sampling(repetition_penalty=1.0))
        for part in (prompt.shared, prompt.rest):
            for piece in part.split(PIECE) if len(part) else ():
                step.prefill(0, piece)
        added = [*prompt.text, ids.tts_eos] if prompt.text else []
        with patch("megakernel.frame_step.pick", forced):
            for n in range(frames):
                step.step([0], prompter.texts([added[n] if n < len(added) else ids.tts_pad]))
        step.release(0)
        return torch.stack(seen[::books]), torch.stack(
            [torch.stack(seen[n * books + 1 : (n + 1) * books]) for n in range(frames)]
        )
