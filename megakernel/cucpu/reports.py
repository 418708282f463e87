"""Reads what AddressSanitizer and ThreadSanitizer wrote: comes in a report, goes out a message of a few lines."""

import re
from pathlib import Path

HERE = str(Path(__file__).parent)

ACCESS = re.compile(
    r"^  (?:Previous )?(?P<what>\D+) of size (?P<size>\d+) at \S+ by (?P<thread>thread T\d+|main thread)"
)
THREAD = re.compile(r"^  (?P<thread>Thread T\d+) '(?P<name>[^']*)'")
FRAME = re.compile(r"^    #\d+ .*?(?P<place>/\S+:\d+)")


def races(report: str) -> str:
    """One line a warning: who did what where, and who before; empty if ThreadSanitizer warned of nothing."""
    lines = []
    for warning in re.split(r"^WARNING: ThreadSanitizer: ", report, flags=re.MULTILINE)[1:]:
        names = {
            found["thread"].lower(): found["name"] for line in warning.splitlines() if (found := THREAD.match(line))
        }
        accesses: list[str] = []
        placed = True
        for line in warning.splitlines():
            if found := ACCESS.match(line):
                who = names.get(found["thread"].lower(), found["thread"])
                accesses.append(f"{found['what'].lower()} of {found['size']} bytes by {who}")
                placed = False
            elif not placed and (found := FRAME.match(line)) and not found["place"].startswith(HERE):
                accesses[-1] += f" at {found['place']}"  # the kernel's own line, not the atomic in cucpu.h
                placed = True
            elif not line.strip():  # no frames: too long ago for ThreadSanitizer's memory
                placed = True
        lines.append(f"{warning.split(' (', 1)[0]}: " + "; before it ".join(accesses))
    return "\n".join(dict.fromkeys(lines))


def bad_access(report: str) -> str:
    """What and where, which block and thread, how far from which memory; empty if AddressSanitizer found nothing."""
    if not any(mark in report for mark in ("ERROR: AddressSanitizer", "runtime error: ")):
        return ""
    telling = re.compile(r"^(SUMMARY: AddressSanitizer: |cucpu: by |\S+: runtime error: |0x\S+ is located )")
    return "\n".join(line for line in report.splitlines() if telling.match(line))
