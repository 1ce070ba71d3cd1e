// All VMs, drawn on a canvas that is as large as the screen, however many there are.

import { NO_UPTIME } from "./fleet.js";
import { STATES, colour, mips, short, time } from "./format.js";

// Widths and heights of tiles, by zoom. 0 on the slider: as large as all fit.
const SIZES = [[6, 6], [10, 10], [16, 16], [30, 26], [76, 44], [148, 62], [236, 92]];
const GAPS = [1, 1, 2, 3, 4, 6, 8];
// From these levels on, tiles have text, and the last line of the console.
const NUMBERS = 3;
const TEXT = 4;
const LINES = 5;
const LARGEST = SIZES.length - 1;
const EDGE = 2;

export class Grid extends EventTarget {
  zoom = 0;
  here = 0;
  #list = null;
  #frame = 0;
  #colours = null;

  constructor(fleet) {
    super();
    this.fleet = fleet;
    this.box = document.getElementById("grid");
    this.canvas = this.box.querySelector("canvas");
    this.all = this.box.querySelector(".all");
    this.tip = document.getElementById("tip");
    this.live = document.getElementById("here");
    this.box.addEventListener("scroll", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(this.box);
    this.box.addEventListener("keydown", (event) => this.#key(event));
    this.box.addEventListener("focus", () => this.draw());
    this.box.addEventListener("blur", () => this.draw());
    this.canvas.addEventListener("click", (event) => {
      const at = this.#at(event);
      if (at < 0) return;
      this.here = at;
      this.#open();
    });
    this.canvas.addEventListener("pointermove", (event) => this.#hover(event));
    this.canvas.addEventListener("pointerleave", () => this.#hover(null));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.recolour());
  }

  // The VMs to show, or null for all.
  show(list) {
    this.#list = list;
    this.draw();
  }

  recolour() {
    this.#colours = null;
    this.draw();
  }

  draw() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#draw();
    });
  }

  // VMs whose lines are on the screen.
  visible() {
    const { columns, rows, first, level } = this.#layout();
    const wanted = [];
    if (level >= LINES) {
      for (let i = first * columns; i < Math.min((first + rows) * columns, this.#count()); i++) {
        wanted.push(this.#vm(i));
      }
    }
    if (this.hovered !== undefined && !wanted.includes(this.hovered)) wanted.push(this.hovered);
    return wanted;
  }

  #count() {
    return this.#list ? this.#list.length : this.fleet.vms;
  }

  #vm(i) {
    return this.#list ? this.#list[i] : i;
  }

  #layout() {
    const [width, height] = [this.box.clientWidth, this.box.clientHeight];
    const count = this.#count();
    const columns = (wide, gap) => Math.max(1, Math.floor((width - 2 * EDGE + gap) / (wide + gap)));
    const scaled = (n, by) => SIZES[n].map((side) => Math.floor(side * by));
    let level = this.zoom - 1;
    let size = SIZES[Math.max(level, 0)];
    if (level < 0) {
      const fits = (n, [wide, high]) =>
        Math.ceil(count / columns(wide, GAPS[n])) * (high + GAPS[n]) + 2 * EDGE <= height + GAPS[n];
      level = LARGEST;
      while (level > 0 && !fits(level, SIZES[level])) level--;
      // Between two levels, as large as all fit.
      let by = level === LARGEST ? 1 : SIZES[level + 1][0] / SIZES[level][0];
      while (by > 1 && !fits(level, scaled(level, by))) by -= 0.04;
      size = scaled(level, Math.max(1, by));
    }
    const gap = GAPS[level];
    const across = columns(size[0], gap);
    // Tiles with text share what is left of the line.
    if (level >= NUMBERS) {
      const wide = Math.floor((width - 2 * EDGE + gap) / across) - gap;
      size = [Math.max(size[0], Math.min(wide, size[0] * 1.6)), size[1]];
    }
    const pitch = [size[0] + gap, size[1] + gap];
    const lines = Math.ceil(count / across);
    const first = Math.floor(this.box.scrollTop / pitch[1]);
    return { width, height, columns: across, level, size, pitch, lines, first, rows: Math.ceil(height / pitch[1]) + 1 };
  }

