// Names, numbers and times, as the page writes them.

// The order is that of the rows on the wire (emulator/src/web/survey.rs).
export const STATES = ["booting", "ready", "idle", "running", "paused", "stopped", "failed"];

export const MEANING = {
  booting: "has not said READY yet",
  ready: "is up, and did something in the last second",
  idle: "is up, and slept through the last second",
  running: "is in an engine, or waits for one",
  paused: "is held",
  stopped: "has shut down",
  failed: "can't go on",
};

// Three digits, as in 1.25 k; counts up to 999 as they are.
export function short(value) {
  if (value < 1e3 && Number.isInteger(value)) return String(value);
  for (const [unit, letter] of [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]]) {
    if (value >= unit) return digits(value / unit) + letter;
  }
  return digits(value);
}

export function digits(value) {
  if (value >= 100 || value === 0) return Math.round(value).toString();
  if (value >= 10) return value.toFixed(1);
  if (value >= 0.1) return value.toFixed(2);
  return value >= 0.0005 ? value.toFixed(3) : "0";
}

export function whole(value) {
  return Math.round(value).toString().replace(/\B(?=(\d{3})+$)/g, "\u202f");
}

export function bytes(value) {
  for (const [unit, name] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (value >= unit) return `${digits(value / unit)} ${name}`;
  }
  return `${value} B`;
}

export function time(seconds) {
  const [s, m, h, d] = [seconds % 60, Math.floor(seconds / 60) % 60, Math.floor(seconds / 3600) % 24,
    Math.floor(seconds / 86400)];
  if (d) return `${d} d ${h} h`;
  if (h) return `${h} h ${m} min`;
  return m ? `${m} min ${Math.floor(s)} s` : `${Math.floor(s)} s`;
}

export function mips(kips) {
  return `${kips === 0 ? "0" : digits(kips / 1000)} MIPS`;
}

// The value of a colour of style.css, for canvases.
const probe = document.createElement("i");
probe.hidden = true;
export function colour(name) {
  if (!probe.isConnected) document.body.append(probe);
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}
