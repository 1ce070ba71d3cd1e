// The totals with their small plots.

import { bytes, colour, digits, short, whole } from "./format.js";

const UP = [1, 2, 3];

// What each card shows: curves, each a function of the totals, stacked upon one another; and a figure.
const CARDS = {
  ready: {
    curves: [["good", (t) => UP.reduce((sum, state) => sum + t.states[state], 0)]],
    top: (fleet) => fleet.vms,
    figure: (t, fleet) => [whole(UP.reduce((sum, state) => sum + t.states[state], 0)), `of ${whole(fleet.vms)}`],
  },
  gips: {
    curves: [["accent", (t) => t.gips]],
    figure: (t) => t.gips >= 1 ? [digits(t.gips), "GIPS"] : [digits(t.gips * 1e3), "MIPS"],
  },
  packets: {
    curves: [["accent", (t) => t.packets_in], ["warm", (t) => t.packets_out]],
    figure: (t) => [short(t.packets_in + t.packets_out), `a second · ${short(t.pages)} pages`],
  },
  memory: {
    curves: [["quiet", (t) => t.shared_bytes], ["accent", (t) => t.private_bytes]],
    figure: (t) => [bytes(t.private_bytes), `private · ${bytes(t.shared_bytes)} shared`],
  },
};

export class Plots {
  constructor(fleet) {
    this.fleet = fleet;
    this.cards = [...document.querySelectorAll("[data-plot]")];
    addEventListener("resize", () => this.draw());
  }

  draw() {
    const { totals, history } = this.fleet;
    if (!totals) return;
    for (const card of this.cards) {
      const what = CARDS[card.dataset.plot];
      const [value, unit] = what.figure(totals, this.fleet);
      const figure = card.querySelector(".figure");
      card.title = `${value} ${unit}`;
      figure.replaceChildren(Object.assign(document.createElement("b"), { textContent: value }), ` ${unit}`);
      this.#plot(card.querySelector("canvas"), what, history);
    }
  }

  #plot(canvas, { curves, top }, history) {
    const scale = devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width || !height) return;
    canvas.width = width * scale;
    canvas.height = height * scale;
    const draw = canvas.getContext("2d");
    draw.scale(scale, scale);
    const points = history.slice(-Math.max(2, Math.floor(width)));
    const sums = points.map((t) => curves.reduce((sum, [, of]) => sum + of(t), 0));
    const most = top?.(this.fleet) || Math.max(...sums) * 1.1 || 1;
    // Ten minutes are as wide as the card; before that, what there is.
    const step = width / Math.max(60, points.length - 1);
    const left = width - (points.length - 1) * step;
    const under = new Float64Array(points.length);
    for (const [name, of] of curves) {
      const line = points.map((t, i) => {
        under[i] += of(t);
        return [left + i * step, height - 1 - under[i] / most * (height - 3)];
      });
      draw.beginPath();
      for (const [x, y] of line) draw.lineTo(x, y);
      draw.strokeStyle = colour(name);
      draw.lineWidth = 1.5;
      draw.lineJoin = "round";
      draw.stroke();
      draw.lineTo(width, height);
      draw.lineTo(left, height);
      draw.globalAlpha = 0.12;
      draw.fillStyle = draw.strokeStyle;
      draw.fill();
      draw.globalAlpha = 1;
    }
  }
}
