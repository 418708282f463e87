// What the bot measured and when it was heard here in, figures and a small chart out.

const TURNS = 6; // rows of the chart
const TINTS = 8; // in page.css
const HERE = "to your ear"; // network, jitter buffer and playback: what the bot cannot see

function ms(value) {
  if (value >= 9_950) return `${(value / 1000).toFixed(1)} s`;
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
}

function row(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

export class Latency {
  #view;
  #turns = []; // {turn, stages: [{name, ms}]}
  #colours = new Map(); // stage name -> its tint
  #startedAt = null; // the bot said that it speaks; not heard yet
  #heardAfter = null; // heard, but the bot's own figures are still to come
  #typedAt = null;
  #cutAt = null;

  /** view: the elements {ttfb, audible, silence, turns, stages}. */
  constructor(view) {
    this.#view = view;
  }

  clear() {
    this.#turns = [];
    for (const name of ["ttfb", "audible", "silence"]) this.#view[name].textContent = "–";
    this.#view.turns.replaceChildren();
    this.#view.stages.replaceChildren();
  }

  /** A line was typed: without word from the bot, its answer is timed from here. */
  typed(now) {
    this.#typedAt = now;
  }

  /** The user begins while the bot is heard. */
  interrupts(now) {
    this.#cutAt ??= now;
  }

  botStarts(now) {
    this.#startedAt = now;
    this.#heardAfter = null;
    this.#cutAt = null;
  }

  heard(now) {
    if (this.#startedAt === null) {
      this.#heardAfter = 0; // the sound was faster than the message
    } else {
      this.#heardAfter = now - this.#startedAt;
      this.#startedAt = null;
    }
    if (this.#typedAt !== null) this.#view.audible.textContent = ms(now - this.#typedAt);
    this.#typedAt = null;
    this.#complete();
  }

  /** The bot went quiet: a figure if somebody cut it off. */
  silent(lastAudible) {
    if (this.#cutAt !== null) this.#view.silence.textContent = ms(Math.max(0, lastAudible - this.#cutAt));
    this.#cutAt = null;
  }

  /** The bot's own account of an interruption, which counts where nothing was heard that could go quiet. */
  bargeIn({ silence_ms: silence }) {
    if (this.#cutAt === null) this.#view.silence.textContent = ms(silence);
  }

  /** RTVI metrics. */
  metrics({ ttfb = [] }) {
    const speech = ttfb.find(({ processor }) => /tts/i.test(processor));
    if (speech) this.#view.ttfb.textContent = ms(1000 * speech.value);
  }

  /** The bot's own account of a turn: stages in order of time. */
  turn({ turn, stages }) {
    this.#turns = [...this.#turns, { turn, stages: [...stages] }].slice(-TURNS);
    this.#complete();
    this.#draw();
  }

  /** Add the way from the bot to this page, once both are known. */
  #complete() {
    const last = this.#turns.at(-1);
    if (!last || this.#heardAfter === null || last.stages.some(({ name }) => name === HERE)) return;
    last.stages.push({ name: HERE, ms: this.#heardAfter });
    this.#heardAfter = null;
    this.#view.audible.textContent = ms(total(last));
    this.#draw();
  }

  #draw() {
    const longest = Math.max(...this.#turns.map(total));
    this.#view.turns.replaceChildren(
      ...this.#turns.map((turn) => {
        const line = row("li", "turn");
        const bar = row("span", "bar");
        bar.setAttribute("aria-hidden", "true");
        for (const stage of turn.stages) {
          const part = row("i", `tint-${this.#tint(stage.name)}`);
          part.style.flexGrow = stage.ms;
          part.title = `${stage.name}: ${ms(stage.ms)}`;
          bar.append(part);
        }
        bar.style.width = `${(100 * total(turn)) / longest}%`;
        const spoken = turn.stages.map(({ name, ms: value }) => `${name} ${ms(value)}`).join(", ");
        line.append(row("span", "total", ms(total(turn))), bar, row("span", "unseen", `: ${spoken}`));
        return line;
      }),
    );
    const last = this.#turns.at(-1);
    this.#view.stages.replaceChildren(
      ...last.stages.map((stage) => {
        const line = row("li", "stage");
        line.append(row("i", `tint-${this.#tint(stage.name)}`), row("span", "", stage.name), row("b", "", ms(stage.ms)));
        return line;
      }),
    );
  }

  #tint(name) {
    if (name === HERE) return "here";
    if (!this.#colours.has(name)) this.#colours.set(name, this.#colours.size % TINTS);
    return this.#colours.get(name);
  }
}

function total({ stages }) {
  return stages.reduce((sum, stage) => sum + stage.ms, 0);
}
