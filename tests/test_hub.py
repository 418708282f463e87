import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipecat_qwen3.checkpoint import Checkpoint
from pipecat_qwen3.hub import OFFICIAL
from tests.fake_hub import FakeHub, Refusal
from tests.random_checkpoint import digest

NAME = "Qwen/Qwen3-TTS-12Hz-0.6B-CustomVoice"
WORKER = """
import json, sys
from pipecat_qwen3.errors import TTSError
from pipecat_qwen3.hub import find

def watch(event, args):
    host = args[1][0] if event == "socket.connect" else args[0] if event == "socket.getaddrinfo" else "127.0.0.1"
    if host not in ("127.0.0.1", "localhost"):
        print("OUTSIDE", host, file=sys.stderr, flush=True)
        sys.exit(9)

sys.addaudithook(watch)
for name in sys.stdin:
    try:
        answer = ["", str(find(name.rstrip("\\n")))]
    except TTSError as error:
        answer = [type(error).__name__, str(error)]
    print(json.dumps(answer), flush=True)
"""
