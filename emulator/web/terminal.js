// A terminal on a VM's console. It comes back after the VM, or the fleet, was away.

import { colour } from "./format.js";

const DOWN = 4000; // the VM is down: see emulator/src/web/console.rs
const AGAIN = 1000;
const COLUMNS = 80; // a serial line does not tell its size; this is what guests assume
const ROWS = 24;

let Terminal = null;

// Whether this build has the terminal.
export async function load(there) {
  if (Terminal || !there) return;
  const style = document.createElement("link");
  style.rel = "stylesheet";
  style.href = "/assets/xterm/xterm.css";
  document.head.append(style);
  ({ Terminal } = await import("/assets/xterm/xterm.mjs"));
}

export class Console {
  #socket = null;
  #timer = 0;
  #closed = false;

  constructor(vm, box, hint) {
    [this.vm, this.box, this.hint] = [vm, box, hint];
    box.replaceChildren();
    if (!Terminal) {
      const note = document.createElement("p");
      note.className = "note";
      note.textContent = "This build has no terminal: xterm.js was not there when it was made. End the fleet and start it " +
        `with cargo xtask run, which gets it from npm; or use cargo xtask console ${vm}. The last lines:`;
      this.lines = document.createElement("pre");
      box.append(note, this.lines);
      return;
    }
    this.terminal = new Terminal({
      cols: COLUMNS, rows: ROWS, scrollback: 5000, convertEol: false, cursorBlink: true, fontSize: 13,
      fontFamily: "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace", screenReaderMode: false,
    });
    this.recolour();
    this.terminal.open(box);
    this.terminal.textarea?.setAttribute("aria-label", `Console of VM ${vm}`);
    // Escape and Tab belong to the guest, so there has to be another way out for those without a mouse.
    this.terminal.attachCustomKeyEventHandler((event) => {
      if (!event.ctrlKey || event.key !== "]") return true;
      document.getElementById("back").focus();
      return false;
    });
    this.terminal.onData((data) => this.#type(new TextEncoder().encode(data)));
    this.terminal.onBinary((data) => this.#type(Uint8Array.from(data, (c) => c.charCodeAt(0))));
    this.sizes = new ResizeObserver(() => this.#fit());
    this.sizes.observe(box);
    this.#open();
  }

  focus() {
    this.terminal?.focus();
  }

  // Without a terminal: the last lines, as the API tells them.
  show(lines) {
    if (this.lines) this.lines.textContent = lines.join("\n");
  }

  recolour() {
    if (!this.terminal) return;
    this.terminal.options.theme = {
      background: colour("screen"), foreground: colour("screen-text"), cursor: colour("accent"),
      selectionBackground: colour("selection"),
    };
  }

  close() {
    this.#closed = true;
    clearTimeout(this.#timer);
    this.sizes?.disconnect();
    this.#socket?.close();
    this.terminal?.dispose();
    this.box.replaceChildren();
  }

  // Fixed columns, so the letters get as large as the box is wide.
  #fit() {
    const width = this.box.clientWidth - 28;
    if (width <= 0) return;
    this.terminal.options.fontSize = Math.max(9, Math.min(15, Math.floor(width / COLUMNS / 0.605 * 2) / 2));
  }

  #type(bytes) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(bytes);
  }

  #open() {
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const socket = new WebSocket(`${scheme}://${location.host}/api/vms/${this.vm}/console`);
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    socket.onopen = () => {
      // What comes first is what the VM printed last.
      this.terminal.reset();
      this.hint.textContent = "connected; Ctrl-] leaves it";
      this.box.dataset.link = "open";
    };
    socket.onmessage = ({ data }) => this.terminal.write(new Uint8Array(data));
    socket.onclose = ({ code, reason }) => {
      if (this.#closed) return;
      const first = this.box.dataset.link === "open";
      this.box.dataset.link = "closed";
      this.hint.textContent = code === DOWN ? `the VM is down: ${reason}` : "not connected";
      if (first && code === DOWN) this.terminal.write(`\r\n\x1b[7m[VM ${this.vm}: ${reason}]\x1b[0m\r\n`);
      this.down = code === DOWN;
      this.#retry();
    };
  }

  // A VM that is down prints nothing more until it is reset, which `wake` tells.
  #retry() {
    clearTimeout(this.#timer);
    if (!this.down) this.#timer = setTimeout(() => this.#open(), AGAIN);
  }

  wake() {
    if (!this.down || this.#closed) return;
    this.down = false;
    this.#open();
  }
}
