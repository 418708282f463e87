"""Functions in, called when the program ends and before anything that its threads use is taken down.

`atexit` comes too late: it runs the newest function first, so whatever torch registers while a thread imports it goes
before ours, under the feet of that thread, and the process dies of it. A thread of our own that waits for the main
thread to end holds the interpreter up until the functions are done: only then does `atexit` begin.
"""

import threading
from collections.abc import Callable

_ends: list[Callable[[], object]] = []
_lock = threading.Lock()
_watcher: threading.Thread | None = None


def at_exit(end: Callable[[], object]) -> None:
    """Call `end` when the main thread has ended, the newest function first, from a thread of its own."""
    global _watcher
    with _lock:
        _ends.append(end)
        if _watcher is None:
            _watcher = threading.Thread(target=_watch, name="pipecat-qwen3-exit", daemon=False)
            _watcher.start()


def forget(end: Callable[[], object]) -> None:
    """Do not call `end` any more; a function that is not there is no error."""
    with _lock:
        if end in _ends:
            _ends.remove(end)


def _watch() -> None:
    global _watcher
    threading.main_thread().join()
    while True:
        with _lock:
            if not _ends:
                _watcher = None
                return
            end = _ends.pop()
        end()
