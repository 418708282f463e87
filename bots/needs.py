"""Nothing in; ends a bot that serves clients with one line where the packages of the extra [bots] are missing."""

import importlib.util

PACKAGES = ("fastapi", "uvicorn", "aiortc", "pocketsphinx", "soxr")

if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
    raise SystemExit(f"this bot needs packages ({', '.join(missing)}): run pip install 'pipecat-qwen3[bots]'")
