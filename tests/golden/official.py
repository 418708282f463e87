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

CLOSE_DRAW = 5e-6
CLOSE_GAP = 5e-5
"""Below these a decision is close: fp32 sums in another order may decide otherwise, and the official code's own do.

Shares of the total probability, and logits: twice the largest differences between this oracle and another
implementation along the same codes (2.2e-6 and 2.7e-5).
"""

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
    certain   frames before the first close decision; more than F if there is none
    wav       fp32 [1920 F]; after reference audio less one sample now and then, as the official trim is proportional
    """

    prompt: Tensor
    trailing: Tensor
    codes: Tensor
    ended: bool
    certain: int
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


def choose(probabilities: np.ndarray, uniform: float) -> tuple[int, float]:
    """First index whose cumulative probability exceeds uniform * total; fp32 sums in blocks of 32, then over blocks.

    Also returns how far uniform * total lies from the nearer edge of that index, as a share of the total.
    """
    padded = np.zeros(-(-len(probabilities) // BLOCK) * BLOCK, np.float32)
    padded[: len(probabilities)] = probabilities
    within = np.cumsum(padded.reshape(-1, BLOCK), axis=1, dtype=np.float32)
    after = np.cumsum(within[:, -1], dtype=np.float32)
    cumulative = (np.concatenate([np.zeros(1, np.float32), after[:-1]])[:, None] + within).reshape(-1)
    target = np.float32(uniform) * after[-1]
    chosen = int(np.argmax(cumulative > target))
    below = target - cumulative[chosen - 1] if chosen else np.float32(1)
    return chosen, float(min(below, cumulative[chosen] - target) / after[-1])


@contextmanager
def shared_rule(seeds: Sequence[int], vocab: int, codebooks: int) -> Iterator[list[int]]:
    """Let torch.multinomial draw by our rule while the official code generates, row b from seeds[b].

    The talker's calls are told from the predictor's by the width of what they choose from (`vocab` is the talker's).
    Every row chooses in every call, also after its end, so the frame number is the number of calls.
    Yields each row's first frame with a close decision (CLOSE_DRAW, CLOSE_GAP), a huge number if there is none.
    """
    first_close = [sys.maxsize] * len(seeds)
    calls = {True: 0, False: 0}

    def place(width: int) -> tuple[int, int]:
        """Frame and draw of this call."""
        of_talker = width == vocab
        frame, later = divmod(calls[of_talker], 1 if of_talker else codebooks - 1)
        calls[of_talker] += 1
        return frame, 0 if of_talker else later + 1

    def note(row: int, frame: int, close: bool) -> None:
        if close:
            first_close[row] = min(first_close[row], frame)

    def multinomial(probabilities: Tensor, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        assert num_samples == 1
        frame, draw = place(probabilities.shape[1])
        chosen = []
        for row, (seed, values) in enumerate(zip(seeds, probabilities.float().cpu().numpy(), strict=True)):
            index, margin = choose(values, (philox(seed, frame, draw) >> 8) * 2.0**-24)
            note(row, frame, margin < CLOSE_DRAW)
            chosen.append(index)
        return torch.tensor(chosen, device=probabilities.device)[:, None]

    def argmax(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if scores.is_floating_point() and scores.ndim == 2:
            frame, _ = place(scores.shape[1])
            best, second = scores.topk(2).values.unbind(-1)
            for row, gap in enumerate((best - second).tolist()):
                note(row, frame, gap < CLOSE_GAP)
        return original_argmax(scores, *args, **kwargs)

    original, original_argmax = torch.multinomial, torch.argmax
    torch.multinomial, torch.argmax = multinomial, argmax
    try:
        yield first_close
    finally:
        torch.multinomial, torch.argmax = original, original_argmax


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
        with shared_rule(seeds, talker.vocab_size, talker.num_code_groups) as first_close:
            if config.tts_model_type == "base":
                wavs, _ = self.wrapper.generate_voice_clone(voice_clone_prompt=reference, **options)
            elif config.tts_model_type == "voice_design":
                wavs, _ = self.wrapper.generate_voice_design(instruct=all_of("instruct", ""), **options)
            else:
                options |= {"speaker": all_of("voice", None), "instruct": all_of("instruct", "")}
                wavs, _ = self.wrapper.generate_custom_voice(**options)
        lengths = self._seen["attention_mask"].sum(-1).tolist()
        spoken = []
        for row, (length, codes) in enumerate(zip(lengths, self._seen["codes"], strict=True)):
            # An id that is drawn after the last frame counts only if it is the end-of-speech id.
            ended = len(codes) < first["max_frames"]
            last = len(codes) + ended
            spoken.append(
                Spoken(
                    prompt=self._seen["inputs_embeds"][row, -length:].float().clone(),
                    trailing=self._seen["trailing_text_hidden"][row].float().clone(),
                    codes=codes.clone(),
                    ended=ended,
                    certain=first_close[row] if first_close[row] < last else len(codes) + 1,
                    wav=torch.as_tensor(wavs[row]),
                )
            )
        return spoken

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
