"use strict";
/* The views: all runs, one run, several runs beside each other. Each asks the server again every two seconds. */

const EVERY_MS = 2000;
const main = document.getElementById("main");
const trail = document.getElementById("trail");
const notice = document.getElementById("notice");
let view = null, chosen = new Set(), catalogue = null;

/* In a report the answers are in the file: window.EMBEDDED, by the name of the question. */
const embedded = window.EMBEDDED || null;

function embeddedAnswer(path) {
  const address = new URL(path, "http://report/"), answer = embedded[address.pathname.replace("/api/", "")];
  const first = Number(address.searchParams.get("first") || 0), last = Number(address.searchParams.get("last") || Infinity);
  if (!answer.curves) return answer;
  const rows = answer.curves.step.map((step, index) => (step >= first && step <= last ? index : -1)).filter((index) => index >= 0);
  return { ...answer, curves: Object.fromEntries(Object.entries(answer.curves).map(([key, column]) => [key, rows.map((index) => column[index])])) };
}

async function ask(path) {
  if (embedded) return embeddedAnswer(path);
  const answer = await fetch(path);
  if (!answer.ok) throw new Error((await answer.json()).error || answer.statusText);
  return answer.json();
}
const tip = (key) => (catalogue.metrics[key] ? catalogue.metrics[key].meaning : "");
const runLink = (id) => `#/run/${encodeURIComponent(id)}`;
const stateMark = (state, reason) => element("span", { class: `state ${state}`, "data-tip": reason || STATES[state] }, state);
const STATES = {
  running: "Steps arrive.", stalled: "No step for two minutes and ten usual steps: a rank may hang.",
  finished: "Made all its steps.", stopped: "Ended in good order before its last step; the same command goes on.",
  failed: "Ended with an error: see its events.", waiting: "Nothing of it yet.",
  unreadable: "Its config.yaml is damaged.", up: "The exporter answers.", down: "The exporter does not answer.",
};

function progress(row) {
  const bar = element("span", { class: "progress" }, element("i"));
  bar.firstChild.style.width = `${row.steps ? Math.min(100, 100 * row.step / row.steps) : 0}%`;
  return bar;
}

function tile(label, value, words, meaning) {
  return element("div", { class: "tile" }, element("span", { "data-tip": meaning }, label), element("b", {}, value), element("span", {}, words || " "));
}

function alertsCard(alerts) {
  if (!alerts.length) return null;
  const critical = alerts.some((alert) => alert.severity === "critical" && alert.state === "firing");
  const card = element("section", { class: `alerts ${critical ? "critical" : ""}`, id: "alerts" }, element("h2", {}, "Alerts"));
  for (const alert of alerts) {
    card.append(element("div", { class: `alert ${alert.severity} ${alert.state}`, "data-tip": alert.remedy ? `What to do: ${alert.remedy}` : null },
      element("b", {}, alert.name), alert.summary, element("small", {}, alert.state === "firing" ? `since ${clock(Date.parse(alert.since) / 1000)}` : "may fire soon")));
  }
  return card;
}

/* Replaces a part of the page only where it has changed, so that hovering and selecting survive updates. */
function renew(place, key, made) {
  const text = JSON.stringify(key);
  if (place.dataset.key === text) return;
  place.dataset.key = text;
  place.replaceChildren(...[made()].flat().filter(known));
}

/* ------------------------------------------------------------------ all runs */

const RUN_COLUMNS = [
  ["run", "", null], ["state", "", null], ["phase", "", "Phase of the curriculum the run is in."], ["progress", "", "Steps made of the run's steps."],
  ["time left", "n", "At the pace of the last steps. An upper bound: phases to come are counted with all the evaluations they may take."],
  ["loss", "n", "loss"], ["held out", "n", "validation_loss"], ["tokens/s", "n", "tokens_per_s"], ["FLOP/s", "n", "model_flops_per_s"], ["MFU", "n", "mfu"], ["evaluations", "n", "evaluations_mean"],
  ["99%", "n", "evaluations_p99"], ["residual", "n", "residual_mean"], ["unconverged", "n", "unconverged_fraction"],
  ["device hours", "n", "Devices times hours between their steps, over all attempts."], ["restarts", "n", "Jobs that went on with the run."], ["last step", "n", "When the newest line was written."],
];

