"""The command `serve`: one model in this process, spoken over HTTP and sockets until a signal says to end."""

import contextlib
import os
from argparse import Namespace

from pipecat_qwen3.backend import PROFILES, Backend
from pipecat_qwen3.errors import TTSError

KEY = "PIPECAT_QWEN3_API_KEY"


def run(args: Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; voices that speak then may finish."""
    if args.replicas > 1:
        from pipecat_qwen3 import cluster

        return cluster.run(args)
    from pipecat_qwen3 import server_log, server_run
    from pipecat_qwen3.server import create_app
    from pipecat_qwen3.server_speaker import Limits, Speaker

    server_log.set_up()
    limits = Limits(connections=args.max_connections, per_client=args.max_connections_per_client)

    def load() -> Backend:
        from pipecat_qwen3.local import LocalBackend

        return LocalBackend.open(
            args.model,
            max_batch=args.max_batch,
            device=args.device,
            dtype=args.dtype,
            backend=args.backend,
            profile=args.profile,
        )

    speaker = Speaker(load, limits, PROFILES[args.profile])
    with contextlib.closing(server_run.listen(args.host, args.port, limits.write_s)) as listener:
        host, port = listener.getsockname()[:2]
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        server_run.serve(create_app(speaker, os.environ.get(KEY) or None), speaker, listener)
    if speaker.failure is not None:
        raise speaker.failure if isinstance(speaker.failure, TTSError) else TTSError(str(speaker.failure))
    return 0
