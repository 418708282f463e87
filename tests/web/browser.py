"""A real headless Chromium on the page: clicks and words in, what is on the screen and what is heard out."""

import base64
import json
import shutil
import time
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from pipecat_qwen3.backend import SAMPLE_RATE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

AUDIBLE_DB = -45.0
"""Comfort noise lies below, speech above."""

_PATIENCE_S = 60.0
_EARS = (Path(__file__).parent / "ears.js").read_text()

T = TypeVar("T")


def recording(name: str) -> np.ndarray:
    """int16 [samples] at 24 kHz: a sentence as the embedded voice rms spoke it with seed 1."""
    with wave.open(str(Path(__file__).parent / f"{name}.wav")) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.int16)


class Browser:
    """Chromium with a microphone of the test's own and ears beside the page's."""

    def __init__(self, size: tuple[int, int] = (1180, 800)) -> None:
        """Start it; raises selenium's WebDriverException if it does not."""
        options = ChromeOptions()
        options.binary_location = CHROMIUM or ""
        for argument in (
            *("--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={size[0]},{size[1]}"),
            *("--use-fake-device-for-media-stream", "--auto-accept-this-tab-capture"),
            *("--autoplay-policy=no-user-gesture-required", "--hide-scrollbars"),
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = Chrome(options=options, service=ChromeService(DRIVER))
        self.driver.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["audioCapture"]})
        self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _EARS})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.quit()

    def open(self, url: str) -> None:
        """Load the page anew."""
        self.driver.get(url)

    def __getitem__(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def text(self, name: str) -> str:
        """What can be read in an element."""
        return self[name].text

    def lines(self, who: str) -> list[str]:
        """What "user" or "bot" said, by the transcript."""
        return [said.text for said in self.driver.find_elements(By.CSS_SELECTOR, f"#transcript .{who} .said")]

    def script(self, source: str, *arguments: Any) -> Any:
        """Run JavaScript in the page; `arguments[i]` are the given ones."""
        return self.driver.execute_script(source, *arguments)

    def until(self, condition: Callable[[], T], what: str, patience_s: float = _PATIENCE_S) -> T:
        """The first true value of a condition; an AssertionError with the whole screen if there is none in time."""
        end = time.monotonic() + patience_s
        while not (value := condition()):
            assert time.monotonic() < end, f"not in {patience_s:.0f} s: {what}; the screen:\n{self.screen()}"
            time.sleep(0.25)
        return value

    def screen(self) -> str:
        """All text on the page and what the browser's console says."""
        console = [entry["message"] for entry in self.driver.get_log("browser")]
        return "\n".join([self.driver.find_element(By.TAG_NAME, "body").text, *console])

    def connect(self, patience_s: float = 2 * _PATIENCE_S) -> None:
        """Press Connect and wait for the bot."""
        self["connect"].click()
        self.until(lambda: self.text("status") == "Connected", "connected", patience_s)

    def type(self, text: str) -> None:
        """Send a line from the text box."""
        self["text"].send_keys(text + "\n")

    def speak(self, pcm: np.ndarray) -> None:
        """Say int16 samples at 24 kHz into the microphone."""
        self.script("ears.say(...arguments)", base64.b64encode(pcm.tobytes()).decode(), SAMPLE_RATE)

    def now(self) -> float:
        """The page's clock in ms."""
        return self.script("return performance.now()")

    def heard(self, since: float = 0.0) -> list[tuple[float, float]]:
        """(ms, dBFS) of what the bot's track played, every 20 ms."""
        return [tuple(entry) for entry in self.script("return ears.heard.filter(([at]) => at >= arguments[0])", since)]

    def audible(self, since: float = 0.0) -> float:
        """Seconds in which the bot was heard."""
        return 0.02 * sum(level > AUDIBLE_DB for _, level in self.heard(since))

    def quiet(self, seconds: float = 1.0) -> bool:
        """Whether the bot has not been heard for so long; a track that plays nothing does not count."""
        levels = [level for _, level in self.heard(self.now() - 1000 * seconds)]
        return len(levels) > 25 * seconds and max(levels) <= AUDIBLE_DB

    @contextmanager
    def screen_of(self, width: int, height: int, scale: int = 1) -> Iterator[None]:
        """A screen of another size, a phone's below 500 pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        yield
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    @contextmanager
    def scheme(self, name: str) -> Iterator[None]:
        """A system that prefers "light" or "dark"."""
        for value in (name, ""):
            feature = {"name": "prefers-color-scheme", "value": value}
            self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            if value:
                yield

    @contextmanager
    def film(self, path: Path, frames_per_second: int = 12) -> Iterator[None]:
        """Record the tab, with what is said and heard, into a WebM file."""
        # A page may film itself only where a user has just pressed something.
        start = {"expression": f"ears.film({frames_per_second})", "awaitPromise": True, "userGesture": True}
        self.driver.execute_cdp_cmd("Runtime.evaluate", start)
        yield
        path.write_bytes(base64.b64decode(self.script("return ears.cut()")))

    def requests(self) -> list[str]:
        """Addresses that the page asked for."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
