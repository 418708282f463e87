// The page's elements and the session, wired together; everything that happens on the screen begins here.

import { missingFeature } from "./errors.js";
import { Latency } from "./latency.js";
import { Session } from "./session.js";
import { Sound } from "./sound.js";
import { Transcript } from "./transcript.js";
import { loudness, Wave } from "./wave.js";

const $ = (id) => document.getElementById(id);

const STATES = {
  off: { status: "Not connected", button: "Connect" },
  connecting: { status: "Connecting…", button: "Cancel" },
  live: { status: "Connected", button: "Disconnect" },
  lost: { status: "Looking for the bot…", button: "Stop" },
};

const wave = new Wave($("wave"));
const transcript = new Transcript($("transcript"));
const latency = new Latency({ turns: $("turns"), stages: $("stages") });

let state = "off";
let sound = null; // browsers want a click before there is any
let offered = null; // the bot's last "voices" message
let interrupting = false;
let standing = null; // the notice that holds until another takes its place
let unanswered = []; // {text, line}: what was typed since the bot last began to speak

const session = new Session({
  onState,
  onNotice,
  onReport,
  onRefusal(sentence) {
    onReport(sentence);
    if (offered) showVoices(offered);
  },
  onMicrophone(track) {
    sound.listenToUser(track);
    $("mic").disabled = !track;
    showMicrophone(Boolean(track));
  },
  onBotTrack(track) {
    $("speaker").srcObject = new MediaStream([track]); // Chrome plays and measures only what an element takes
    sound.listenToBot(track);
  },
  rtvi: {
    onUserTranscript: ({ text, final }) => transcript.user(text, final),
    onUserStartedSpeaking: interrupt,
    onUserStoppedSpeaking: () => latency.begins("spoken", performance.now()),
    onBotStartedSpeaking() {
      interrupting = false;
      unanswered = [];
      onReport(null);
      latency.botStarts(performance.now());
    },
    onBotStoppedSpeaking() {
      if (interrupting) transcript.cut();
      interrupting = false;
    },
    onBotOutput: (data) => transcript.bot(data),
    onMetrics: (data) => latency.metrics(data),
    onServerMessage(message) {
      if (message.type === "voices") showVoices(message);
      else if (message.type === "latency") latency.turn(message);
      else if (message.type === "barge-in") {
        latency.bargeIn(message);
        transcript.cut();
      }
    },
  },
});

function interrupt() {
  if (!sound.audible) return;
  interrupting = true;
  latency.interrupts(performance.now());
}

function onState(next) {
  if (next === "connecting") {
    transcript.clear();
    latency.clear();
    unanswered = [];
  } else if (next === "lost") {
    transcript.cut();
    latency.begins("greeting", performance.now());
    takeBack();
  }
  if (next !== "live") {
    sound?.stop();
    $("level").style.transform = "";
  } else {
    sound.start({
      onTick(bot, user) {
        wave.add(bot, user);
        $("level").style.transform = `scaleY(${loudness(user)})`;
      },
      onHeard: (now) => latency.heard(now),
      onSilent: (last) => latency.silent(last),
    });
  }
  state = next;
  document.body.dataset.state = next;
  $("status").textContent = STATES[next].status;
  $("connect").textContent = STATES[next].button;
  const live = next === "live";
  for (const id of ["text", "send"]) $(id).disabled = !live;
  for (const id of ["voice", "language"]) $(id).disabled = !live || !offered;
  if (!live) {
    $("mic").disabled = true;
    showMicrophone(false);
  }
}

function onNotice(sentence) {
  standing = sentence;
  onReport(null);
}

/** Show a sentence until the bot speaks again; null shows again what held before. */
function onReport(sentence) {
  const text = sentence ?? standing ?? "";
  if ($("notice").textContent !== text) $("notice").textContent = text; // unchanged, it is not to be read aloud again
  $("notice").hidden = !text;
}

/** Put what was typed and not answered into the box again. */
function takeBack() {
  if (!unanswered.length) return;
  for (const { line } of unanswered) line.remove();
  $("text").value = [...unanswered.map(({ text }) => text), $("text").value].join(" ").trim();
  unanswered = [];
  onNotice(`${standing} What you typed was not answered: it is in the box again.`);
}

/** Fill the pickers with what the bot offers. */
function showVoices(message) {
  offered = message;
  fill($("voice"), message.voices.map((voice) => [voice, voice]), message.voice);
  fill($("language"), [["", "automatic"], ...message.languages.map((name) => [name, name])], message.language ?? "");
  $("about").textContent = [
    [message.model, message.stt, message.llm].filter(Boolean).join(" · "),
    message.hint,
  ].filter(Boolean).join("\n");
}

function fill(select, choices, chosen) {
  select.replaceChildren(...choices.map(([value, label]) => new Option(label, value, false, value === chosen)));
  select.disabled = state !== "live" && state !== "connecting";
}

function showMicrophone(on) {
  $("mic").setAttribute("aria-pressed", String(on));
}

$("connect").addEventListener("click", () => {
  if (state !== "off") {
    void session.disconnect();
    return;
  }
  const missing = missingFeature();
  if (missing) {
    onNotice(missing);
    return;
  }
  sound ??= new Sound();
  void session.connect();
});

$("mic").addEventListener("click", () => {
  const on = $("mic").getAttribute("aria-pressed") !== "true";
  session.mute(!on);
  showMicrophone(on);
});

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text) return;
  $("text").value = "";
  interrupt();
  latency.begins("typed", performance.now());
  unanswered.push({ text, line: transcript.user(text, true) });
  void session.say(text);
});

$("voice").addEventListener("change", () => session.tell("set-voice", { voice: $("voice").value }));
$("language").addEventListener("change", () => session.tell("set-language", { language: $("language").value || null }));

// Small screens show the conversation first; a phone that is turned becomes a wide one.
const small = matchMedia("(max-width: 52rem)");
const fold = () => {
  $("more").open = !small.matches;
};
small.addEventListener("change", fold);
fold();
document.body.dataset.state = state;
onNotice(missingFeature());
