"""What is registered runs while the program's threads still may."""

import subprocess
import sys

PROGRAM = """
import atexit, threading, time
from pipecat_qwen3.exits import at_exit, forget

def load():
    time.sleep(0.3)
    atexit.register(print, "torch goes")
    at_exit(engine_ends)
    time.sleep(0.5)
    print("loaded")

def engine_ends():
    print("the engine ends")

def forgotten():
    print("never")

thread = threading.Thread(target=load, daemon=True)
thread.start()
at_exit(lambda: (thread.join(), print("the load is over")))
at_exit(forgotten)
forget(forgotten)
forget(print)
print("the program ends")
"""


def test_ends_run_before_what_a_thread_registers_with_atexit():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "the program ends",
        "loaded",
        "the load is over",
        "the engine ends",
        "torch goes",
    ]


def test_a_program_that_is_interrupted_ends():
    code = "import time; from pipecat_qwen3.exits import at_exit; at_exit(lambda: print('over')); raise SystemExit(3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "over\n")
