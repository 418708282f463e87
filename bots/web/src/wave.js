// Loudness in, a strip of bars out: the bot in the accent colour, the user behind it in grey, the newest at the right.

const BAR = 3;
const STEP = 5; // pixels from bar to bar
const BAR_MS = 60;

/** dBFS to 0..1 of the height. */
export const loudness = (db) => Math.min(1, Math.max(0, (db + 60) / 48));

export class Wave {
  #canvas;
  #bars = []; // [bot, user] loudness, the newest last
  #reading = [0, 0];
  #due = 0; // when the bar in the making is over

  constructor(canvas) {
    this.#canvas = canvas;
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** Take one reading of both sides, in dBFS. */
  add(bot, user) {
    const now = performance.now();
    this.#reading = [Math.max(this.#reading[0], loudness(bot)), Math.max(this.#reading[1], loudness(user))];
    if (now < this.#due) return;
    if (now - this.#due > 1000) this.#due = now; // the first reading, or the computer slept
    for (; this.#due <= now; this.#due += BAR_MS) this.#bars.push(this.#reading);
    this.#reading = [0, 0];
    this.#bars.splice(0, this.#bars.length - 400);
    if (!document.hidden) this.draw();
  }

  clear() {
    this.#bars = [];
    this.draw();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    const scale = devicePixelRatio;
    if (this.#canvas.width !== width * scale || this.#canvas.height !== height * scale) {
      this.#canvas.width = width * scale;
      this.#canvas.height = height * scale;
    }
    const style = getComputedStyle(this.#canvas);
    const [accent, grey, still] = ["--accent", "--user", "--line"].map((name) => style.getPropertyValue(name));
    const paint = this.#canvas.getContext("2d");
    paint.setTransform(scale, 0, 0, scale, 0, 0);
    paint.clearRect(0, 0, width, height);
    const bar = (x, level, colour) => {
      const tall = BAR + level * (height - BAR - 8);
      paint.fillStyle = colour;
      paint.beginPath();
      paint.roundRect(x, (height - tall) / 2, BAR, tall, BAR / 2);
      paint.fill();
    };
    for (let i = 0, x = width - BAR; x > -BAR; i++, x -= STEP) {
      const [bot, user] = this.#bars[this.#bars.length - 1 - i] ?? [0, 0];
      if (user) bar(x, user, grey);
      if (bot || !user) bar(x, bot, bot ? accent : still);
    }
  }
}
