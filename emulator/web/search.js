// Which VMs are shown: by number and by state.

import { MEANING, STATES, whole } from "./format.js";

// A test for VM numbers, or null for all. Digits alone also mean the numbers that begin with them.
export function numbers(text) {
  const parts = text.split(/[\s,]+/).filter(Boolean);
  if (!parts.length) return null;
  const tests = parts.map((part) => {
    const range = /^(\d+)\s*-\s*(\d+)$/.exec(part);
    if (range) return (vm) => vm >= +range[1] && vm <= +range[2];
    if (/^\d+$/.test(part)) return parts.length > 1 ? (vm) => vm === +part : (vm) => String(vm).startsWith(part);
    return () => false;
  });
  return (vm) => tests.some((test) => test(vm));
}

export class Search extends EventTarget {
  states = new Set();

  constructor(fleet) {
    super();
    this.fleet = fleet;
    this.field = document.getElementById("search");
    this.field.addEventListener("input", () => this.#changed());
    this.field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.#enter();
      if (event.key === "Escape") {
        this.field.value = "";
        this.#changed();
        this.field.blur();
      }
    });
    this.buttons = STATES.map((name, state) => {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.state = name;
      button.title = `${name}: ${MEANING[name]}`;
      button.ariaPressed = "false";
      button.addEventListener("click", () => {
        if (!this.states.delete(state)) this.states.add(state);
        button.ariaPressed = String(this.states.has(state));
        this.#changed();
      });
      document.getElementById("states").append(button);
      return button;
    });
  }

  // The numbers of the VMs to show, or null for all.
  shown() {
    const test = numbers(this.field.value);
    if (!test && !this.states.size) return null;
    const found = [];
    for (let vm = 0; vm < this.fleet.vms; vm++) {
      if (this.states.size && !this.states.has(this.fleet.states[vm])) continue;
      if (!test || test(vm)) found.push(vm);
    }
    return found;
  }

  draw() {
    const counts = this.fleet.totals?.states;
    if (!counts) return;
    this.buttons.forEach((button, state) => {
      button.textContent = `${STATES[state]} ${whole(counts[state])}`;
      button.classList.toggle("zero", !counts[state]);
    });
  }

  #enter() {
    const exact = /^\s*\d+\s*$/.test(this.field.value) && +this.field.value < this.fleet.vms;
    const vm = exact ? +this.field.value : this.shown()?.[0];
    if (vm !== undefined) location.hash = `#/vm/${vm}`;
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}
