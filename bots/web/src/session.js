// Handlers in, a conversation with the bot out: connects, comes back by itself when the server does, ends when asked.

import { LogLevel, PipecatClient, logger } from "@pipecat-ai/client-js";
import { SmallWebRTCTransport, WavMediaManager } from "@pipecat-ai/small-webrtc-transport";
import { botTrouble, connectionTrouble, microphoneTrouble } from "./errors.js";

const START_TIMEOUT_MS = 15_000;
const READY_TIMEOUT_MS = 25_000; // Pipecat grants its processors 20 s to set up
const HEARTBEAT_MS = 2_000; // the transport itself notices a dead server only after some ten seconds
const LONGEST_PAUSE_MS = 5_000;

logger.setLevel(LogLevel.ERROR);

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Whether the server that sent this page still answers. */
async function serverAnswers() {
  try {
    await fetch("/", { method: "HEAD", cache: "no-store", signal: AbortSignal.timeout(HEARTBEAT_MS) });
    return true;
  } catch {
    return false;
  }
}

/** Whether the browser is going to ask the user for the microphone, as far as it tells. */
async function microphoneIsAsked() {
  try {
    return (await navigator.permissions.query({ name: "microphone" })).state === "prompt";
  } catch {
    return true; // an older Firefox does not tell
  }
}

/** Why there is no microphone, or null; the client itself swallows that. */
async function microphoneError() {
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    for (const track of stream.getTracks()) track.stop();
    return null;
  } catch (error) {
    return error;
  }
}

function notReady() {
  return Object.assign(new Error("no bot-ready message"), { name: "NotReady" });
}

/**
 * One conversation at a time.
 *
 * handlers.onState("off" | "connecting" | "live" | "lost"), onNotice(sentence or null), which holds until the next,
 * onReport(sentence or null), which passes, onRefusal(sentence), onMicrophone(track or null), onBotTrack(track), and
 * the RTVI callbacks of the client in `handlers.rtvi`.
 */
export class Session {
  #handlers;
  #client = null;
  #round = 0; // counts what the user asked for: an older round's promises no longer count
  #heartbeat = 0;

  constructor(handlers) {
    this.#handlers = handlers;
  }

  /** Connect. A first failure is reported and ends it; a conversation that was lost is looked for until disconnect(). */
  async connect() {
    const round = ++this.#round;
    this.#handlers.onNotice(null);
    this.#handlers.onState("connecting");
    for (let attempt = 1; ; attempt++) {
      try {
        return await this.#open(round);
      } catch (error) {
        const answers = await serverAnswers();
        if (round !== this.#round) return;
        await this.#close();
        // A bot that loads its parts for its first client may miss the moment in which the two sides meet.
        if (error.name === "NotReady" && answers && attempt === 1) continue;
        await this.disconnect();
        this.#handlers.onNotice(connectionTrouble(error, answers));
        return;
      }
    }
  }

  async disconnect() {
    this.#round++;
    this.#handlers.onNotice(null);
    this.#handlers.onState("off");
    await this.#close();
  }

  /** Say something by keyboard: it cuts the bot off, as a voice would. */
  say(text) {
    return this.#client.sendText(text, { run_immediately: true, audio_response: true });
  }

  /** Send a message that the bot knows, such as "set-voice". */
  tell(type, data) {
    this.#client.sendClientMessage(type, data);
  }

  mute(muted) {
    this.#client.enableMic(!muted);
  }

  async #open(round) {
    if (await microphoneIsAsked()) {
      this.#handlers.onReport("Allow the microphone in the browser's question, or block it and type.");
    }
    const trouble = await microphoneError();
    if (round !== this.#round) return;
    this.#handlers.onReport(null);
    const client = new PipecatClient({
      transport: new SmallWebRTCTransport({ mediaManager: new WavMediaManager() }),
      enableMic: !trouble, // a conversation by keyboard is better than none
      enableCam: false,
      callbacks: {
        ...this.#handlers.rtvi,
        onTrackStarted: (track, participant) => {
          if (!participant?.local && track.kind === "audio") this.#handlers.onBotTrack(track);
        },
        onBotDisconnected: () => this.#ended(client),
        onDisconnected: () => this.#lost(client),
        onMessageError: (message) => this.#handlers.onRefusal(message.data?.error ?? "The bot refused that."),
        onError: (message) => {
          if (message.data?.error) this.#handlers.onReport(botTrouble(message.data.error));
        },
      },
    });
    this.#client = client;
    await this.#start(client);
    if (round !== this.#round) return;
    this.#handlers.onMicrophone(trouble ? null : client.tracks().local.audio);
    this.#handlers.onNotice(trouble && microphoneTrouble(trouble));
    this.#handlers.onState("live");
    this.#watch(client);
  }

  /** Ask the server for a bot and wait until it is ready. */
  async #start(client) {
    const endpoint = new URL("/start", location).href;
    const started = client.startBotAndConnect({
      endpoint,
      requestData: { transport: "webrtc" },
      timeout: START_TIMEOUT_MS,
    });
    let timer;
    const late = new Promise((_, reject) => {
      timer = setTimeout(() => reject(notReady()), READY_TIMEOUT_MS);
    });
    await Promise.race([started, late]).finally(() => clearTimeout(timer));
  }

  async #close() {
    clearInterval(this.#heartbeat);
    this.#heartbeat = 0;
    const client = this.#client;
    this.#client = null; // before anything is awaited: what its callbacks say no longer counts
    const microphone = client?.tracks().local.audio;
    await client?.disconnect().catch(() => {});
    microphone?.stop(); // a client that never had a connection leaves it on
  }

  /** Two unanswered requests in a row: the server is gone, though the transport still hopes. */
  #watch(client) {
    let missed = 0;
    this.#heartbeat = setInterval(async () => {
      missed = (await serverAnswers()) ? 0 : missed + 1;
      if (missed === 2) this.#lost(client);
    }, HEARTBEAT_MS);
  }

  /** The bot said goodbye: for good if its server is still there, else because the server stops. */
  async #ended(client) {
    if (client !== this.#client) return;
    if (await serverAnswers()) {
      if (client !== this.#client) return;
      await this.disconnect();
      this.#handlers.onNotice("The bot ended the conversation: connect to begin another.");
    } else {
      this.#lost(client);
    }
  }

  /** A conversation broke off: look for its server until it is back or the user has had enough. */
  async #lost(client) {
    if (client !== this.#client || !this.#heartbeat) return;
    const round = this.#round;
    this.#handlers.onNotice("The bot's server is gone: this page connects again when it is back, or press Stop.");
    this.#handlers.onState("lost");
    await this.#close();
    for (let pause = 500; ; pause = Math.min(2 * pause, LONGEST_PAUSE_MS)) {
      await sleep(pause);
      if (round !== this.#round) return;
      if (!(await serverAnswers())) continue;
      try {
        return await this.#open(round);
      } catch {
        if (round !== this.#round) return;
        await this.#close();
      }
    }
  }
}
