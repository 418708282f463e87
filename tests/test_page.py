"""The page in a real Chromium with a microphone into which the test speaks, against the voice agent on a tone.

Without Chromium (Debian: apt-get install chromium chromium-driver) the tests that need it are skipped.
"""

import hashlib
import importlib.util
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from fastapi.testclient import TestClient
from hatchling.builders.wheel import WheelBuilder
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from bots.page import BUILT, mount_page
from bots.script import GREETING, reply
from tests.web.bot import ROOT, Bot
from tests.web.browser import CHROMIUM, DRIVER, Browser, recording

Turn = tuple[str, str, str, str]
"""A row of the latency table: kind, first byte, first audible, barge-in to silence."""

WEB = ROOT / "bots" / "web"
SCREENSHOTS = os.environ.get("PIPECAT_QWEN3_SCREENSHOTS")
BOT = os.environ.get("PIPECAT_QWEN3_PAGE_BOT", "tests.web.tone_bot")
"""bots.voice_agent speaks, but wants a core or two for itself."""


# -- without a browser -------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_built_page_is_up_to_date_with_its_sources() -> None:
    manifest = json.loads((BUILT / "manifest.json").read_text())
    sources = ["build.mjs", "package.json", "package-lock.json", *(f"src/{path.name}" for path in WEB.glob("src/*"))]
    built = [f"built/{path.name}" for path in BUILT.iterdir() if path.name != "manifest.json"]
    for kind, paths in (("sources", sources), ("built", built)):
        now = {path: sha256(WEB / path) for path in paths}
        changed = {path for path, _ in now.items() ^ manifest[kind].items()}
        assert not changed, f"{sorted(changed)} changed since the page was built: run `make web`"


def test_the_wheel_brings_the_built_page_and_not_what_it_was_built_from() -> None:
    files = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    web = {path for path in files if path.startswith("bots/web/")}
    assert web == {f"bots/web/built/{path.name}" for path in BUILT.iterdir()}
    assert "bots/page.py" in files


def test_the_page_takes_the_root_from_the_runner_and_leaves_it_the_rest() -> None:
    app = FastAPI()
    mount_page(app)
    app.add_api_route("/", lambda: RedirectResponse("/client/"))
    app.add_api_route("/", lambda: "a call", methods=["POST"])
    app.add_api_route("/status", lambda: "fine")
    client = TestClient(app, follow_redirects=False)
    page = client.get("/")
    assert (page.status_code, page.headers["Cache-Control"]) == (200, "no-cache")
    for file in ("page/page.js", "page/page.css", "page/icon.svg"):
        assert file in page.text
        assert client.get(f"/{file}").status_code == 200
    assert client.head("/").status_code == 200
    assert (client.post("/").json(), client.get("/status").json()) == ("a call", "fine")


def test_a_page_that_was_not_built_is_named_with_what_builds_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"index\.html is missing: run `make web`"):
        mount_page(FastAPI(), tmp_path)


