// What the bot measured and when it was heard here in, a table of turns and a small chart out.

const TURNS = 6; // in the table
const TINTS = 8; // in page.css
const HERE = "to your ear"; // network, jitter buffer and playback: what the bot cannot see
const TYPED = "from Enter to your ear";

function ms(value) {
  if (value === null) return "–";
  if (value >= 9_950) return `${(value / 1000).toFixed(1)} s`;
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
}

function made(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

export class Latency {
  #view;
  #turns = []; // {kind, at, ttfb, audible, silence, stages: [{name, ms}]}: null is not known, times are in ms
  #next = null; // {kind, at} of a turn that the bot has not begun to answer
  #colours = new Map(); // stage name -> its tint
  #startedAt = null; // the bot said that it speaks; not heard yet
  #heardAfter = null; // heard, but the bot's own figures are still to come
  #cut = null; // {turn, at}: somebody cut the bot off

  /** view: the elements {turns, stages}, a table's body and a list. */
  constructor(view) {
    this.#view = view;
    this.clear();
  }

  clear() {
    this.#turns = [];
    this.#cut = null;
    this.begins("greeting", null);
    this.#draw();
  }

  /** What the bot says from now on belongs to another turn: "greeting", "spoken" or "typed". */
  begins(kind, now) {
    this.#next = { kind, at: now };
  }

  /** The user begins while the bot is heard. */
  interrupts(now) {
    const turn = this.#turns.at(-1);
    if (turn) this.#cut ??= { turn, at: now };
  }

  botStarts(now) {
    this.#answer();
    this.#startedAt = now;
    this.#heardAfter = null;
    this.#cut = null;
    this.#draw();
  }

  heard(now) {
    this.#heardAfter = this.#startedAt === null ? 0 : now - this.#startedAt; // 0: the sound was faster than the message
    this.#startedAt = null;
    const turn = this.#turns.at(-1);
    if (turn?.kind === "typed" && turn.audible === null && !this.#next) {
      turn.audible = now - turn.at; // of a typed turn the bot gives no account
      turn.stages = [{ name: TYPED, ms: turn.audible }];
    }
    this.#complete();
    this.#draw();
  }

  /** The bot went quiet: a figure if somebody cut it off. */
  silent(lastAudible) {
    if (this.#cut) this.#cut.turn.silence = Math.max(0, lastAudible - this.#cut.at);
    this.#draw();
  }

  /** The bot's own account of an interruption, which counts where nothing was heard that could go quiet. */
  bargeIn({ silence_ms: silence }) {
    const turn = this.#cut?.turn ?? this.#turns.at(-1);
    if (turn) turn.silence ??= silence;
    this.#draw();
  }

  /** RTVI metrics; of a reply's sentences the first counts, and services begin with a report of zero. */
  metrics({ ttfb = [] }) {
    const speech = ttfb.find(({ processor, value }) => /tts/i.test(processor) && value);
    if (!speech) return;
    this.#answer().ttfb ??= 1000 * speech.value;
    this.#draw();
  }

  /** The bot's own account of a turn: stages in order of time. */
  turn({ stages }) {
    const turn = this.#answer();
    if (turn.kind === "typed" || turn.stages.length) return;
    turn.stages = [...stages];
    this.#complete();
    this.#draw();
  }

  /** The turn that the bot is answering. */
  #answer() {
    if (this.#next) {
      const turn = { ...this.#next, ttfb: null, audible: null, silence: null, stages: [] };
      this.#turns = [...this.#turns, turn].slice(-TURNS);
      this.#next = null;
    }
    return this.#turns.at(-1);
  }

  /** Add the way from the bot to this page, once both are known. */
  #complete() {
    const last = this.#turns.at(-1);
    if (!last?.stages.length || last.audible !== null || this.#heardAfter === null) return;
    last.stages.push({ name: HERE, ms: this.#heardAfter });
    last.audible = total(last);
    this.#heardAfter = null;
  }

  #draw() {
    const longest = Math.max(...this.#turns.map(total));
    this.#view.turns.replaceChildren(
      ...this.#turns.flatMap((turn) => {
        const figures = made("tr", "turn");
        const kind = made("th", "", turn.kind);
        kind.scope = "row";
        figures.append(kind, ...[turn.ttfb, turn.audible, turn.silence].map((value) => made("td", "", ms(value))));
        return turn.stages.length ? [figures, this.#chart(turn, longest)] : [figures];
      }),
    );
    const stages = new Map(this.#turns.flatMap((turn) => turn.stages.map((stage) => [stage.name, stage.ms])));
    this.#view.stages.replaceChildren(
      ...Array.from(stages, ([name, latest]) => {
        const line = made("li", "stage");
        line.append(made("i", `tint-${this.#tint(name)}`), made("span", "", name), made("b", "", ms(latest)));
        return line;
      }),
    );
  }

  /** A row with the bar of a turn's stages. */
  #chart(turn, longest) {
    const bar = made("div", "bar");
    bar.role = "img";
    bar.ariaLabel = turn.stages.map(({ name, ms: value }) => `${name} ${ms(value)}`).join(", ");
    bar.style.width = `${(100 * total(turn)) / longest}%`;
    for (const stage of turn.stages) {
      const part = made("i", `tint-${this.#tint(stage.name)}`);
      part.style.flexGrow = stage.ms;
      part.title = `${stage.name}: ${ms(stage.ms)}`;
      bar.append(part);
    }
    const cell = made("td", "");
    cell.colSpan = 4;
    cell.append(bar);
    const chart = made("tr", "chart");
    chart.append(cell);
    return chart;
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
