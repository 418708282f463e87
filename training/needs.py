"""What must be installed to teach the voice: silent where all of it is there, else one line that says what to do."""

import ctypes
from importlib.util import find_spec

from training.text import WORDNET

PACKAGES = ("wordfreq", "soxr", "pystoi", "pesq", "pocketsphinx")
LIBRARIES = ("libflite.so.1", "libflite_cmu_us_slt.so.1", "libflite_cmu_us_rms.so.1")


def check() -> None:
    """Exit with one line if a package, flite's library or WordNet is missing."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise SystemExit(f"training needs {', '.join(missing)}; run: pip install 'pipecat-qwen3[training]'")
    if not all(map(_loads, LIBRARIES)):
        raise SystemExit("training needs flite's library (2.x, Linux); run: apt-get install libflite1 flite")
    if not (WORDNET / "data.noun").is_file():
        raise SystemExit(
            f"training needs WordNet's files in {WORDNET}; run: apt-get install wordnet-base (or set WNSEARCHDIR)"
        )


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True
