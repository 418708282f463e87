// What went wrong in, one sentence for the user out: what happened and what to do.

import { TransportStartError } from "@pipecat-ai/client-js";

const MICROPHONE = {
  NotAllowedError: "The microphone is not allowed: allow it for this page in the browser's address bar and connect again; until then, type.",
  NotFoundError: "There is no microphone: plug one in and connect again; until then, type.",
  NotReadableError: "Another program holds the microphone: close it and connect again; until then, type.",
};

const LONGEST = 100; // characters of another program's text: three lines on a phone

/** The sentence for an error of getUserMedia(). */
export function microphoneTrouble(error) {
  return MICROPHONE[error.name] ?? `The microphone does not start (${error.message}): choose another in the browser's settings and connect again; until then, type.`;
}

/** Why this browser cannot hold a conversation at all, or null. */
export function missingFeature() {
  if (!window.isSecureContext) {
    return "Browsers give the microphone to secure pages alone: open this page at http://localhost, or over https.";
  }
  if (!window.RTCPeerConnection || !window.AudioWorkletNode || !navigator.mediaDevices) {
    return "This browser has no WebRTC, which carries the sound: open this page in a current Chrome, Edge, Firefox or Safari.";
  }
  return null;
}

/** The sentence for an error that the bot reports; services put whole answers of their servers into it. */
export function botTrouble(error) {
  if (/\b(code|http|status)\W*401\b|\bunauthori[sz]ed\b/i.test(error)) {
    return "The key of the bot's language model or recogniser is wrong: set it and start the bot again.";
  }
  return `The bot reports: ${error.length > LONGEST ? `${error.slice(0, LONGEST)}…` : error} (its console says why).`;
}

/** The sentence for an error while connecting; `answers`: whether the server still does. */
export function connectionTrouble(error, answers) {
  if (!answers) return "The bot's server does not answer: start it again, then connect.";
  if (error.name === "NotReady") {
    return "The bot was started but did not get ready: its console says why; then connect again.";
  }
  if (error.status !== undefined) {
    return `The server did not start a bot (${error.status}: ${error.message}): its console says why; then connect again.`;
  }
  if (!(error instanceof TransportStartError)) {
    return `The connection failed (${error.message}): reload this page and connect again.`;
  }
  return "No path for the sound was found: a firewall or VPN may block UDP between this browser and the bot; allow it and connect again.";
}
