"""Two replicas of the server under Ray Serve, as processes on this machine, with the embedded voice."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipecat_qwen3 import RemoteBackend, Request
from pipecat_qwen3.local import LocalBackend

pytest.importorskip("ray", reason="needs the extra [ray]")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def test_two_replicas_share_the_voices_and_speak_them_as_one_engine_would(embedded: LocalBackend) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipecat_qwen3", "serve", "--replicas", "2", "--port", "8896", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--dtype", "fp32", "--max-batch", "8"],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout
    log = ""
    try:
        while "http://127.0.0.1:8896\n" not in log:
            line = process.stdout.readline()
            assert line, log
            log += line
        remotes = [RemoteBackend.open("ws://127.0.0.1:8896/v1/audio/speech/ws") for _ in range(6)]
        requests = [Request(f"Room {i} is free.", seed=i, max_frames=15) for i in range(12)]
        streams = [remotes[i % 6].speak(request) for i, request in enumerate(requests)]
        for request, stream in zip(requests, streams, strict=True):
            assert sum(len(chunk.pcm) for chunk in stream)
            alone = embedded.speak(request)
            list(alone)
            codes = alone.wait().codes
            assert codes is not None
            assert np.array_equal(stream.wait(10).codes, codes)  # type: ignore[arg-type]
        for remote in remotes:
            remote.close()
    finally:
        process.send_signal(signal.SIGTERM)
        log += process.communicate(timeout=120)[0]
    assert process.returncode == 0
    assert len(set(re.findall(r"ServeReplica:pipecat-qwen3:pipecat-qwen3 pid=(\d+)", log))) == 2
