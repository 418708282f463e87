"""One side of `bench.peers`, run by path in its own environment: tasks as JSON lines in, timings as JSON lines out.

    PYTHON bench/peer_sides.py SIDE CHECKPOINT cpu|cuda bfloat16|float32 THREADS [TALKER.gguf CODEC.gguf]

Imports nothing of ours at the top, since other environments do not have it.
"""

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import resource
import sys
import time
import types

FRAME_SAMPLES = 1920
RATE = 24_000

VOICE, LANGUAGE = "ryan", "english"


class Ours:
    """Our engine in this process, a file's chunks and a listener's."""

    packages = ("torch", "transformers")
    modes = ("whole", "streamed")
    codec = (True, False)

    def __init__(self, folder, device, dtype, threads, _):
        import torch

        from pipecat_qwen3 import __version__
        from pipecat_qwen3.codec_runner import Part, Samples
        from pipecat_qwen3.local import LocalBackend

        torch.set_num_threads(threads)
        kind = {"bfloat16": "bf16", "float32": "fp32"}[dtype]
        self.backend = LocalBackend.open(folder, max_batch=1, device=device, dtype=kind)
        self.version = __version__
        self.how = f"backend {self.backend.backend_name}, {kind}, max_batch 1"
        self._decode = self.backend.engine.codec.decode
        self._silence = lambda codes, rows: Samples([[Part(torch.zeros(len(rows), FRAME_SAMPLES * codes.shape[2]))]])

    def speak(self, task):
        """Make an utterance: its frames, seconds in all, seconds until the first audio."""
        from pipecat_qwen3.backend import Request

        self.backend.engine.codec.decode = self._decode if task["codec"] else self._silence
        options = {"voice": VOICE, "language": LANGUAGE, "seed": task["seed"], "max_frames": task["frames"]}
        options |= {"ramp": (task["frames"],)} if task["mode"] == "whole" else {}
        request = Request(task["text"], ahead_s=None, **options)
        began, first = time.perf_counter(), None
        stream = self.backend.speak(request)
        for _ in stream:
            first = first or time.perf_counter() - began
        return stream.wait().frames, time.perf_counter() - began, first


class Official:
    """qwen_tts: whole utterances only."""

    packages = ("torch", "transformers")
    modes = ("whole",)
    codec = (True, False)

    def __init__(self, folder, device, dtype, threads, _):
        import torch

        torch.set_num_threads(threads)
        _without_25hz()
        qwen_tts = importlib.import_module("qwen_tts")
        flash = device == "cuda" and importlib.util.find_spec("flash_attn") is not None
        options = {"attn_implementation": "flash_attention_2"} if flash else {}
        options |= {"device_map": device} if device == "cuda" else {}
        self.model = qwen_tts.Qwen3TTSModel.from_pretrained(folder, dtype=getattr(torch, dtype), **options)
        self.version = importlib.metadata.version("qwen-tts")
        self.how = f"{dtype}, {'flash attention 2' if flash else 'torch attention'}"
        self._codec = _Codec(self.model.model.speech_tokenizer)

    def speak(self, task):
        """Make an utterance: its frames, seconds in all, seconds until the first audio."""
        self._codec.set(task["codec"])
        _seed(task["seed"])
        began = time.perf_counter()
        # The last id is drawn, but never becomes a frame.
        self.model.generate_custom_voice(
            text=task["text"], speaker=VOICE, language=LANGUAGE, max_new_tokens=task["frames"] + 1
        )
        took = time.perf_counter() - began
        return self._codec.frames, took, took


class Faster:
    """faster_qwen3_tts: CUDA graphs, whole and in chunks of its README's eight frames."""

    packages = ("torch", "transformers", "qwen-tts-hf")
    modes = ("whole", "streamed, 8 frames a chunk")
    codec = (True, False)

    def __init__(self, folder, device, dtype, threads, _):
        import torch

        package = importlib.import_module("faster_qwen3_tts")
        self.model = package.FasterQwen3TTS.from_pretrained(folder, device=device, dtype=getattr(torch, dtype))
        self.model.warmup(prefill_len=100)
        self.version = importlib.metadata.version("faster-qwen3-tts")
        self.how = f"{dtype}, CUDA graphs, warmed up"
        self._codec = _Codec(self.model.speech_tokenizer)

    def speak(self, task):
        """Make an utterance: its frames, seconds in all, seconds until the first audio."""
        self._codec.set(task["codec"])
        _seed(task["seed"])
        options = {"text": task["text"], "speaker": VOICE, "language": LANGUAGE, "max_new_tokens": task["frames"]}
        began, first = time.perf_counter(), None
        if task["mode"] == "whole":
            self.model.generate_custom_voice(**options)
            took = time.perf_counter() - began
            return self._codec.frames, took, took
        frames = 0
        for _, _, timing in self.model.generate_custom_voice_streaming(**options, chunk_size=8):
            first = first or time.perf_counter() - began
            frames += timing["chunk_steps"]
        return frames, time.perf_counter() - began, first


