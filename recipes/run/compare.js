"use strict";
// Draws the page from its data: tables, curves and samples. No library; nothing is fetched but,
// while a run is watched, its data from the same address.
const COLORS = ["--c0", "--c1", "--c2", "--c3", "--c4", "--c5", "--c6"];
const DASHES = ["", "7 3", "2 3", "10 3 2 3"]; // of the next runs that have the same colours
const state = { data: null, hidden: new Set(), page: 0, all: false, asked: 0 };
const $ = (id) => document.getElementById(id);
const color = (i) => `var(${COLORS[i % COLORS.length]})`;
const dash = (i) => DASHES[Math.floor(i / COLORS.length) % DASHES.length];

function element(tag, attributes, ...inner) {
  const svg = ["svg", "path", "line", "text", "circle", "rect", "g"].includes(tag);
  const found = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) found.setAttribute(key, value);
  found.append(...inner.filter((x) => x !== null));
  return found;
}

function short(value) {
  if (typeof value !== "number") return value === null || value === undefined ? "" : String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

function runs() {
  return state.data.runs.map((run, i) => ({ run, i })).filter(({ i }) => !state.hidden.has(i));
}

// -- the runs beside each other -------------------------------------------------------------------

function showLegend() {
  $("runs").replaceChildren(...state.data.runs.map((run, i) => {
    const box = element("input", { type: "checkbox" });
    box.checked = !state.hidden.has(i);
    box.addEventListener("change", () => {
      if (box.checked) state.hidden.delete(i); else state.hidden.add(i);
      show();
    });
    const swatch = element("svg", { class: "swatch", viewBox: "0 0 24 12" }, element("line",
      { x1: 0, x2: 24, y1: 6, y2: 6, style: `stroke: ${color(i)}`, "stroke-dasharray": dash(i) }));
    return element("label", { class: "run" }, box, swatch, run.name);
  }));
}

function showTable() {
  const shown = runs();
  const keys = [...new Set(shown.flatMap(({ run }) => Object.keys(run.summary)))];
  const last = state.data.cards.filter((key) => shown.some(({ run }) => key in run.last));
  const breakable = (name) => name.split(/(?<=[/_])/).flatMap((part) => [part, element("wbr")]);
  const row = (name, cells) => element("tr", {}, element("th", {}, ...breakable(name)),
    ...cells.map((value) => element("td",
      { class: typeof value, title: String(value ?? "") }, short(value))));
  const head = element("tr", {}, element("th", {}),
    ...shown.map(({ run, i }) => element("th", { style: `color: ${color(i)}` }, run.name)));
  const rows = [
    row("last step", shown.map(({ run }) => Math.max(0, ...Object.values(run.last).map((p) => p[0])))),
    ...last.map((key) => row(key, shown.map(({ run }) => run.last[key]?.[1]))),
    ...keys.map((key) => row(key.replaceAll("_", " "), shown.map(({ run }) => run.summary[key]))),
  ];
  $("table").replaceChildren(element("table", {}, element("thead", {}, head),
    element("tbody", {}, ...rows)));
}

// -- curves ---------------------------------------------------------------------------------------

function ticks(low, high, count) {
  const raw = (high - low) / count, base = 10 ** Math.floor(Math.log10(raw));
  const step = base * [5, 2, 1].find((m) => base * m <= raw * 1.001);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high + step / 1e6; n++) found.push(n * step);
  return found.map((x) => x || 0); // no -0
}