class Overview {
  async start() {
    trail.replaceChildren("all runs");
    this.alerts = element("div");
    this.tiles = element("div", { class: "tiles" });
    this.runs = element("div", { class: "scroll" });
    this.nodes = element("div", { class: "scroll" });
    this.filter = element("input", { class: "filter", placeholder: "filter by name or state", oninput: () => this.show() });
    this.button = element("button", { disabled: "", "data-tip": "Choose two or more runs by their boxes.", onclick: () => { location.hash = `#/compare/${[...chosen].map(encodeURIComponent).join("/")}`; } }, "compare");
    this.nodeCard = element("section", { id: "nodes" }, element("h2", {}, "Nodes", element("small", {}, "by Prometheus")), this.nodes);
    main.replaceChildren(this.alerts, this.tiles, element("section", { id: "runs" }, element("h2", {}, "Runs", element("span", { class: "right" }, this.filter, " ", this.button)), this.runs), this.nodeCard);
    await this.update();
  }

  async update() {
    this.answer = await ask("api/overview");
    this.show();
  }

  show() {
    const { runs, nodes, alerts, prometheus } = this.answer;
    renew(this.alerts, alerts, () => alertsCard(alerts));
    const active = runs.filter((run) => run.state === "running");
    const sum = (rows, key) => rows.reduce((total, row) => total + (row[key] || 0), 0);
    this.tiles.replaceChildren(
      tile("running", String(active.length), `of ${runs.length} runs`),
      tile("throughput", short(sum(active, "tokens_per_s")), "tokens/s, all running runs", tip("tokens_per_s")),
      tile("ranks at work", count(sum(active, "ranks")), nodes.length ? `on ${new Set(nodes.filter((node) => node.up).map((node) => node.node)).size} nodes` : " "),
      tile("device hours", short(sum(runs, "device_hours")), "all runs here", "Devices times hours between their steps, over all attempts."),
      tile("alerts", String(alerts.filter((alert) => alert.state === "firing").length), prometheus === "answers" ? "firing" : `Prometheus: ${prometheus}`, "Alerts of the shipped rules. They need Prometheus; without it states and the ranks' heat map come from the runs' files."),
    );
    const wanted = this.filter.value.toLowerCase();
    const rows = runs.filter((run) => `${run.id} ${run.name} ${run.state} ${run.family}`.toLowerCase().includes(wanted));
    renew(this.runs, [rows, wanted, [...chosen]], () => (rows.length ? this.table(rows) : element("div", { class: "empty" }, runs.length ? "No run matches." : "No run here yet: a run writes its folder with its first step.")));
    this.button.disabled = chosen.size < 2;
    this.button.textContent = chosen.size ? `compare ${chosen.size}` : "compare";
    this.nodeCard.hidden = nodes.length === 0;
    renew(this.nodes, nodes, () => this.nodeTable(nodes));
  }

  table(rows) {
    const head = element("tr", {}, element("th"), ...RUN_COLUMNS.map(([name, kind, meaning]) => element("th", { class: kind, "data-tip": meaning && (catalogue.metrics[meaning] ? tip(meaning) : meaning) }, name)));
    return element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows.map((run) => this.row(run))));
  }

  row(run) {
    const box = element("input", { type: "checkbox", "aria-label": `choose ${run.name}`, onclick: (event) => { event.stopPropagation(); if (box.checked) chosen.add(run.id); else chosen.delete(run.id); this.show(); } });
    box.checked = chosen.has(run.id);
    const n = (text) => element("td", { class: "n" }, text);
    const ago = known(run.time) ? this.answer.time - run.time : null;
    return element("tr", { class: "link", onclick: () => { location.hash = runLink(run.id); } },
      element("td", {}, box),
      element("td", { "data-tip": `${run.dir}\n${run.family} ${run.size}` }, element("a", { href: runLink(run.id) }, run.name)),
      element("td", {}, stateMark(run.state, run.reason)), element("td", {}, run.phase || DASH),
      element("td", {}, progress(run), ` ${count(run.step)}${run.steps ? ` / ${count(run.steps)}` : ""}`),
      n(span(run.eta_s)), n(short(run.loss, 4)), n(short(run.validation_loss, 4)), n(short(run.tokens_per_s)), n(short(run.model_flops_per_s)), n(percent(run.mfu)), n(short(run.evaluations_mean)),
      n(short(run.evaluations_p99)), n(short(run.residual_mean)), n(percent(run.unconverged_fraction)), n(short(run.device_hours)),
      n(String(run.attempt ?? DASH)), n(known(ago) ? (ago < 3 ? "now" : `${span(ago)} ago`) : DASH));
  }

  /* Nodes that need a look come first. */
  nodeTable(unordered) {
    const nodes = [...unordered].sort((a, b) => a.up - b.up || (b.slowness > 1.25) * b.slowness - (a.slowness > 1.25) * a.slowness);
    const titles = [["node", ""], ["run", ""], ["state", ""], ["job", ""], ["ranks", "n"], ["tokens/s", "n", tip("rank_tokens_per_s")], ["memory, most", "n", tip("rank_memory_bytes")], ["data wait, most", "n", tip("data_wait_s")], ["slowest rank", "n", tip("slowness")]];
    return element("table", {}, element("thead", {}, element("tr", {}, ...titles.map(([name, kind, meaning]) => element("th", { class: kind, "data-tip": meaning }, name)))),
      element("tbody", {}, ...nodes.map((node) => {
        const slow = element("span", {}, known(node.slowness) ? `rank ${node.slowest}: ${node.slowness.toFixed(2)} ×` : DASH);
        if (node.slowness > 1.25) slow.style.cssText = "color: var(--bad); font-weight: 650";
        return element("tr", {}, element("td", {}, node.node), element("td", {}, node.run), element("td", {}, stateMark(node.up ? "up" : "down")), element("td", {}, node.job || DASH),
          element("td", { class: "n" }, String(node.ranks)), element("td", { class: "n" }, short(node.tokens_per_s)), element("td", { class: "n" }, bytes(node.memory_bytes)),
          element("td", { class: "n" }, inUnit(node.data_wait_s, "s")), element("td", { class: "n" }, slow));
      })));
  }
  repaint() {}
  resize() {}
}

