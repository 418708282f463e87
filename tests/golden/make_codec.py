"""Write codec.npz: samples that the official decoder makes of random codes with the embedded checkpoint's codec.

Provenance: `Qwen3TTSTokenizerV2Decoder.forward` of qwen_tts 0.1.1 (PyPI) under transformers 4.57.3 and torch 2.13.0 on
a CPU, fp32, one thread. When the embedded codec changes, run it again from the repository's root, in an environment of
its own:

    pip install torch==2.13.0 transformers==4.57.3 librosa soundfile && pip install --no-deps qwen_tts==0.1.1
    HF_HUB_OFFLINE=1 python tests/golden/make_codec.py

codes [1, C, 40] int16 in 0..codebook_size - 1; `samples` [F, 1920] float32 of `frames` [F] (the first, the last, those
around the window's edge); `every` 16th sample of all frames; sha256 of the codec's weights.
"""

import hashlib
import sys
import types
from pathlib import Path

import numpy as np
import torch

FRAMES = 40
FOLDER = Path("pipecat_qwen3/embedded/speech_tokenizer")


def official_decoder() -> torch.nn.Module:
    """The official decoder with the embedded weights.

    The package imports its 25 Hz tokenizer eagerly, and with it torchaudio, sox and onnxruntime; an empty stand-in
    under that module's name avoids them.
    """
    unused = types.ModuleType("qwen_tts.core.tokenizer_25hz.modeling_qwen3_tts_tokenizer_v1")
    unused.Qwen3TTSTokenizerV1Model = type("Qwen3TTSTokenizerV1Model", (), {})
    sys.modules[unused.__name__] = unused
    from qwen_tts.core.tokenizer_12hz.modeling_qwen3_tts_tokenizer_v2 import Qwen3TTSTokenizerV2Model

    return Qwen3TTSTokenizerV2Model.from_pretrained(FOLDER, dtype=torch.float32).decoder.eval()


def main() -> None:
    """Decode the codes and write the file beside this one."""
    torch.set_num_threads(1)
    decoder = official_decoder()
    config = decoder.config
    codes = torch.randint(
        config.codebook_size, (1, config.num_quantizers, FRAMES), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        samples = decoder(codes)[0, 0].numpy()
    edge = config.sliding_window
    frames = np.array([0, 1, edge - 1, edge, edge + 1, FRAMES - 2, FRAMES - 1])
    np.savez_compressed(
        Path(__file__).with_name("codec.npz"),
        codes=codes.numpy().astype(np.int16),
        frames=frames,
        samples=samples.reshape(FRAMES, -1)[frames],
        every=samples[::16],
        sha256=np.array(hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()),
    )


if __name__ == "__main__":
    main()
