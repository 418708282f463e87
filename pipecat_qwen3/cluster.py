"""The server as a Ray Serve deployment: N processes behind one address, on one machine or on many.

Every replica is the whole application with an engine of its own. A request or a socket stays on the replica that took
it. docs/cluster.md tells how to run it on several machines.
"""

import os
import signal
import threading
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import ray  # pyright: ignore  # an extra
from fastapi import FastAPI
from ray import serve  # pyright: ignore  # an extra

from pipecat_qwen3.backend import PROFILES
from pipecat_qwen3.errors import UnknownNameError, choices
from pipecat_qwen3.local import LocalBackend
from pipecat_qwen3.server import create_app
from pipecat_qwen3.server_log import set_up
from pipecat_qwen3.server_speaker import Limits, Speaker

NAME = "pipecat-qwen3"
KEY = "PIPECAT_QWEN3_API_KEY"

LIMITS = Limits(socket_s=60.0)
"""Ray tells nobody that a replica is about to go, so sockets move on by themselves, in a silence once a minute."""

DEFAULTS: Mapping[str, Any] = {
    "model": "embedded",
    "max_batch": 32,
    "device": "auto",
    "dtype": "auto",
    "backend": "auto",
    "profile": "latency",
    "replicas": 1,
    "max_replicas": 0,
    "ongoing": 0,
    "surge": 0,
    "gpus": 0.0,
    "cpus": 1.0,
}
"""What `build` takes.

ongoing  open requests and sockets that one replica should have, if max_replicas is more than replicas; 0 is max_batch
surge    replicas in percent that a rolling restart may start before it ends old ones; they need room of their own
gpus     of one replica, as cpus
"""

UPSCALE_S = 5.0
"""Ray would watch a crowd for half a minute before it begins to load another replica."""

_here: list[Speaker] = []
"""The one Speaker of a replica's process: Ray makes the Replica before it asks for the application."""


class Replica:
    """One engine, warm before Ray sends anything here."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Load the model."""
        set_up()
        names = ("max_batch", "device", "dtype", "backend", "profile")
        self._backend = LocalBackend.open(options["model"], **{name: options[name] for name in names})
        _here.append(Speaker(lambda: self._backend, LIMITS, PROFILES[options["profile"]]))

    def check_health(self) -> None:
        """Raise if the engine is dead, so that Ray starts another replica."""
        if not self._backend.ready:
            raise RuntimeError("the engine is dead")


def _application() -> FastAPI:
    return create_app(_here[-1], os.environ.get(KEY) or None)


def build(options: Mapping[str, Any]) -> serve.Application:
    """The deployment, for `serve run pipecat_qwen3.cluster:build model=… replicas=…`. Raises UnknownNameError."""
    if unknown := options.keys() - DEFAULTS.keys():
        raise UnknownNameError(f"there is no option {choices(sorted(unknown))}; there are {choices(DEFAULTS)}")
    # What comes from Ray's command line is a string.
    chosen = {name: type(default)(options.get(name, default)) for name, default in DEFAULTS.items()}
    scale: dict[str, Any] = {"num_replicas": chosen["replicas"]}
    if chosen["max_replicas"] > chosen["replicas"]:
        scale = {
            "autoscaling_config": {
                "min_replicas": chosen["replicas"],
                "max_replicas": chosen["max_replicas"],
                "target_ongoing_requests": chosen["ongoing"] or chosen["max_batch"],
                "upscale_delay_s": UPSCALE_S,
            }
        }
    deployment = serve.deployment(
        name=NAME,
        max_ongoing_requests=LIMITS.connections,
        # A replica that goes takes no new connections and waits for its sockets to move on and its voices to end.
        graceful_shutdown_timeout_s=(LIMITS.socket_s or 0) + 90,
        graceful_shutdown_wait_loop_s=1,
        max_surge_percent=chosen["surge"],
        ray_actor_options={
            "num_cpus": chosen["cpus"],
            "num_gpus": chosen["gpus"],
            "runtime_env": {"env_vars": {KEY: os.environ.get(KEY, "")}},
        },
        **scale,
    )(serve.ingress(_application)(Replica))
    return deployment.bind(chosen)


def run(args: Namespace) -> int:
    """The command `serve --replicas N`: a cluster of this machine alone, until SIGTERM or Ctrl-C."""
    ray.init(include_dashboard=False, log_to_driver=True)
    gpus = 0.0 if args.device == "cpu" else min(1.0, ray.cluster_resources().get("GPU", 0.0) / args.replicas)
    cpus = min(1.0, ray.cluster_resources().get("CPU", 1.0) / (args.replicas + 1))
    serve.start(http_options={"host": args.host, "port": args.port})
    names = DEFAULTS.keys() & vars(args).keys()
    options = {name: getattr(args, name) for name in names} | {"gpus": gpus, "cpus": cpus}
    serve.run(build(options), name=NAME, route_prefix="/")
    print(f"http://{args.host}:{args.port}", flush=True)
    over = threading.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, lambda *_: over.set())
    while not over.wait(1.0):
        pass
    serve.shutdown()
    ray.shutdown()
    return 0
