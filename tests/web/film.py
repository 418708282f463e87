"""Half a minute of conversation with the voice agent, filmed in Chromium: a question, a story, an interruption.

    python -m tests.web.film OUT.webm [BOT]

BOT is a module, bots.voice_agent unless told otherwise; it wants a core for itself, and the browser another.
"""

import sys
import tempfile
import time
from pathlib import Path

from bots.script import GREETING
from tests.web.bot import Bot
from tests.web.browser import Browser, recording


def converse(page: Browser) -> None:
    """Greeting, a question and a barge-in by voice, a question by keyboard."""
    page.connect()
    page.until(lambda: GREETING in page.lines("bot") and page.audible() and page.quiet(), "the greeting")
    page.speak(recording("question"))
    page.until(lambda: "The capital of Germany is Berlin." in page.lines("bot") and page.quiet(), "the answer")
    since = page.now()
    page.type("Tell me a story.")
    page.until(lambda: page.audible(since) > 5, "the story, in part")
    page.speak(recording("stop"))
    page.until(lambda: any(line.endswith("interrupted") for line in page.lines("bot")), "the barge-in")
    page.until(lambda: page.lines("bot")[-1] == "All right." and page.quiet(), "silence")
    page.type("What is the capital of France?")
    page.until(lambda: "The capital of France is Paris." in page.lines("bot") and page.quiet(1.5), "the answer")


def main() -> None:
    """Film it."""
    out, module = Path(sys.argv[1]), (sys.argv[2:] or ["bots.voice_agent"])[0]
    with tempfile.TemporaryDirectory() as folder, Bot(module, Path(folder) / "log") as bot, Browser() as page:
        page.open(bot.url)
        with page.film(out):
            began = time.monotonic()
            converse(page)
        print(f"{out}: {time.monotonic() - began:.0f} s, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
