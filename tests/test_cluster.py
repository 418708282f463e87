"""The server under Ray Serve, as processes on this machine, with the embedded voice: sharing, growing, restarting."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytest

from pipecat_qwen3 import RemoteBackend, Request
from pipecat_qwen3.local import LocalBackend

pytest.importorskip("ray", reason="needs the extra [ray]")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ENV |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}

ONE = {"device": "cpu", "dtype": "fp32", "max_batch": 8, "cpus": 0.5}
GROWING = {**ONE, "max_replicas": 2, "ongoing": 2}

DRIVER = """
import json, os, sys, threading
import ray
from ray import serve
from pipecat_qwen3 import cluster

ray.init(num_cpus=4, include_dashboard=False)
serve.start(http_options={"host": "127.0.0.1", "port": 8897})
answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)  # apart from the log, which many processes write
print(json.dumps("ready"), file=answers)
for line in sys.stdin:
    options = json.loads(line)
    if options is None:
        found = [app.deployments.get(cluster.NAME) for app in serve.status().applications.values()]
        answer = {state: n for deployment in found if deployment for state, n in deployment.replica_states.items() if n}
    else:
        deploy = {"name": cluster.NAME, "route_prefix": "/"}
        threading.Thread(target=serve.run, args=[cluster.build(options)], kwargs=deploy, daemon=True).start()
        answer = "deploying"
    print(json.dumps(answer), file=answers)
