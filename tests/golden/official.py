"""The official qwen_tts 0.1.1 as an oracle: Request keywords in; prompts, codes and waveforms as it makes them out.

Runs under transformers 4.57.3 in an environment of its own; knows nothing of our code. `torch.multinomial` is replaced
by the sampling rule that every implementation here shares, so that a seed means the same voice everywhere.
"""

import functools
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch import Tensor

BLOCK = 32
WORD = 0xFFFFFFFF

SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
    "predictor_temperature": "subtalker_temperature",
    "predictor_top_k": "subtalker_top_k",
    "predictor_top_p": "subtalker_top_p",
}
"""Our request keywords and the official ones."""


@dataclass(frozen=True)
class Spoken:
    """One utterance of the official package.

    prompt    fp32 [P, H]   the embeddings that reach talker.generate
    trailing  fp32 [T, H]   the text embeddings added to the later frames; afterwards the PAD embedding
    codes     int64 [F, C]
    ended     whether the end-of-speech id came, or else the cap
    wav       fp32 [1920 F]; after reference audio less one sample now and then, as the official trim is proportional
    """

    prompt: Tensor
    trailing: Tensor
    codes: Tensor
    ended: bool
    wav: Tensor


def import_qwen_tts() -> types.ModuleType:
    """Import qwen_tts without sox, onnxruntime, torchaudio and einops.

    Only its 25 Hz tokenizer wants them, which was never published but is imported eagerly: a stub takes its place.
    """
    name = "qwen_tts.core.tokenizer_25hz.modeling_qwen3_tts_tokenizer_v1"
    if name not in sys.modules:
        stub = types.ModuleType(name)
        stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
        stub.Qwen3TTSTokenizerV1Model = type("Qwen3TTSTokenizerV1Model", (), {})  # type: ignore[attr-defined]
        sys.modules[name] = stub
    return importlib.import_module("qwen_tts")


def philox(seed: int, frame: int, draw: int) -> int:
    """First word of Philox4x32-10 with key = seed and counter = (frame, draw, 0, 0) (Salmon et al., SC 2011)."""
    c0, c1, c2, c3 = frame, draw, 0, 0
    k0, k1 = seed & WORD, seed >> 32 & WORD
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & WORD, p0 >> 32 ^ c3 ^ k1, p0 & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return c0


