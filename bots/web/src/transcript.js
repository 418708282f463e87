// What was said in, lines of text out: words light up as they are spoken, and a sentence that was cut off ends there.

const words = new Intl.Segmenter(undefined, { granularity: "word" });

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

/** One sentence of the bot: its words as spans, lit up to where it was spoken. */
class Sentence {
  #spans = [];
  #spoken = 0; // characters
  closed = false;
  root = element("span", "sentence");

  constructor(text) {
    for (const { segment, index } of words.segment(text)) {
      const span = element("span", "word", segment);
      this.#spans.push({ span, start: index });
      this.root.append(span);
    }
    this.root.append(" ");
  }

  /** Light everything before the given character. */
  light(spoken) {
    this.#spoken = spoken;
    for (const { span, start } of this.#spans) span.classList.toggle("spoken", start < spoken);
  }

  /** End where the voice ended; what was never spoken goes. */
  cut() {
    this.closed = true;
    for (const { span } of this.#spans.filter(({ start }) => start >= this.#spoken)) span.remove();
    if (!this.#spoken) this.root.remove();
  }
}

export class Transcript {
  #log;
  #hint; // seen as long as nobody has said anything
  #sentences = new Map(); // by segment id
  #bot = null; // the bot's line in the making, which an interruption cuts
  #answered = false; // the user has said something since
  #user = null; // the user's line whose transcription is not final

  constructor(log) {
    this.#log = log;
    this.#hint = log.firstElementChild;
  }

  clear() {
    this.#log.replaceChildren(this.#hint);
    this.#sentences.clear();
    this.#bot = null;
    this.#user = null;
  }

  /** A transcription, which may be replaced until it is final, or a typed line; returns the line. */
  user(text, final) {
    if (!this.#user) {
      this.#user = element("p", "user");
      this.#add(this.#user, "You");
      this.#answered = true;
    }
    const line = this.#user;
    line.lastChild.textContent = text;
    line.classList.toggle("provisional", !final);
    if (final) this.#user = null;
    this.#follow();
    return line;
  }

  /** A bot-output message: a sentence begins, goes on or is complete. */
  bot({ segment_id: id, text, will_be_spoken: aloud, spoken_progress: progress }) {
    let sentence = this.#sentences.get(id);
    if (!sentence) {
      sentence = new Sentence(text);
      this.#sentences.set(id, sentence);
      if (!this.#bot || this.#answered) {
        this.#bot = element("p", "bot");
        this.#add(this.#bot, "Bot");
      }
      this.#answered = false;
      this.#bot.lastChild.append(sentence.root);
    }
    if (!sentence.closed) sentence.light(aloud === false ? text.length : (progress?.accumulated_text.trimEnd().length ?? 0));
    this.#follow();
  }

  /** The bot was interrupted: its line ends where it is, and says so. */
  cut() {
    for (const sentence of this.#sentences.values()) if (!sentence.closed) sentence.cut();
    const said = this.#bot?.lastChild;
    if (said?.hasChildNodes()) said.append(element("span", "mark", "interrupted"));
    else this.#bot?.remove();
    this.#bot = null;
  }

  #add(line, who) {
    line.append(element("span", "who", who), element("span", "said"));
    this.#log.append(line);
  }

  #follow() {
    this.#log.scrollTop = this.#log.scrollHeight;
  }
}