# -- in Chromium -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    for name, found in (("chromium", CHROMIUM), ("chromium-driver", DRIVER)):
        if not found:
            pytest.skip(f"there is no Chromium to talk to the page with: apt-get install {name}")
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def bot(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bot]:
    if not os.environ.get("PIPECAT_QWEN3_TEST_WEB"):
        pytest.skip("a conversation in real time: `make test-web` holds it")
    for package in ("aiortc", "pocketsphinx"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the bot needs {package}, which is not installed")
    with Bot(BOT, tmp_path_factory.mktemp("bot") / "log") as started:
        yield started


@pytest.fixture
def page(chromium: Browser, bot: Bot) -> Browser:
    """The page, connected, and the bot silent."""
    if not chromium.driver.current_url.startswith(bot.url) or chromium.text("status") != "Connected":
        chromium.open(bot.url)
        chromium.connect()
        chromium.until(lambda: GREETING in chromium.lines("bot") and chromium.audible(), "the greeting")
    chromium.until(lambda: chromium.quiet(2), "the bot is silent")
    return chromium


@pytest.fixture(scope="module")
def alone(chromium: Browser) -> Iterator[str]:
    """Address of the page on a server that has no bot."""
    app = FastAPI()
    mount_page(app)
    with serving(app) as url:
        yield url


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


def say(page: Browser, name: str, until: Callable[[], object], what: str, patience_s: float) -> None:
    """Speak into the microphone; again if it was garbled, as happens where browser and bot share a busy core."""
    for last in (False, False, True):
        page.speak(recording(name))
        try:
            page.until(until, what, patience_s)
            return
        except AssertionError:
            if last:
                raise


def ask_aloud(page: Browser) -> None:
    say(page, "question", lambda: "The capital of Germany is Berlin." in page.lines("bot"), "the answer", 30)


def turns(page: Browser) -> list[Turn]:
    """The latency table, the oldest turn first."""
    rows = "[...document.querySelectorAll('#turns .turn')]"  # in one go, since the page draws it anew at any moment
    cells = page.script(f"return {rows}.map((row) => [...row.cells].map((cell) => cell.innerText))")
    return [(kind, first_byte, audible, silence) for kind, first_byte, audible, silence in cells]


def unspoken(page: Browser) -> int:
    return len(page.driver.find_elements(By.CSS_SELECTOR, ".word:not(.spoken)"))


def spoken(page: Browser) -> int:
    return len(page.driver.find_elements(By.CSS_SELECTOR, ".word.spoken"))


def test_the_greeting_is_heard_and_its_words_are_lit(page: Browser) -> None:
    assert page.lines("bot")[0] == GREETING
    assert page.audible() > 0
    assert unspoken(page) == 0 < spoken(page)
    kind, first_byte, *_ = turns(page)[0]
    assert (kind, first_byte[-1]) == ("greeting", "s")


def test_a_spoken_question_is_answered_aloud(page: Browser) -> None:
    since = page.now()
    ask_aloud(page)
    assert "capital of germany" in page.lines("user")[-1]
    page.until(lambda: page.audible(since) > 1, "the answer is heard")
    page.until(lambda: turns(page)[-1][2] != "–", "the turn's latency")
    kind, first_byte, audible, _ = turns(page)[-1]
    assert (kind, first_byte[-1], audible[-1]) == ("spoken", "s", "s")
    assert ", to your ear " in str(
        page.driver.find_elements(By.CSS_SELECTOR, "#turns .bar")[-1].get_attribute("aria-label")
    )


def test_words_light_up_while_they_are_spoken_and_a_barge_in_ends_the_line_there(page: Browser) -> None:
    since = page.now()
    page.type("Tell me a story.")
    page.until(lambda: page.audible(since) > 1 and unspoken(page) and spoken(page), "the story, in part")
    story = reply(["tell me a story"], []).text

    def cut_off() -> str | None:
        lines = [line for line in page.lines("bot") if line.startswith(story.split()[0])]
        return next((line for line in lines if line.endswith("interrupted")), None)

    say(page, "stop", cut_off, "a line that was cut off", 12)
    heard = str(cut_off()).removesuffix("interrupted").strip()
    assert story.startswith(heard)
    assert len(heard) < len(story)
    page.until(lambda: turns(page)[-2][3] != "–", "the time from barge-in to silence")
    kind, *figures = turns(page)[-2]
    assert kind == "typed"
    assert all(figure.endswith("s") for figure in figures)
    page.until(lambda: page.quiet(2) and not unspoken(page), "silence, and every word of the answer lit")


def test_a_chosen_voice_speaks_the_next_sentence(page: Browser, bot: Bot) -> None:
    voices = Select(page["voice"])
    other = next(option.text for option in voices.options if not option.is_selected())
    before = len(bot.printed())
    voices.select_by_visible_text(other)
    page.type("What is the capital of France?")
    page.until(lambda: "The capital of France is Paris." in page.lines("bot"), "the answer")
    assert Select(page["voice"]).first_selected_option.text == other
    if BOT == "tests.web.tone_bot":
        assert f"speaks as {other}: The capital of France is Paris." in bot.printed()[before:]


def test_a_muted_microphone_is_not_heard(page: Browser) -> None:
    page["mic"].click()
    assert page["mic"].get_attribute("aria-pressed") == "false"
    lines = len(page.lines("user"))
    page.speak(recording("question"))
    time.sleep(5)
    assert len(page.lines("user")) == lines
    page["mic"].click()
    page.speak(recording("question"))
    page.until(lambda: len(page.lines("user")) > lines, "the question is heard again")


def test_nothing_is_asked_of_another_server(page: Browser, bot: Bot) -> None:
    page.open(bot.url)
    page.connect()
    asked = page.requests()
    assert any(address.endswith("/start") for address in asked)
    assert not [address for address in asked if not address.startswith((bot.url, f"blob:{bot.url}", "data:"))]


def test_a_bot_that_is_killed_and_started_again_is_found_again(page: Browser, bot: Bot) -> None:
    question = "What is the capital of Italy?"
    bot.kill()
    page.type(question)
    page.until(lambda: "server is gone" in page.text("notice"), "the page says so")
    assert "not answered: it is in the box again" in page.text("notice")
    assert page.text("status") == "Looking for the bot…"
    assert page["text"].get_property("value") == question
    assert question not in page.lines("user")
    since = page.now()
    bot.start()
    page.until(lambda: page.text("status") == "Connected", "connected again")
    assert not page.text("notice")
    page.until(lambda: page.audible(since) > 1, "the greeting of the new bot is heard")
    page.type("")
    page.until(lambda: "The capital of Italy is Rome." in page.lines("bot"), "the answer")


def test_without_a_microphone_one_can_still_type(page: Browser, bot: Bot) -> None:
    page.open(bot.url)
    page.script("ears.denied = true")
    page.connect()
    page.until(lambda: page.lines("bot"), "the greeting")
    assert "microphone is not allowed: allow it" in page.text("notice")
    assert not page["mic"].is_enabled()
    assert page["mic"].get_attribute("aria-pressed") == "false"
    since = page.now()
    page.type("What is the capital of Spain?")
    page.until(lambda: "The capital of Spain is Madrid." in page.lines("bot"), "the answer")
    page.until(lambda: page.audible(since) > 1, "the answer is heard")
    assert "microphone is not allowed: allow it" in page.text("notice")
    page["connect"].click()
    page.until(lambda: page.text("status") == "Not connected", "disconnected")


REPORT = """
    const data = JSON.stringify({ label: "rtvi-ai", type: "error", data: { error: arguments[0], fatal: false } });
    for (const channel of window.channels) channel.dispatchEvent(new MessageEvent("message", { data }));
"""


def test_what_the_bot_reports_says_what_to_do_and_goes_when_it_speaks_again(page: Browser, bot: Bot) -> None:
    page.open(bot.url)
    page.script("""
        window.channels = [];
        const open = RTCPeerConnection.prototype.createDataChannel;
        RTCPeerConnection.prototype.createDataChannel = function (...of) {
          const channel = open.apply(this, of);
          window.channels.push(channel);
          return channel;
        };
    """)
    page.connect()
    page.until(lambda: page.audible() and page.quiet(), "the greeting")
    page.script(REPORT, "Error during completion: Error code: 401 - {'error': {'message': 'Incorrect API key'}}")
    assert page.text("notice").startswith("The key of the bot's language model or recogniser is wrong: set it")
    page.script(REPORT, f"Error during completion: {1000 * 'x'}")
    assert page.text("notice").startswith("The bot reports: Error during completion: xxx")
    assert page.text("notice").endswith("(its console says why).")
    assert len(page.text("notice")) < 160
    page.type("What is the capital of France?")
    page.until(lambda: page.audible(page.now() - 500), "the answer")
    assert not page["notice"].is_displayed()


def test_while_the_browser_asks_for_the_microphone_the_page_says_so(chromium: Browser, alone: str) -> None:
    chromium.open(alone)
    assert not chromium["notice"].is_displayed()
    chromium.script("""
        navigator.permissions.query = async () => ({ state: "prompt" });
        navigator.mediaDevices.getUserMedia = () => new Promise((_, reject) => { window.block = reject; });
    """)
    chromium["connect"].click()
    chromium.until(lambda: chromium.text("notice").startswith("Allow the microphone"), "the explanation")
    assert chromium["hint"].is_displayed()
    chromium.script("window.fetch = () => new Promise(() => {}); block(new DOMException('', 'NotAllowedError'))")
    chromium.until(lambda: not chromium.text("notice"), "the explanation is gone")
    assert chromium.text("status") == "Connecting…"
    chromium["connect"].click()


def test_a_browser_that_does_not_run_the_page_is_named(chromium: Browser, alone: str) -> None:
    chromium.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        chromium.open(alone)
        chromium.until(lambda: "This page needs JavaScript" in chromium.text("notice"), "the notice", 10)
    finally:
        chromium.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_the_latency_table_holds_every_turn(chromium: Browser, alone: str) -> None:
    chromium.open(alone)
    chromium.driver.execute_async_script(
        """
        const [source, done] = arguments;
        import(URL.createObjectURL(new Blob([source], { type: "text/javascript" }))).then(({ Latency }) => {
          const [turns, stages] = ["turns", "stages"].map((id) => document.getElementById(id));
          const latency = new Latency({ turns, stages });
          const speech = (value) => latency.metrics({ ttfb: [{ processor: "Qwen3TTSService#0", value }] });
          speech(0);
          speech(0.05);
          latency.botStarts(900);
          latency.heard(1000);
          latency.begins("spoken", 2000);
          speech(0.06);
          latency.botStarts(2500);
          latency.turn({ stages: [{ name: "endpointing wait", ms: 200 }, { name: "speech synthesis", ms: 100 }] });
          latency.heard(2540);
          speech(0.5);
          latency.interrupts(3000);
          latency.begins("typed", 3000);
          latency.bargeIn({ silence_ms: 20 });
          latency.silent(3080);
          latency.bargeIn({ silence_ms: 20 });
          speech(0.07);
          latency.botStarts(3300);
          latency.heard(3400);
          latency.bargeIn({ silence_ms: 30 });
          done();
        });
        """,
        (WEB / "src" / "latency.js").read_text(),
    )
    assert turns(chromium) == [
        ("greeting", "50 ms", "–", "–"),
        ("spoken", "60 ms", "340 ms", "80 ms"),
        ("typed", "70 ms", "400 ms", "30 ms"),
    ]
    bars = chromium.driver.find_elements(By.CSS_SELECTOR, "#turns .bar")
    assert [bar.get_attribute("aria-label") for bar in bars] == [
        "endpointing wait 200 ms, speech synthesis 100 ms, to your ear 40 ms",
        "from Enter to your ear 400 ms",
    ]
    assert bars[0].rect["width"] == pytest.approx(0.85 * bars[1].rect["width"], abs=1)


@pytest.mark.parametrize(
    ("before", "sentence"),
    [
        ("", r"The server did not start a bot (404: Not Found): its console says why; then connect again."),
        ("window.fetch = async () => { throw new TypeError('Failed to fetch'); }", "server does not answer: start it"),
        ("delete window.RTCPeerConnection", "This browser has no WebRTC"),
        ("Object.defineProperty(window, 'isSecureContext', {value: false})", "open this page at http://localhost"),
    ],
)
def test_what_goes_wrong_is_said_in_a_sentence(chromium: Browser, alone: str, before: str, sentence: str) -> None:
    chromium.open(alone)
    chromium.script(before)
    chromium["connect"].click()
    notice = chromium.until(lambda: chromium.text("notice"), "a notice")
    assert sentence in notice
    assert chromium.text("status") == "Not connected"
    assert chromium.text("connect") == "Connect"


def test_every_control_has_a_name_and_the_keyboard_reaches_them_in_order(chromium: Browser, alone: str) -> None:
    chromium.open(alone)

    def tree() -> list[dict[str, Any]]:
        """All nodes; none until Chromium has built its tree, which it does in its own time."""
        nodes = chromium.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        return nodes if any(node["role"]["value"] == "button" for node in nodes) else []

    nodes = chromium.until(tree, "the accessibility tree")
    controls = [node for node in nodes if node["role"]["value"] in ("button", "textbox", "combobox", "log", "image")]
    assert len(controls) >= 7
    assert all(node["name"]["value"] for node in controls)
    roles = {node["role"]["value"] for node in nodes}
    assert {"status", "main", "heading"} <= roles
    chromium.script("document.querySelectorAll(':disabled').forEach((control) => { control.disabled = false; })")
    reached = []
    for _ in range(7):
        chromium.driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(chromium.script("return document.activeElement.id"))
    assert reached == ["connect", "transcript", "mic", "text", "send", "voice", "language"]


LONG_TALK = """
    const line = '<p class="bot"><span class="said">Once there was a river that wanted to see the sea.</span></p>';
    document.getElementById("transcript").innerHTML = line.repeat(20);
    document.getElementById("notice").textContent = "A sentence that says what went wrong and what to do. ".repeat(3);
    document.getElementById("notice").hidden = false;
    document.getElementById("more").open = arguments[0];
"""
TOUCHED = """
    const { x, y, width, height } = document.getElementById(arguments[1]).getBoundingClientRect();
    return document.elementFromPoint(x + width / 2, y + height / 2)?.closest("[id]").id;
"""
SCROLLED = "document.getElementById(arguments[1]).scrollIntoView();"


@pytest.mark.parametrize("panel", [False, True])
@pytest.mark.parametrize(("width", "height"), [(320, 568), (360, 640), (390, 700), (768, 700)])
def test_the_page_fits_a_small_screen(chromium: Browser, alone: str, width: int, height: int, panel: bool) -> None:
    with chromium.screen_of(width, height):
        chromium.open(alone)
        chromium.script(LONG_TALK, panel)
        assert chromium.script("return document.documentElement.scrollWidth") == width
        for name in ("connect", "mic", "text", "send"):
            box = chromium[name].rect
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
            assert box["y"] + box["height"] <= height
            assert box["height"] >= 44
            assert chromium.script(TOUCHED, panel, name) == name
        if panel:
            for name in ("voice", "language", "latency-title"):
                # In one script: between two, the page may hear of the new width, and fold the panel.
                assert chromium.script(LONG_TALK + SCROLLED + TOUCHED, panel, name) == name


def test_a_phone_that_is_turned_shows_voice_and_latency_and_folds_them_again(chromium: Browser, alone: str) -> None:
    with chromium.screen_of(390, 844):
        chromium.open(alone)
        assert not chromium["voice"].is_displayed()
        with chromium.screen_of(844, 390):
            chromium.until(chromium["voice"].is_displayed, "the panel", 10)
    with chromium.screen_of(390, 844):
        chromium.until(lambda: not chromium["voice"].is_displayed(), "the panel is folded", 10)


@pytest.mark.parametrize("width", [320, 390, 600])
def test_the_title_is_shown_whole_or_not_at_all(chromium: Browser, alone: str, width: int) -> None:
    with chromium.screen_of(width, 700):
        chromium.open(alone)
        chromium.script("document.getElementById('status').textContent = 'Looking for the bot…'")
        title = "const title = document.querySelector('h1'); return "
        hidden = chromium.script(f"{title} getComputedStyle(title).clipPath !== 'none'")
        assert hidden or chromium.script(f"{title} title.scrollWidth <= title.clientWidth")


def contrast(one: str, other: str) -> float:
    """Of two opaque colours "rgb(r, g, b)", by WCAG 2."""

    def luminance(colour: str) -> float:
        assert colour.startswith("rgb("), f"{colour} is not opaque"
        parts = np.array([int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_and_edges_stand_out_as_wcag_asks(chromium: Browser, alone: str, scheme: str) -> None:
    def style(selector: str, name: str) -> str:
        return chromium.script(
            "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, name
        )

    with chromium.scheme(scheme):
        chromium.open(alone)
        chromium.script("""
            document.body.dataset.state = "live";
            document.getElementById("transcript").innerHTML =
              '<p class="bot"><span class="said"><i class="word spoken">lit</i><i class="word">unlit</i></span></p>';
        """)
        talk = style(".talk", "backgroundColor")
        lit, unlit = style(".word.spoken", "color"), style(".word:not(.spoken)", "color")
        assert style(".word:not(.spoken)", "opacity") == "1"
        assert contrast(unlit, talk) >= 4.5
        assert contrast(lit, unlit) >= 2
        for control in ("#text", "#voice", "#language", "#connect"):
            for ground in (talk, style("body", "backgroundColor"), style(control, "backgroundColor")):
                assert contrast(style(control, "borderTopColor"), ground) >= 3


def test_the_page_is_dark_where_the_system_is(chromium: Browser, alone: str) -> None:
    paper = {}
    for scheme in ("light", "dark"):
        with chromium.scheme(scheme):
            chromium.open(alone)
            colour = chromium.script("return getComputedStyle(document.body).backgroundColor")
            paper[scheme] = sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
    assert paper["dark"] < 150
    assert paper["light"] > 600


@pytest.mark.skipif(not SCREENSHOTS, reason="no screenshots asked for: make test-web SCREENSHOTS=docs/images")
def test_screenshots_of_a_conversation(page: Browser, bot: Bot) -> None:
    if page.lines("user"):  # another test's
        page.open(bot.url)
        page.connect()
        page.until(lambda: page.audible() and page.quiet(), "the greeting")
    ask_aloud(page)
    page.until(page.quiet, "silence")
    since = page.now()
    page.type("Tell me a story.")
    page.until(lambda: page.audible(since) > 3, "the story")
    page.type("Start the story again.")
    page.until(lambda: page.lines("bot")[-2].endswith("interrupted") and unspoken(page), "another begins")
    since = page.now()
    page.until(lambda: page.audible(since) > 1 and turns(page)[-2][3] != "–", "it is heard")
    page.script("document.activeElement.blur()")
    folder = Path(SCREENSHOTS or "")
    folder.mkdir(parents=True, exist_ok=True)
    for name, scheme, width, height in [
        ("light", "light", 1180, 980),
        ("dark", "dark", 1180, 980),
        ("phone", "light", 390, 844),
    ]:
        with page.scheme(scheme), page.screen_of(width, height, scale=2):
            page.script("const log = document.getElementById('transcript'); log.scrollTop = log.scrollHeight")
            time.sleep(0.5)  # scrolling is smooth
            assert page.driver.save_screenshot(str(folder / f"page-{name}.png"))
            assert page.script(
                "const more = document.getElementById('more'); return more.scrollHeight <= more.clientHeight"
            )
            top = page.script("return document.getElementById('transcript').getBoundingClientRect().top")
            cut = page.script("return document.querySelector('.mark').getBoundingClientRect().top")
            assert cut > top
            assert unspoken(page)