class QwenTtsCpp:
    """qwentts.cpp through its Python bindings; its codec cannot be left out."""

    packages = ("numpy",)
    modes = ("streamed",)
    codec = (True,)

    def __init__(self, folder, device, dtype, threads, gguf):
        name = "qwentts_cpp_cpu" if device == "cpu" else "qwentts_cpp"
        binding = importlib.import_module(name)
        options = {"cpu_threads": threads} if device == "cpu" else {}
        self.model = binding.QwenTTS(*gguf, **options)
        self.version = binding.__version__
        self.how = f"{os.path.basename(gguf[0])}, {name}"

    def speak(self, task):
        """Make an utterance: its frames, seconds in all, seconds until the first audio."""
        began, first, samples = time.perf_counter(), None, 0
        for pcm, _ in self.model.stream(
            text=task["text"], speaker=VOICE, lang=LANGUAGE, seed=task["seed"], max_new_tokens=task["frames"]
        ):
            first = first or time.perf_counter() - began
            samples += len(pcm)
        return samples // FRAME_SAMPLES, time.perf_counter() - began, first


class _Codec:
    """The decode of a speech_tokenizer, or one that gives zeros at once; `frames` of its last call."""

    def __init__(self, tokenizer):
        self._tokenizer, self._decode = tokenizer, tokenizer.decode
        self._real, self.frames = True, 0
        tokenizer.decode = self

    def set(self, real):
        """Choose, and forget the last call."""
        self._real, self.frames = real, 0

    def __call__(self, encoded):
        import numpy as np

        codes = (encoded[0] if isinstance(encoded, list) else encoded)["audio_codes"]
        self.frames = codes.shape[-2]
        if self._real:
            return self._decode(encoded)
        return [np.zeros(self.frames * FRAME_SAMPLES, np.float32)], RATE


def _without_25hz():
    """Only the tokenizer at 25 Hz, which was never published, wants torchaudio and sox; a stub takes its place."""
    name = "qwen_tts.core.tokenizer_25hz.modeling_qwen3_tts_tokenizer_v1"
    stub = types.ModuleType(name)
    stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(stub)["Qwen3TTSTokenizerV1Model"] = type("Qwen3TTSTokenizerV1Model", (), {})
    sys.modules[name] = stub


def _peak_mb():
    """What this process held at most. Linux's ru_maxrss would begin with that of the process which started this one."""
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as status:
            kilobytes = dict(line.split(":", 1) for line in status)["VmHWM"].split()[0]
        return round(int(kilobytes) / 1024)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 ** (2 if sys.platform == "darwin" else 1))


def _seed(seed):
    import torch

    torch.manual_seed(seed)


SIDES = {"ours": Ours, "qwen-tts": Official, "faster-qwen3-tts": Faster, "qwentts.cpp": QwenTtsCpp}


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print is not an answer

    def answer(**values):
        print(json.dumps(values), file=answers, flush=True)

    name, folder, device, dtype, threads, *gguf = sys.argv[1:]
    try:
        side = SIDES[name](folder, device, dtype, int(threads), gguf)
        versions = {package: importlib.metadata.version(package) for package in side.packages}
        told = {"version": side.version, "versions": versions, "how": side.how, "loaded_mb": _peak_mb()}
        answer(**told, modes=side.modes, codec=side.codec)
        for line in sys.stdin:
            frames, took, first = side.speak(json.loads(line))
            answer(frames=frames, total_s=round(took, 6), first_byte_s=first and round(first, 6))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        answer(error=f"{type(error).__name__}: {lines[-1]}"[:300])
        raise


if __name__ == "__main__":
    main()
