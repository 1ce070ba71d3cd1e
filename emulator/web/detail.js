// One VM: its console, its own page, its counters, and what can be done to it.

import { STATES, bytes, time, whole } from "./format.js";
import { Console, load } from "./terminal.js";

const PERIOD = 1000;
const SURE = 4000;
const byId = (id) => document.getElementById(id);

export class Detail {
  vm = null;
  #console = null;
  #timer = 0;
  #shown = "";
  #sure = 0;

  constructor(fleet) {
    this.fleet = fleet;
    for (const button of document.querySelectorAll("[data-act]")) {
      button.addEventListener("click", () => this.#press(button));
    }
    byId("page-again").addEventListener("click", () => this.#page());
  }

  async open(vm) {
    this.close();
    this.vm = vm;
    byId("vm-name").textContent = `VM ${vm}`;
    document.title = `VM ${vm} · Linux on GPU`;
    for (const [id, other] of [["vm-before", vm - 1], ["vm-after", vm + 1]]) {
      const there = other >= 0 && other < this.fleet.vms;
      byId(id).toggleAttribute("href", there);
      if (there) byId(id).href = `#/vm/${other}`;
      byId(id).ariaDisabled = String(!there);
    }
    this.#note("");
    this.#state("");
    await load(this.fleet.facts.terminal);
    if (this.vm !== vm) return;
    this.#console = new Console(vm, byId("terminal"), byId("console-link"));
    this.#console.focus();
    await this.#look();
    this.#page();
  }

  close() {
    clearTimeout(this.#timer);
    this.#console?.close();
    this.#console = null;
    this.vm = null;
    this.#shown = "";
    this.#unsure();
    byId("page").removeAttribute("src");
    document.title = "Linux on GPU";
  }

  recolour() {
    this.#console?.recolour();
  }

  async #look() {
    clearTimeout(this.#timer);
    const vm = this.vm;
    try {
      const answer = await fetch(`/api/vms/${vm}`);
      if (vm !== this.vm) return;
      const facts = await answer.json();
      if (vm !== this.vm) return;
      if (answer.ok) this.#show(facts);
      else this.#note(facts.error);
    } catch {
      // The fleet is away; the page's head says so.
      this.#state("");
    }
    if (vm === this.vm) this.#timer = setTimeout(() => this.#look(), PERIOD);
  }

  #show(facts) {
    this.#state(facts.state);
    this.#console?.show(facts.console);
    const down = facts.state === "stopped" || facts.state === "failed";
    this.#note(facts.reason ?? "");
    if (!down) this.#console?.wake();
    const up = STATES.indexOf(facts.state) >= 1 && STATES.indexOf(facts.state) <= 3;
    // A VM that has just become ready has a page now.
    if (up && this.#shown === "not up") this.#page();
    this.#shown = up ? "up" : "not up";
    // A VM beyond the host's limit of open files has no port.
    byId("page-hint").textContent = [
      facts.page?.port == null ? "" : `port ${facts.page.port}`,
      facts.page?.answers ? `${facts.page.milliseconds} ms` : "",
    ].filter(Boolean).join(" · ");
    list("counters", [
      ["Speed", `${facts.mips.toFixed(2)} MIPS`],
      ["Instructions", whole(facts.instructions)],
      ["Uptime, by its page", facts.page?.uptime == null ? "–" : time(facts.page.uptime)],
      ["Ready after", facts.ready ? `${facts.ready.seconds.toFixed(2)} s` : "–"],
      ["Memory of its own", bytes(facts.private_bytes)],
      ["Packets in", whole(facts.packets_in)],
      ["Packets out", whole(facts.packets_out)],
      ["Dropped by its device", whole(facts.packets_dropped)],
      ...Object.entries(facts.bridge_dropped ?? {}).map(([reason, count]) =>
        [`Dropped: ${reason.replaceAll("_", " ")}`, whole(count)]),
      ["Started over", whole(facts.reboots)],
      ["Address", facts.ip ?? "–"],
      ["MAC", facts.mac ?? "–"],
    ]);
    const trap = facts.last_trap;
    list("trap", [
      ...(trap ? [["Cause", `${trap.name} (0x${trap.cause.toString(16)})`], ["At (sepc)", trap.epc],
        ["Value (stval)", trap.tval]] : [["Cause", "none yet"]]),
      ["Program counter", facts.pc],
    ]);
  }

  #page() {
    const bridge = this.fleet.facts.port_base !== null;
    byId("pcap").hidden = !bridge;
    document.querySelector(".panel.page").hidden = !bridge;
    if (this.vm === null || !bridge) return;
    byId("pcap").href = `/api/vms/${this.vm}/pcap?seconds=10`;
    byId("pcap").download = `vm-${this.vm}.pcapng`;
    byId("page").src = `/vm/${this.vm}/`;
    byId("page-open").href = `/vm/${this.vm}/`;
  }

  #state(state) {
    const pill = byId("vm-state");
    pill.textContent = state;
    pill.dataset.state = state;
    const down = state === "stopped" || state === "failed";
    document.querySelector("[data-act=pause]").disabled = !state || down || state === "paused";
    document.querySelector("[data-act=resume]").disabled = state !== "paused";
    document.querySelector("[data-act=reset]").disabled = !state;
  }

  #note(text) {
    byId("vm-note").textContent = text;
    byId("vm-note").hidden = !text;
  }

  // A reset can't be taken back: it wants a second press.
  #press(button) {
    const { act } = button.dataset;
    if (act === "reset" && !button.classList.contains("sure")) {
      button.classList.add("sure");
      button.textContent = "Really reset?";
      this.#sure = setTimeout(() => this.#unsure(), SURE);
      return;
    }
    this.#unsure();
    this.#act(act);
  }

  #unsure() {
    clearTimeout(this.#sure);
    const button = document.querySelector("[data-act=reset]");
    button.classList.remove("sure");
    button.textContent = "Reset";
  }

  async #act(action) {
    try {
      const answer = await fetch(`/api/vms/${this.vm}/${action}`, { method: "POST" });
      if (!answer.ok) this.#note((await answer.json()).error);
    } catch {
      this.#note(`The fleet does not answer: it was not told to ${action} the VM.`);
      return;
    }
    if (action === "reset") this.#shown = "not up";
    await this.#look();
  }
}

function list(id, pairs) {
  const box = byId(id);
  const rows = pairs.flatMap(([name, value]) => [
    Object.assign(document.createElement("dt"), { textContent: name }),
    Object.assign(document.createElement("dd"), { textContent: value }),
  ]);
  box.replaceChildren(...rows);
}
