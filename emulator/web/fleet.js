// What the page knows of all VMs: one typed array for each column.

const ROW = 20;
export const NO_UPTIME = 0xffffffff;

export class Fleet {
  facts = null;
  totals = null;
  history = [];
  vms = 0;
  lines = new Map();

  // A connection begins: with the fleet that we know, or with another.
  hello({ hello, history }) {
    const other = this.facts?.fleet !== hello.fleet;
    this.facts = hello;
    this.history = history;
    this.lines.clear();
    if (!other && this.vms === hello.vms) return;
    this.vms = hello.vms;
    this.states = new Uint8Array(this.vms);
    this.answers = new Uint8Array(this.vms);
    this.millis = new Uint16Array(this.vms);
    this.kips = new Uint32Array(this.vms);
    this.packets = new Uint32Array(this.vms);
    this.uptime = new Uint32Array(this.vms).fill(NO_UPTIME);
  }

  rows(buffer) {
    const view = new DataView(buffer);
    for (let at = 0; at + ROW <= view.byteLength; at += ROW) {
      const vm = view.getUint32(at, true);
      if (vm >= this.vms) continue;
      this.states[vm] = view.getUint8(at + 4);
      this.answers[vm] = view.getUint8(at + 5);
      this.millis[vm] = view.getUint16(at + 6, true);
      this.kips[vm] = view.getUint32(at + 8, true);
      this.packets[vm] = view.getUint32(at + 12, true);
      this.uptime[vm] = view.getUint32(at + 16, true);
    }
  }

  addTotals(totals) {
    this.totals = totals;
    this.history.push(totals);
    if (this.history.length > 600) this.history.shift();
  }

  addLines(lines) {
    // Lines of VMs that have long left the screen are not kept.
    if (this.lines.size > 8192) this.lines.clear();
    for (const [vm, line] of lines) this.lines.set(vm, line);
  }
}