/* ------------------------------------------------------------------ one run */

class RunView {
  constructor(id) { this.id = id; this.charts = null; this.window = [null, null]; }

  async start() {
    this.alerts = element("div");
    this.tiles = element("div", { class: "tiles" });
    this.grid = element("div", { class: "grid" });
    this.heat = new HeatMap(catalogue.parts, catalogue.metrics);
    this.events = element("div", { class: "scroll" });
    this.configuration = element("pre");
    const details = element("details", { open: embedded ? "" : null, ontoggle: async () => { if (details.open) this.configuration.textContent = yaml((await ask(`api/config?id=${encodeURIComponent(this.id)}`)).config); } }, element("summary", {}, "configuration"), this.configuration);
    main.replaceChildren(this.alerts, this.tiles, this.heat.root, this.grid, element("section", { id: "events" }, element("h2", {}, "Events"), this.events), element("section", {}, details));
    await this.update();
  }

  async update() {
    const [first, last] = this.window;
    const id = encodeURIComponent(this.id), range = known(first) ? `&first=${first}&last=${last}` : "";
    const [run, ranks] = await Promise.all([ask(`api/run?id=${id}${range}`), ask(`api/ranks?id=${id}`)]);
    this.run = run;
    this.show(ranks);
  }

  show(ranks) {
    const { run } = this;
    renew(trail, [run.name, run.state], () => [embedded ? "" : element("a", { href: "#/" }, "all runs"), embedded ? "" : " › ", element("b", {}, run.name), " ", stateMark(run.state, run.reason), run.reason ? ` ${run.reason}` : ""]);
    renew(this.alerts, run.alerts, () => alertsCard(run.alerts));
    renew(this.tiles, [run.step, run.state, run.eta_s], () => this.numbers());
    this.heat.set(ranks);
    if (!this.charts) this.build();
    for (const chart of this.charts) chart.show(run.curves);
    renew(this.events, run.events, () => this.eventTable());
  }

  numbers() {
    const { run } = this, last = run.attempts[run.attempts.length - 1];
    const steps = tile("step", count(run.step), run.steps ? `of ${count(run.steps)} · ${percent(run.step / run.steps)}` : " ");
    if (run.steps) steps.append(progress(run));
    const tiles = [
      steps, tile("phase", run.phase || DASH, run.state === "running" ? `at most ${span(run.eta_s)} left` : run.state, "An upper bound: phases to come are counted with all the evaluations they may take."),
      tile("loss", short(run.loss, 4), known(run.validation_loss) ? `held out ${short(run.validation_loss, 4)}` : "nats/token", tip("loss")),
      tile("throughput", short(run.tokens_per_s), "tokens/s", tip("tokens_per_s")),
      tile("model FLOP/s", short(run.model_flops_per_s), known(run.mfu) ? `MFU ${percent(run.mfu)}` : "MFU unknown: no peak of this device", `${tip("model_flops_per_s")} ${tip("mfu")}`),
    ];
    if (known(run.evaluations_mean)) tiles.push(
      tile("evaluations", short(run.evaluations_mean), `99%: ${short(run.evaluations_p99)}`, tip("evaluations_mean")),
      tile("residual", short(run.residual_mean), "mean, accepted iterates", tip("residual_mean")),
      tile("unconverged", percent(run.unconverged_fraction), "of samples", tip("unconverged_fraction")));
    tiles.push(tile("device hours", short(run.device_hours), known(run.ranks) ? `${count(run.ranks)} ranks` : " ", "Devices times hours between their steps, over all attempts."),
      tile("restarts", String(run.attempts.length), last ? `last: gap ${span(last.gap_s)}, ${last.redone} steps again` : "none", "Jobs that went on with the run; dashed lines in the curves."));
    return tiles;
  }