  #draw() {
    const layout = this.#layout();
    const { width, height, columns, level, size, pitch, lines, first, rows } = layout;
    if (!width || !this.fleet.vms) return;
    const began = performance.now();
    this.#colours ??= Object.fromEntries([...STATES, "text", "soft", "tile", "line", "focus", "on-state"].map((name) =>
      [name, colour(STATES.includes(name) ? `state-${name}` : name)]));
    const scale = devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * scale) || this.canvas.height !== Math.round(height * scale)) {
      this.canvas.width = Math.round(width * scale);
      this.canvas.height = Math.round(height * scale);
      this.canvas.style.width = `${width}px`;
      this.canvas.style.height = `${height}px`;
    }
    this.all.style.height = `${Math.max(0, lines * pitch[1] + 2 * EDGE - height)}px`;
    const draw = this.canvas.getContext("2d");
    draw.setTransform(scale, 0, 0, scale, 0, 0);
    draw.clearRect(0, 0, width, height);
    const count = this.#count();
    const end = Math.min((first + rows) * columns, count);
    const { scrollTop } = this.box;
    const place = (i) => [EDGE + (i % columns) * pitch[0], EDGE + Math.floor(i / columns) * pitch[1] - scrollTop];
    const shown = Math.max(0, end - first * columns);
    if (level < TEXT) this.#squares(draw, first * columns, end, layout, scrollTop);
    for (let i = first * columns; i < end && level > 0; i++) {
      const [x, y] = place(i);
      if (level < TEXT) this.#mark(draw, this.#vm(i), x, y, size, level);
      else this.#tile(draw, this.#vm(i), x, y, size, level);
    }
    if (document.activeElement === this.box && this.here >= first * columns && this.here < end) {
      const [x, y] = place(this.here);
      draw.strokeStyle = this.#colours.focus;
      draw.lineWidth = 2;
      draw.strokeRect(x - 1, y - 1, size[0] + 2, size[1] + 2);
    }
    // For assistive programs, and for whoever looks from outside.
    this.box.dataset.vms = count;
    this.box.dataset.drawn = shown;
    this.box.dataset.columns = columns;
    this.box.dataset.pitch = pitch.join(" ");
    this.box.dataset.millis = (performance.now() - began).toFixed(1);
    this.box.setAttribute("aria-rowcount", lines);
    this.box.setAttribute("aria-colcount", columns);
    document.getElementById("none").hidden = count > 0;
  }

  // Small tiles. With tens of thousands of them, what is done for each counts: a colour is set once for all that have it.
  #squares(draw, begin, end, { columns, pitch: [wide, high], size: [width, height] }, scrollTop) {
    const { states } = this.fleet;
    const list = this.#list;
    for (let state = 0; state < STATES.length; state++) {
      draw.fillStyle = this.#colours[STATES[state]];
      let [column, y] = [0, EDGE + Math.floor(begin / columns) * high - scrollTop];
      for (let i = begin; i < end; i++) {
        if (states[list ? list[i] : i] === state) draw.fillRect(EDGE + column * wide, y, width, height);
        if (++column === columns) [column, y] = [0, y + high];
      }
    }
  }

  // What small tiles have upon their colour.
  #mark(draw, vm, x, y, [width, height], level) {
    const colours = this.#colours;
    const name = STATES[this.fleet.states[vm]];
    // Not by colour alone.
    if (name === "failed" || name === "stopped") {
      draw.strokeStyle = colours["on-state"];
      draw.lineWidth = Math.max(1, width / 10);
      const [a, b] = [height * 0.25, height * 0.75];
      const left = x + (width - height) / 2;
      draw.beginPath();
      draw.moveTo(left + a, y + a);
      draw.lineTo(left + b, y + b);
      if (name === "failed") {
        draw.moveTo(left + b, y + a);
        draw.lineTo(left + a, y + b);
      }
      draw.stroke();
    } else if (level === NUMBERS) {
      draw.fillStyle = colours["on-state"];
      draw.font = `600 ${height > 30 ? 12 : 10}px system-ui, sans-serif`;
      draw.textAlign = "center";
      draw.textBaseline = "middle";
      draw.fillText(vm, x + width / 2, y + height / 2 + 0.5, width - 4);
      draw.textAlign = "left";
      draw.textBaseline = "alphabetic";
    }
  }

  #tile(draw, vm, x, y, [width, height], level) {
    const { fleet } = this;
    const colours = this.#colours;
    const state = fleet.states[vm];
    const name = STATES[state];
    draw.fillStyle = colours.tile;
    draw.beginPath();
    draw.roundRect(x, y, width, height, 5);
    draw.fill();
    draw.strokeStyle = colours.line;
    draw.lineWidth = 1;
    draw.stroke();
    draw.fillStyle = colours[name];
    draw.beginPath();
    draw.roundRect(x, y, 4, height, [5, 0, 0, 5]);
    draw.fill();
    const room = width - 20;
    const text = (words, line, soft, right) => {
      draw.fillStyle = soft ? colours.soft : colours.text;
      draw.textAlign = right ? "right" : "left";
      draw.fillText(words, right ? x + width - 9 : x + 12, y + line, room);
      draw.textAlign = "left";
    };
    const [bold, plain, mono] = ["600 13px system-ui, sans-serif", "11.5px system-ui, sans-serif", "11px ui-monospace, monospace"];
    const uptime = fleet.uptime[vm];
    const up = uptime === NO_UPTIME ? page(fleet, vm) : `up ${time(uptime)}`;
    draw.font = bold;
    if (level === TEXT) {
      text(vm, 18);
      draw.font = plain;
      text(state === 0 || state > 3 ? name : mips(fleet.kips[vm]), 34, true);
      return;
    }
    text(`VM ${vm}`, level === LARGEST ? 20 : 17);
    draw.font = plain;
    text(name, level === LARGEST ? 20 : 17, false, true);
    if (level === LARGEST) {
      text(mips(fleet.kips[vm]), 40, true);
      text(up, 40, true, true);
      text(`${short(fleet.packets[vm])} packets`, 58, true);
      text(fleet.answers[vm] === 1 ? `page in ${fleet.millis[vm]} ms` : "", 58, true, true);
    } else {
      text(mips(fleet.kips[vm]), 35, true);
      text(up, 35, true, true);
    }
    draw.save();
    draw.beginPath();
    draw.rect(x + 6, y + height - 26, width - 14, 24);
    draw.clip();
    draw.font = mono;
    draw.fillStyle = colours.text;
    draw.fillText(fleet.lines.get(vm) ?? "", x + 12, y + height - (level === LARGEST ? 13 : 9));
    draw.restore();
  }

  #at(event) {
    const { columns, pitch, size } = this.#layout();
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left - EDGE, event.clientY - box.top - EDGE + this.box.scrollTop];
    const [column, row] = [Math.floor(x / pitch[0]), Math.floor(y / pitch[1])];
    const i = row * columns + column;
    const inside = x >= 0 && y >= 0 && column < columns && x % pitch[0] <= size[0] && y % pitch[1] <= size[1];
    return inside && i < this.#count() ? i : -1;
  }

  #hover(event) {
    const i = event ? this.#at(event) : -1;
    const vm = i < 0 ? undefined : this.#vm(i);
    this.canvas.style.cursor = vm === undefined ? "" : "pointer";
    const large = this.#layout().level === LARGEST;
    if (vm !== this.hovered) {
      this.hovered = vm;
      this.dispatchEvent(new Event("visible"));
    }
    this.tip.hidden = vm === undefined || large || event.pointerType === "touch";
    if (this.tip.hidden) return;
    this.tip.textContent = this.describe(vm);
    const [width, height] = [this.tip.offsetWidth, this.tip.offsetHeight];
    this.tip.style.left = `${Math.min(event.clientX + 14, innerWidth - width - 8)}px`;
    this.tip.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 18}px`;
  }

  describe(vm) {
    const { fleet } = this;
    const parts = [`VM ${vm}: ${STATES[fleet.states[vm]]}`, mips(fleet.kips[vm]), `${short(fleet.packets[vm])} packets`];
    if (fleet.uptime[vm] !== NO_UPTIME) parts.push(`up ${time(fleet.uptime[vm])}`);
    const line = fleet.lines.get(vm);
    return parts.join(" · ") + (line ? `\n${line}` : "");
  }

  #key(event) {
    const { columns, pitch, height } = this.#layout();
    const page = Math.max(1, Math.floor(height / pitch[1])) * columns;
    const count = this.#count();
    const steps = {
      ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns,
      PageUp: -page, PageDown: page, Home: -count, End: count,
    };
    if (event.ctrlKey || event.metaKey || event.altKey || !count) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      return this.#open();
    }
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    this.here = Math.max(0, Math.min(count - 1, this.here + step));
    const top = Math.floor(this.here / columns) * pitch[1];
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    if (top + pitch[1] + 2 * EDGE > this.box.scrollTop + height) this.box.scrollTop = top + pitch[1] + 2 * EDGE - height;
    this.live.textContent = this.describe(this.#vm(this.here));
    this.draw();
  }

  #open() {
    const vm = this.#vm(Math.min(this.here, this.#count() - 1));
    if (vm !== undefined) location.hash = `#/vm/${vm}`;
  }
}

function page(fleet, vm) {
  if (fleet.states[vm] === 0 || fleet.states[vm] > 4) return "";
  return fleet.answers[vm] === 2 ? "no page" : "";
}
