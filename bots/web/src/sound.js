// Audio tracks in, loudness out: a meter per track, read fifty times a second, and the moments at which the bot is heard.

export const TICK_MS = 20;

const AUDIBLE_DB = -45; // room noise lies below, the quietest speech above
const QUIET_MS = 100; // gaps between words are shorter than the silence after an interruption

/** Loudness of one track in dBFS, -100 when there is none. */
class Meter {
  #context;
  #source = null;
  #analyser;
  #samples;

  constructor(context) {
    this.#context = context;
    this.#analyser = new AnalyserNode(context, { fftSize: 1024 });
    this.#samples = new Float32Array(this.#analyser.fftSize);
  }

  listen(track) {
    this.#source?.disconnect();
    this.#source = track && this.#context.createMediaStreamSource(new MediaStream([track]));
    this.#source?.connect(this.#analyser);
  }

  read() {
    if (!this.#source) return -100;
    this.#analyser.getFloatTimeDomainData(this.#samples);
    let power = 0;
    for (const sample of this.#samples) power += sample * sample;
    return Math.max(-100, 10 * Math.log10(power / this.#samples.length + 1e-10));
  }
}

/**
 * Both sides of the conversation: onTick(bot dBFS, user dBFS), onHeard(ms timestamp) when the bot becomes audible and
 * onSilent(ms timestamp of its last audible moment) when it has been quiet for a while.
 */
export class Sound {
  #context = new AudioContext();
  #bot = new Meter(this.#context);
  #user = new Meter(this.#context);
  #timer = 0;
  #lastAudible = 0;

  /** Whether the bot can be heard now. */
  audible = false;

  /** Start reading; to be called from a click, since browsers keep sound off until then. */
  start({ onTick, onHeard, onSilent }) {
    void this.#context.resume();
    clearInterval(this.#timer);
    this.#timer = setInterval(() => {
      const now = performance.now();
      const bot = this.#bot.read();
      if (bot > AUDIBLE_DB) {
        this.#lastAudible = now;
        if (!this.audible) onHeard(now);
        this.audible = true;
      } else if (this.audible && now - this.#lastAudible > QUIET_MS) {
        this.audible = false;
        onSilent(this.#lastAudible);
      }
      onTick(bot, this.#user.read());
    }, TICK_MS);
  }

  stop() {
    clearInterval(this.#timer);
    this.listenToBot(null);
    this.listenToUser(null);
    this.audible = false;
  }

  listenToBot(track) {
    this.#bot.listen(track);
  }

  listenToUser(track) {
    this.#user.listen(track);
  }
}
