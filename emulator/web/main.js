// Puts the parts together: the link feeds the fleet, the fleet is drawn, the address says which view is shown.

import { Detail } from "./detail.js";
import { Fleet } from "./fleet.js";
import { bytes, whole } from "./format.js";
import { Grid } from "./grid.js";
import { Link } from "./link.js";
import { Plots } from "./plots.js";
import { Search } from "./search.js";

const byId = (id) => document.getElementById(id);
const fleet = new Fleet();
const grid = new Grid(fleet);
const plots = new Plots(fleet);
const search = new Search(fleet);
const detail = new Detail(fleet);
const link = new Link();

let watched = "";
function watch() {
  const vms = byId("fleet-view").hidden ? [] : grid.visible();
  const key = vms.join();
  if (key !== watched) link.watch(vms);
  watched = key;
}

function draw() {
  if (byId("fleet-view").hidden) return;
  grid.show(search.shown());
  plots.draw();
  search.draw();
  watch();
}

function connection(state) {
  byId("link").dataset.link = state;
  byId("link").textContent = { live: "live", lost: "lost", connecting: "connecting" }[state];
  byId("lost").hidden = state !== "lost";
}

link.addEventListener("hello", ({ detail: message }) => {
  const first = fleet.facts?.fleet !== message.hello.fleet;
  fleet.hello(message);
  const { vms, backend, engine, image, ram_bytes: ram, version } = message.hello;
  byId("facts").textContent = `${whole(vms)} VMs of ${bytes(ram)} · ${backend} (${engine}) · image ${image.slice(0, 12)}`;
  byId("facts").title = `Linux on GPU ${version}, image ${image}`;
  connection("live");
  if (first) route();
  draw();
});
link.addEventListener("totals", ({ detail: totals }) => {
  fleet.addTotals(totals);
  draw();
});
link.addEventListener("rows", ({ detail: rows }) => fleet.rows(rows));
link.addEventListener("lines", ({ detail: lines }) => {
  fleet.addLines(lines);
  grid.draw();
});
link.addEventListener("lost", () => connection("lost"));
grid.addEventListener("visible", watch);
grid.box.addEventListener("scroll", () => requestAnimationFrame(watch));
search.addEventListener("change", draw);
byId("zoom").addEventListener("input", (event) => {
  grid.zoom = +event.target.value;
  draw();
});

// #/ is the fleet, #/vm/12 is VM 12.
function route() {
  if (!fleet.facts) return;
  const vm = /^#\/vm\/(\d+)$/.exec(location.hash)?.[1];
  const there = vm !== undefined && +vm < fleet.vms;
  const came = !byId("vm-view").hidden;
  byId("vm-view").hidden = !there;
  byId("fleet-view").hidden = there;
  byId("tip").hidden = true;
  if (there) {
    detail.open(+vm);
    scrollTo(0, 0);
  } else {
    detail.close();
    draw();
    // Back from a VM, the keys go on where they were.
    if (came) grid.box.focus({ preventScroll: true });
  }
  watch();
}
addEventListener("hashchange", route);

addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, textarea, select");
  if (event.key === "/" && !typing && !byId("fleet-view").hidden) {
    event.preventDefault();
    byId("search").focus();
  }
  if (event.key === "Escape" && !typing && !byId("vm-view").hidden) location.hash = "#/";
});

// System, light, dark. It is remembered, if the browser allows.
const THEMES = ["", "light", "dark"];
const stored = () => {
  try {
    return localStorage.getItem("theme") ?? "";
  } catch {
    return "";
  }
};
function theme(name) {
  document.documentElement.dataset.theme = name;
  byId("theme").textContent = { "": "Theme: system", light: "Theme: light", dark: "Theme: dark" }[name];
  try {
    localStorage.setItem("theme", name);
  } catch {
    // A private window: it lasts as long as the page.
  }
  grid.recolour();
  plots.draw();
  detail.recolour();
}
byId("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme;
  theme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme(stored()));
theme(THEMES.includes(stored()) ? stored() : "");