  build() {
    const context = () => ({ phases: this.run.phases, attempts: this.run.attempts });
    const zoom = (first, last) => { this.window = known(first) ? [Math.max(0, Math.floor(first)), Math.ceil(last)] : [null, null]; this.update(); };
    const panels = catalogue.panels.filter((panel) => panel.series.some((key) => (this.run.curves[key] || []).some(known)));
    this.charts = panels.map((panel) => panelChart(panel, catalogue.metrics, context, zoom));
    this.grid.replaceChildren(...this.charts.map((chart) => chart.root));
  }

  eventTable() {
    const restarts = this.run.attempts.map((attempt) => ({ time: attempt.time, step: attempt.step, attempt: attempt.attempt, rank: 0, kind: "first step", message: `attempt ${attempt.attempt} makes its first step, ${span(attempt.gap_s)} after the last one of the job before; ${attempt.redone} steps again` }));
    const rows = [...this.run.events, ...restarts].sort((a, b) => b.time - a.time).slice(0, 200);
    if (!rows.length) return element("div", { class: "empty" }, "none here");
    return element("table", {}, element("thead", {}, element("tr", {}, ...["time", "step", "attempt", "rank", "what", ""].map((name) => element("th", {}, name)))),
      element("tbody", {}, ...rows.map((event) => element("tr", {}, element("td", {}, clock(event.time)), element("td", {}, count(event.step)), element("td", {}, String(event.attempt)), element("td", {}, String(event.rank)), element("td", {}, event.kind), element("td", { class: "wrap" }, event.message)))));
  }

  resize() { (this.charts || []).forEach((chart) => chart.resize()); }
  repaint() { (this.charts || []).forEach((chart) => chart.repaint()); this.heat.repaint(); }
}

function yaml(value, indent = "") {
  if (Array.isArray(value)) return value.length ? value.map((item) => (item && typeof item === "object" ? `${indent}- ${yaml(item, `${indent}  `).trimStart()}` : `${indent}- ${item}`)).join("\n") : `${indent}[]`;
  if (value && typeof value === "object") return Object.entries(value).map(([key, inner]) => (inner && typeof inner === "object" && Object.keys(inner).length ? `${indent}${key}:\n${yaml(inner, `${indent}  `)}` : `${indent}${key}: ${inner === null ? "null" : typeof inner === "object" ? "[]" : inner}`)).join("\n");
  return `${indent}${value}`;
}

/* ------------------------------------------------------------------ several runs */

class CompareView {
  constructor(ids) { this.ids = ids; this.charts = null; }

  async start() {
    trail.replaceChildren(element("a", { href: "#/" }, "all runs"), " › comparison");
    this.grid = element("div", { class: "grid" });
    this.difference = element("div", { class: "scroll" });
    this.names = element("div", { class: "legend" });
    main.replaceChildren(element("section", {}, element("h2", {}, "Runs"), this.names), this.grid, element("section", { id: "difference" }, element("h2", {}, "Differences of their configurations"), this.difference));
    await this.update();
  }

  async update() {
    const answer = await ask(`api/compare?${this.ids.map((id) => `id=${encodeURIComponent(id)}`).join("&")}`);
    this.runs = answer.runs;
    if (!this.charts) this.build();
    for (const chart of this.charts) chart.show();
    renew(this.names, this.runs.map((run) => [run.name, run.state, run.step]), () => this.runs.map((run, index) => {
      const mark = element("i"); mark.style.background = `var(--c${index % 7})`;
      return element("span", {}, mark, element("a", { href: runLink(run.id) }, run.name), ` ${run.state}, step ${count(run.step)}, loss ${short(run.loss, 4)}, ${short(run.device_hours)} device hours`);
    }));
    renew(this.difference, answer.difference, () => this.differenceTable(answer.difference));
  }

  build() {
    const panels = catalogue.panels.filter((panel) => !panel.stacked && this.runs.some((run) => (run.curves[panel.series[0]] || []).some(known)));
    this.charts = panels.flatMap((panel) => panel.series.slice(0, panel.name === "loss" ? 2 : 1).map((key) => this.chart(panel, key)));
    this.grid.replaceChildren(...this.charts.map((chart) => chart.root));
  }