function chart(title, lines) {
  const [w, h, left, right, top, bottom] = [460, 210, 52, 26, 8, 24];
  const points = lines.flatMap((line) => line.points);
  const span = (k) => {
    let low = Infinity, high = -Infinity;
    for (const p of points) { low = Math.min(low, p[k]); high = Math.max(high, p[k]); }
    if (low === high) { low -= Math.abs(low) / 10 || 1; high += Math.abs(high) / 10 || 1; }
    return [low, high];
  };
  const [x0, x1] = span(0), [y0, y1] = span(1);
  const x = (v) => left + (v - x0) / (x1 - x0) * (w - left - right);
  const y = (v) => h - bottom - (v - y0) / (y1 - y0) * (h - top - bottom);
  const svg = element("svg", { viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": title });
  for (const v of ticks(y0, y1, 4)) {
    svg.append(element("line", { x1: left, x2: w - right, y1: y(v), y2: y(v), class: "grid" }),
      element("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, short(v)));
  }
  for (const v of ticks(x0, x1, 5).filter(Number.isInteger)) {
    svg.append(element("text", { x: x(v), y: h - 6, "text-anchor": "middle" }, short(v)));
  }
  for (const line of lines) {
    const d = line.points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`);
    svg.append(element("path", { d: d.join(""), style: `stroke: ${line.color}`, class: "curve",
      "stroke-dasharray": line.dash }));
    if (line.points.length <= 30) {
      for (const p of line.points) {
        svg.append(element("circle", { cx: x(p[0]), cy: y(p[1]), r: 2, style: `fill: ${line.color}` }));
      }
    }
  }
  const said = element("figcaption", { "aria-live": "off" });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = x0 + ((event.clientX - box.left) / box.width * w - left) / (w - left - right) * (x1 - x0);
    said.replaceChildren(...lines.map((line) => {
      const near = line.points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
      return element("span", { style: `color: ${line.color}` },
        `${line.name}, step ${near[0]}: ${near[1]}  `);
    }));
  });
  svg.addEventListener("pointerleave", () => said.replaceChildren());
  return element("figure", {}, element("h3", {}, title), svg, said);
}

function showCharts() {
  const all = [...new Set(runs().flatMap(({ run }) => Object.keys(run.series)))];
  const first = state.data.charts.filter((key) => all.includes(key));
  const keys = state.all ? [...first, ...all.filter((key) => !first.includes(key))] : first;
  $("charts").replaceChildren(...keys.map((key) => chart(key, runs()
    .filter(({ run }) => key in run.series)
    .map(({ run, i }) => (
      { name: run.name, color: color(i), dash: dash(i), points: run.series[key] })))));
  $("more").textContent = state.all ? "fewer" : `all ${all.length} metrics`;
}

// -- samples --------------------------------------------------------------------------------------

const length = (s) => (s.tokens ? s.tokens.length : s.completion.length);
const ORDERS = { // as in kept_samples.py, which orders the samples of a run that is watched
  "newest first": (s) => -s.step,
  "oldest first": (s) => s.step,
  "highest reward": (s) => -s.reward,
  "lowest reward": (s) => s.reward,
  longest: (s) => -length(s),
  shortest: length,
};

function coloured(sample) {
  if (!sample.tokens) return element("pre", {}, sample.completion);
  return element("pre", {}, ...sample.tokens.map((token, i) => {
    const drawn = !sample.loss_mask || sample.loss_mask[i], p = sample.logprobs[i];
    const title = drawn ? `log-prob ${p}` : "not drawn: no loss";
    const depth = Math.round(Math.min(1, -p / 6) * 70);
    const style = drawn ? `background: color-mix(in srgb, var(--hot) ${depth}%, transparent)` : "";
    if (!token) return element("span", { class: "token part", title, style }, "\u00b7");
    return element("span", { class: drawn ? "token" : "token masked", title, style }, token);
  }));
}

function card({ sample, i }) {
  const terms = Object.entries(sample.rewards || {}).map(([k, v]) => `${k} ${short(v)}`);
  const facts = [`step ${sample.step}`, sample.kind, `reward ${short(sample.reward)}`, ...terms,
    `${length(sample)} ${sample.tokens ? "tokens" : "characters"}`, sample.finish_reason];
  const name = element("span", { style: `color: ${color(i)}` }, state.data.runs[i].name);
  return element("article", {}, element("p", { class: "facts" }, name, ` \u00b7 ${facts.join(" \u00b7 ")}`),
    sample.tools ? element("p", { class: "facts" }, `tools: ${sample.tools.join(", ")}`) : null,
    element("h4", {}, "prompt"), element("pre", {}, String(sample.prompt ?? "")),
    element("h4", {}, "completion"), coloured(sample),
    sample.label ? element("p", { class: "facts" }, `label: ${sample.label}`) : null);
}

// A page of the samples that are asked for, of those that this page holds.
function foundHere({ words, kind, order, page }) {
  const has = (text) => String(text ?? "").toLowerCase().includes(words.toLowerCase());
  const found = runs().flatMap(({ run, i }) => run.samples.map((sample) => ({ sample, i })))
    .filter(({ sample: s }) => !kind || s.kind === kind)
    .filter(({ sample: s }) => !words || [s.prompt, s.completion, s.label].some(has))
    .sort((a, b) => ORDERS[order](a.sample) - ORDERS[order](b.sample));
  const each = state.data.per_page, pages = Math.max(1, Math.ceil(found.length / each));
  const at = Math.min(page, pages - 1), samples = found.slice(at * each, (at + 1) * each);
  return { num_found: found.length, page: at, pages, samples };
}

// The same of all that the runs have kept.
async function foundThere(query) {
  state.request?.abort();
  state.request = new AbortController();
  const asked = new URLSearchParams({ ...query, runs: runs().map(({ i }) => i).join(",") });
  const answer = await fetch(`samples?${asked}`, { signal: state.request.signal });
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

async function showSamples() {
  const query = { words: $("search").value, kind: $("kind").value, order: $("order").value,
    page: state.page };
  const asked = ++state.asked; // once more is asked for the answer to this is of no use
  try {
    const found = state.data.live ? await foundThere(query) : foundHere(query);
    if (asked === state.asked) showFound(found);
  } catch (error) {
    if (asked !== state.asked) return;
    const ended = error instanceof TypeError;
    $("count").textContent = ended ? "samebit watch has ended, and finds no more" : error.message;
  }
}

function showFound({ num_found, page, pages, samples }) {
  state.page = page;
  const kept = runs().reduce((n, { run }) => n + run.num_samples, 0);
  const held = state.data.live ? kept : runs().reduce((n, { run }) => n + run.samples.length, 0);
  const thin = held < kept ? `, of ${short(held)} of ${short(kept)} that this page holds: the `
    + "first of each order, else evenly; samebit watch finds all" : "";
  $("count").textContent = `${short(num_found)} found${thin}; page ${page + 1} of ${pages}`;
  $("samples").replaceChildren(...samples.map(card));
  $("before").disabled = page === 0;
  $("after").disabled = page === pages - 1;
}

function show() { showLegend(); showTable(); showCharts(); showSamples(); }

// What is new; the samples only where there are more.
function renew(data) {
  const counts = () => state.data.runs.map((run) => run.num_samples).join();
  const before = counts();
  state.data = data;
  showLegend();
  showTable();
  showCharts();
  if (counts() !== before) showSamples();
}

function turn(by) { state.page = Math.max(0, state.page + by); showSamples(); }

// What is typed is searched for once nothing more is typed.
function typed() {
  clearTimeout(state.typing);
  const search = () => { state.page = 0; showSamples(); };
  if (state.data.live) state.typing = setTimeout(search, 300); else search();
}

async function follow() {
  let tag = "";
  for (;;) {
    try {
      const answer = await fetch("data", { headers: tag ? { "If-None-Match": tag } : {} });
      if (answer.status === 200) {
        tag = answer.headers.get("ETag");
        renew(await answer.json());
      }
      $("live").textContent = answer.ok || answer.status === 304 ? "live" : await answer.text();
    } catch { $("live").textContent = "samebit watch has ended"; }
    await new Promise((wake) => setTimeout(wake, 2000));
  }
}

function start() {
  $("search").addEventListener("input", typed);
  for (const id of ["kind", "order"]) {
    $(id).addEventListener("change", () => { state.page = 0; showSamples(); });
  }
  $("before").addEventListener("click", () => turn(-1));
  $("after").addEventListener("click", () => turn(1));
  $("more").addEventListener("click", () => { state.all = !state.all; showCharts(); });
  state.data = JSON.parse($("data").textContent);
  $("order").append(...state.data.orders.map((name) => element("option", {}, name)));
  show();
  if (state.data.live) follow();
}

start();