def choose(probabilities: np.ndarray, uniform: float) -> int:
    """First index whose cumulative probability exceeds uniform * total; fp32 sums in blocks of 32, then over blocks."""
    padded = np.zeros(-(-len(probabilities) // BLOCK) * BLOCK, np.float32)
    padded[: len(probabilities)] = probabilities
    within = np.cumsum(padded.reshape(-1, BLOCK), axis=1, dtype=np.float32)
    after = np.cumsum(within[:, -1], dtype=np.float32)
    cumulative = (np.concatenate([np.zeros(1, np.float32), after[:-1]])[:, None] + within).reshape(-1)
    return int(np.argmax(cumulative > np.float32(uniform) * after[-1]))


@contextmanager
def shared_rule(seeds: Sequence[int], vocab: int, codebooks: int) -> Iterator[None]:
    """Let torch.multinomial draw by our rule while the official code generates, row b from seeds[b].

    The talker's calls are told from the predictor's by the width of what they draw from (`vocab` is the talker's).
    Every row draws in every call, also after its end, so the frame number is the number of calls.
    """
    frame, predicted = 0, 0

    def multinomial(probabilities: Tensor, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal frame, predicted
        assert num_samples == 1
        assert probabilities.shape[0] == len(seeds)
        if probabilities.shape[1] == vocab:
            at, draw = frame, 0
            frame += 1
        else:
            at, draw = predicted // (codebooks - 1), 1 + predicted % (codebooks - 1)
            predicted += 1
        rows = probabilities.float().cpu().numpy()
        chosen = [choose(row, (philox(s, at, draw) >> 8) * 2.0**-24) for s, row in zip(seeds, rows, strict=True)]
        return torch.tensor(chosen, device=probabilities.device)[:, None]

    original = torch.multinomial
    torch.multinomial = multinomial
    try:
        yield
    finally:
        torch.multinomial = original


class Official:
    """A checkpoint folder in the official package."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.wrapper = import_qwen_tts().Qwen3TTSModel.from_pretrained(str(folder), dtype=dtype)
        self.model = self.wrapper.model
        self.talker = self.model.talker
        self._seen: dict[str, Any] = {}
        self._watch(self.talker, "generate", lambda _, given: self._seen.update(given))
        self._watch(self.model, "generate", lambda out, _: self._seen.update(codes=out[0]))

    def speak(self, requests: Sequence[Mapping[str, Any]], reference: Any = None) -> list[Spoken]:
        """Speak one batch: keywords of pipecat_qwen3.Request, of which text, voice, language, instruct and seed differ.

        reference  what create_voice_clone_prompt returned, for a base checkpoint
        """
        first = requests[0]
        config = self.model.config
        greedy = first.get("greedy", False)
        options = {theirs: first[ours] for ours, theirs in SAMPLING.items() if first.get(ours) is not None}
        if greedy:
            options |= {"do_sample": False, "subtalker_dosample": False}
        options["max_new_tokens"] = first["max_frames"] + 1  # the last id is drawn but never becomes a frame
        options["non_streaming_mode"] = first.get("layout", "whole") == "whole"

        def all_of(key: str, default: Any) -> list[Any]:
            return [default if request.get(key) is None else request[key] for request in requests]

        options |= {"text": all_of("text", None), "language": all_of("language", "auto")}
        seeds, talker = all_of("seed", 0), config.talker_config
        with shared_rule(seeds, talker.vocab_size, talker.num_code_groups):
            if config.tts_model_type == "base":
                wavs, _ = self.wrapper.generate_voice_clone(voice_clone_prompt=reference, **options)
            elif config.tts_model_type == "voice_design":
                wavs, _ = self.wrapper.generate_voice_design(instruct=all_of("instruct", ""), **options)
            else:
                options |= {"speaker": all_of("voice", None), "instruct": all_of("instruct", "")}
                wavs, _ = self.wrapper.generate_custom_voice(**options)
        lengths = self._seen["attention_mask"].sum(-1).tolist()
        return [
            Spoken(
                prompt=self._seen["inputs_embeds"][row, -length:].float().clone(),
                trailing=self._seen["trailing_text_hidden"][row].float().clone(),
                codes=self._seen["codes"][row].clone(),
                ended=len(self._seen["codes"][row]) < first["max_frames"],
                wav=torch.as_tensor(wavs[row]),
            )
            for row, length in enumerate(lengths)
        ]

    @torch.no_grad()
    def logits(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher-forced logits along `codes` [F, C], after the prompt of the last `speak`, in the model's dtype.

        returns fp32 [F, V] for code 0 and fp32 [F, C-1, K] for the others; whole sequences at once
        """
        talker = self.talker
        tables = [talker.get_input_embeddings(), *talker.code_predictor.get_input_embeddings()]
        summed = torch.stack([table(codes[:, g]) for g, table in enumerate(tables)], 1).sum(1)
        text = self._seen["trailing_text_hidden"][0]
        pad = self._seen["tts_pad_embed"].reshape(1, -1)
        text = torch.cat([text, pad.expand(len(codes), -1)])[: len(codes)]
        x = torch.cat([self._seen["inputs_embeds"][0], (summed + text)[:-1]])
        positions = torch.arange(len(x))[None, None].expand(3, 1, -1)
        hidden = talker.model(inputs_embeds=x[None], position_ids=positions).last_hidden_state[0, -len(codes) :]
        later, _ = talker.forward_sub_talker_finetune(codes, hidden)
        return talker.codec_head(hidden).float(), later.float()

    @staticmethod
    def _watch(owner: Any, name: str, tell: Callable[[Any, dict[str, Any]], None]) -> None:
        """Call `tell(result, keywords)` after every call of a method."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            tell(result, kwargs)
            return result

        setattr(owner, name, watched)