  chart(panel, key) {
    const noisy = panel.smooth && key !== "validation_loss";
    const lines = this.runs.map((run, index) => ({ label: run.name, tip: tip(key), color: `--c${index % 7}`, width: 1.7, sparse: key === "validation_loss" }));
    const words = noisy ? ", running mean" : "";
    const chart = new Chart({ ...panel, stacked: false, title: (catalogue.metrics[key] || panel).title + words, tip: tip(key), lines }, () => ({ phases: [], attempts: [] }), null);
    chart.show = () => {
      const steps = [...new Set(this.runs.flatMap((run) => run.curves.step))].sort((a, b) => a - b);
      const columns = this.runs.map((run) => {
        const values = run.curves[key] || [];
        const drawn = noisy ? runningMean(values, Math.max(1, Math.floor(values.length / 40)), phaseStarts(run.curves.step, run.phases)) : values;
        const at = new Map(run.curves.step.map((step, index) => [step, drawn[index] ?? null]));
        return steps.map((step) => at.get(step));  // undefined: no gap where only another run has the step
      });
      chart.set([steps, ...columns]);
    };
    return chart;
  }

  differenceTable(rows) {
    if (!rows.length) return element("div", { class: "empty" }, "none: they are configured alike");
    return element("table", {}, element("thead", {}, element("tr", {}, element("th", {}, "key"), ...this.runs.map((run) => element("th", {}, run.name)))),
      element("tbody", {}, ...rows.map((row) => element("tr", {}, element("td", {}, row.key), ...this.runs.map((run, index) => {
        const value = row.values[run.id], other = row.values[this.runs[0].id];
        return element("td", { class: index && JSON.stringify(value) !== JSON.stringify(other) ? "differs" : null }, value === undefined ? "absent" : value === null ? "null" : String(value));
      })))));
  }

  resize() { (this.charts || []).forEach((chart) => chart.resize()); }
  repaint() { (this.charts || []).forEach((chart) => chart.repaint()); }
}

/* ------------------------------------------------------------------ what runs it */

function route() {
  if (embedded) return new RunView(embedded.run.id);
  const [, kind, ...rest] = location.hash.split("/");
  const names = rest.map(decodeURIComponent);
  if (kind === "run" && names.length) return new RunView(names[0]);
  if (kind === "compare" && names.length) return new CompareView(names);
  return new Overview();
}

/* Tells how long it took, for whoever measures: data-state, data-loaded-ms and data-update-ms of the body. */
async function run(action, measure) {
  const began = performance.now();
  try {
    await action();
    notice.className = "";
    notice.textContent = embedded ? `report of ${clock(embedded.run.reported)}` : `updated ${new Date().toLocaleTimeString("sv")}`;
    document.body.dataset.state = "ready";
    document.body.dataset[measure] = String(Math.round(performance.now() - (measure === "loadedMs" ? 0 : began)));
  } catch (error) {
    notice.className = "bad";
    notice.textContent = error instanceof TypeError ? "the server does not answer" : error.message;
    document.body.dataset.state = "failed";
  }
}

async function open() {
  const opened = route();
  view = opened;
  trail.dataset.key = "";
  window.scrollTo(0, 0);
  catalogue = catalogue || (await ask("api/panels"));
  await run(() => opened.start(), document.body.dataset.loadedMs ? "openedMs" : "loadedMs");
}

let updating = false;
async function tick() {
  if (updating || document.hidden || !view) return;
  updating = true;
  await run(() => view.update(), "updateMs");
  updating = false;
}

const THEMES = ["auto", "light", "dark"];
const dark = matchMedia("(prefers-color-scheme: dark)");
function applyTheme() {
  const wanted = localStorage.getItem("theme") || "auto";
  document.documentElement.dataset.theme = wanted === "auto" ? (dark.matches ? "dark" : "light") : wanted;
  document.getElementById("theme").textContent = wanted;
  if (view) view.repaint();
}
document.getElementById("theme").addEventListener("click", () => {
  const now = localStorage.getItem("theme") || "auto";
  localStorage.setItem("theme", THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
  applyTheme();
});
dark.addEventListener("change", applyTheme);
addEventListener("hashchange", open);
addEventListener("resize", () => view && view.resize());
if (!embedded) document.addEventListener("visibilitychange", tick);
applyTheme();
open();
if (!embedded) setInterval(tick, EVERY_MS);
