// The WebSocket to the fleet. It comes back by itself.

const FIRST = 500;
const LONGEST = 5000;
// Something comes every second. After so long without it, the connection is dead, whatever the browser thinks.
const SILENCE = 8000;

export class Link extends EventTarget {
  #socket = null;
  #pause = FIRST;
  #watch = [];
  #alarm = 0;

  constructor() {
    super();
    this.#open();
    // A page that was put aside, or a network that came back: don't wait for the pause to end.
    addEventListener("online", () => this.#again(0));
    addEventListener("pageshow", (event) => event.persisted && this.#again(0));
  }

  // The VMs whose last lines are on the screen.
  watch(vms) {
    this.#watch = vms;
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify({ watch: vms }));
  }

  #open() {
    const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/api/live`);
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    this.#listen();
    socket.onmessage = ({ data }) => {
      this.#listen();
      if (typeof data !== "string") return this.#tell("rows", data);
      const message = JSON.parse(data);
      if (message.hello) {
        this.#pause = FIRST;
        this.#tell("hello", message);
        this.watch(this.#watch);
      }
      if (message.totals) this.#tell("totals", message.totals);
      if (message.lines) this.#tell("lines", message.lines);
    };
    socket.onclose = () => {
      if (socket !== this.#socket) return;
      this.#tell("lost");
      this.#again(this.#pause);
      this.#pause = Math.min(this.#pause * 1.6, LONGEST);
    };
  }

  #listen() {
    clearTimeout(this.#alarm);
    this.#alarm = setTimeout(() => this.#socket.close(), SILENCE);
  }

  #again(pause) {
    clearTimeout(this.#alarm);
    this.#alarm = setTimeout(() => {
      const old = this.#socket;
      if (old.readyState === WebSocket.OPEN) return this.#listen();
      this.#socket = null;
      old.close();
      this.#open();
    }, pause);
  }

  #tell(what, detail) {
    this.dispatchEvent(new CustomEvent(what, { detail }));
  }
}