serve.shutdown()
ray.shutdown()
"""


@contextlib.contextmanager
def process(*command: str, answers: int = 1) -> Iterator[subprocess.Popen[str]]:
    """A program in a session of its own, which leaves nothing behind."""
    child = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT, env=ENV, start_new_session=True, text=True, pass_fds=[answers],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        assert child.stdin
        assert child.stdout
        child.stdin.close()
        child.stdout.close()


class Cluster:
    """A driver of Ray Serve in a process of its own; its log says which replica served what."""

    def __init__(self, child: subprocess.Popen[str], answers: TextIO) -> None:
        self.url = "ws://127.0.0.1:8897/v1/audio/speech/ws"
        self.log = ""
        self._child, self._answers = child, answers
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self._answer() == "ready"

    def _read(self) -> None:
        assert self._child.stdout
        for line in self._child.stdout:
            self.log += line

    def _answer(self) -> Any:
        line = self._answers.readline()
        assert line, self.log[-5000:]
        return json.loads(line)

    def ask(self, what: dict[str, Any] | None) -> Any:
        """Deploy with these options, and return at once; or the states of the replicas, for None."""
        assert self._child.stdin
        self._child.stdin.write(json.dumps(what) + "\n")
        self._child.stdin.flush()
        return self._answer()

    def until(self, condition: Callable[[dict[str, int]], object], seconds: float = 240) -> None:
        """Wait until the states of the replicas are so."""
        end = time.monotonic() + seconds
        while not condition(states := self.ask(None)):
            assert time.monotonic() < end, (states, self.log[-5000:])
            time.sleep(0.5)

    def sockets(self) -> list[tuple[str, str]]:
        """Process and request id of each socket that is over."""
        replica, request = r"ServeReplica:pipecat-qwen3:pipecat-qwen3 pid=(\d+)", r'"request_id": "([\w-]+)"'
        return re.findall(rf'{replica}.*{request}, "method": "WEBSOCKET"', self.log)

    def close(self) -> int:
        assert self._child.stdin
        self._child.stdin.close()
        code = self._child.wait(120)
        self._thread.join(10)
        return code


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    reading, writing = os.pipe()
    with os.fdopen(reading) as answers, process("-c", DRIVER, str(writing), answers=writing) as child:
        os.close(writing)
        it = Cluster(child, answers)
        yield it
        assert it.close() == 0, it.log[-5000:]


def test_two_replicas_share_the_voices_and_speak_them_as_one_engine_would(embedded: LocalBackend) -> None:
    command = ["-m", "pipecat_qwen3", "serve", "--replicas", "2", "--port", "8896", "--device", "cpu"]
    with process(*command, "--dtype", "fp32", "--max-batch", "8") as child:
        assert child.stdout
        log = ""
        while "http://127.0.0.1:8896\n" not in log:
            line = child.stdout.readline()
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
        child.send_signal(signal.SIGTERM)
        log += child.communicate(timeout=120)[0]
        assert child.returncode == 0
    assert len(set(re.findall(r"ServeReplica:pipecat-qwen3:pipecat-qwen3 pid=(\d+)", log))) == 2


def speak(remote: RemoteBackend, seed: int) -> None:
    stream = remote.speak(Request("Your room is free.", seed=seed, max_frames=10))
    assert sum(len(chunk.pcm) for chunk in stream)
    assert stream.wait(10).frames == 10


def test_a_crowd_gets_a_second_replica_and_every_socket_stays_where_it_is(cluster: Cluster) -> None:
    cluster.ask(GROWING)
    cluster.until(lambda states: states == {"RUNNING": 1})
    crowd = [RemoteBackend.open(cluster.url) for _ in range(6)]  # an open socket is an ongoing request
    for i, remote in enumerate(crowd):
        speak(remote, i)
    cluster.until(lambda states: states.get("RUNNING") == 2)
    later = [RemoteBackend.open(cluster.url) for _ in range(6)]
    for turn in range(3):
        for i, remote in enumerate([*crowd, *later]):
            speak(remote, 100 * turn + i)
    for remote in [*crowd, *later]:
        remote.close()
    end = time.monotonic() + 60
    while len(cluster.sockets()) < 12:
        assert time.monotonic() < end, cluster.log[-5000:]
        time.sleep(0.2)
    replicas, sockets = zip(*cluster.sockets(), strict=True)
    assert len(set(replicas)) == 2
    assert len(set(sockets)) == len(sockets)  # of three utterances or four each, and no socket was in two places


async def test_a_rolling_restart_cuts_no_voice(cluster: Cluster, embedded: LocalBackend) -> None:
    text = "The meeting starts at ten. Your table is booked for two at eight. " * 8
    states: list[dict[str, int]] = []
    await asyncio.to_thread(cluster.ask, {**ONE, "surge": 100})
    await asyncio.to_thread(cluster.until, lambda now: now == {"RUNNING": 1})
    remote = await asyncio.to_thread(RemoteBackend.open, cluster.url)

    async def slowly() -> AsyncIterator[str]:
        """The text, whose second half comes when the old replica has been told to go."""
        pieces = iter(re.findall(r"\S+\s*", text))
        yield next(pieces)
        await asyncio.to_thread(cluster.ask, {**ONE, "surge": 100, "max_batch": 7})
        async with asyncio.timeout(240):
            while not (states and states[-1].get("STOPPING") and states[-1].get("RUNNING")):
                yield next(pieces)
                await asyncio.sleep(2)
                states.append(await asyncio.to_thread(cluster.ask, None))
        for piece in pieces:
            yield piece

    stream = remote.speak(Request(slowly(), seed=7))
    assert sum([len(chunk.pcm) async for chunk in stream])

    async def at_once() -> AsyncIterator[str]:
        yield text

    alone = embedded.speak(Request(at_once(), seed=7))
    assert sum([len(chunk.pcm) async for chunk in alone])
    assert stream.result
    assert alone.result
    assert np.array_equal(stream.result.codes, alone.result.codes)  # type: ignore[arg-type]
    assert all(now.get("RUNNING") for now in states), states  # at no moment was there nobody
    await asyncio.to_thread(cluster.until, lambda now: now == {"RUNNING": 1})  # the old one went behind its voice
    await asyncio.to_thread(speak, remote, 1)  # the socket has moved on by itself
    await asyncio.to_thread(remote.close)
