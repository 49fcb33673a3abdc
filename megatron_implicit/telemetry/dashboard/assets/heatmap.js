"use strict";
/* Ranks as rows, moments as columns, how much longer than its peers a rank works as colour: a straggler is a stripe. */

const HEAT_TIP = "A row is a rank, a column a moment. Colour is the rank's busy time (a step without communication) by the median of the ranks of its pipeline stage: the bright stripe is the rank that the others wait for.";
const SLOW = 1.1, VERY_SLOW = 1.6;

function heatColor(value) {
  if (!known(value)) return "transparent";
  const stops = ["--heat0", "--heat1", "--heat2", "--heatcool"].map((name) => color(name).split(",").map(Number));
  const mix = (a, b, share) => `rgb(${a.map((part, i) => Math.round(part + (b[i] - part) * Math.max(0, Math.min(1, share)))).join(",")})`;
  if (value < 1) return mix(stops[0], stops[3], (1 - value) / 0.3);
  if (value < SLOW) return mix(stops[0], stops[1], 0.35 * (value - 1) / (SLOW - 1));
  if (value < 1.3) return mix(stops[0], stops[1], 0.35 + 0.65 * (value - SLOW) / (1.3 - SLOW));
  return mix(stops[1], stops[2], (value - 1.3) / (VERY_SLOW - 1.3));
}

class HeatMap {
  constructor(parts, metrics) {
    this.parts = parts;
    this.metrics = metrics;
    this.canvas = element("canvas", { height: 10 });
    this.names = element("div", { class: "names" });
    this.worst = element("div", { class: "worst" });
    this.bars = element("div", { class: "bars" });
    this.note = element("small");
    const scale = element("span", { class: "scale" });
    scale.style.background = "linear-gradient(90deg, rgb(var(--heatcool)), rgb(var(--heat0)) 30%, rgb(var(--heat1)) 65%, rgb(var(--heat2)))";
    this.root = element("section", { id: "heat" },
      element("h2", {}, element("span", { "data-tip": HEAT_TIP }, "Ranks: who works longest"), this.note,
        element("small", { class: "right" }, "0.7", scale, "1.6 × median")),
      element("div", { class: "heat" }, this.names, this.canvas, this.worst), this.bars);
    this.canvas.addEventListener("mousemove", (event) => this.hover(event));
  }

  set(answer) {
    this.answer = answer;
    this.root.hidden = answer.ranks.length === 0;
    if (this.root.hidden) return;
    this.draw();
    this.compare();
  }

  draw() {
    const { ranks, slowness, times } = this.answer, rows = ranks.length, columns = Math.max(times.length, 1);
    const height = Math.max(2, Math.min(12, Math.floor(384 / rows)));
    const wanted = [Math.min(columns, 600), rows * height];
    if (this.canvas.width !== wanted[0] || this.canvas.height !== wanted[1]) [this.canvas.width, this.canvas.height] = wanted;
    this.canvas.style.height = `${rows * height}px`;
    this.canvas.style.imageRendering = "pixelated";
    const context = this.canvas.getContext("2d");
    context.clearRect(0, 0, ...wanted);
    const gap = height > 5 ? 1 : 0;
    slowness.forEach((row, rank) => row.forEach((value, column) => {
      context.fillStyle = heatColor(value);
      context.fillRect(column, rank * height, 1, height - gap);
    }));
    this.rowHeight = height;
    this.label();
  }

  /* Recent slowness of a row. */
  recent(row) {
    const values = row.filter(known).slice(-5);
    return values.length ? values.reduce((a, b) => a + b) / values.length : null;
  }

  label() {
    const { ranks, slowness } = this.answer, height = this.rowHeight;
    // A hidden copy of the longest name gives the column its width.
    const longest = ranks.map((rank) => String(rank.node)).reduce((a, b) => (a.length >= b.length ? a : b));
    this.names.replaceChildren(element("div", { class: "width" }, longest));
    let first = 0;
    ranks.forEach((rank, index) => {
      const ends = index === ranks.length - 1 || ranks[index + 1].node !== rank.node;
      if (!ends) return;
      const middle = (first + index + 1) / 2 * height;
      const mark = element("span", { "data-tip": `ranks ${ranks[first].rank} to ${rank.rank}` }, String(rank.node));
      mark.style.top = `${middle}px`;
      this.names.append(mark);
      first = index + 1;
    });
    const slow = slowness.map((row, index) => [this.recent(row), index]).filter(([value]) => value > 1.2).sort((a, b) => b[0] - a[0]).slice(0, 4);
    const words = slow.map(([value, index]) => `◀ rank ${ranks[index].rank} on ${ranks[index].node}: ${value.toFixed(2)} ×`);
    this.worst.replaceChildren(...slow.map(([, index], number) => {
      const mark = element("span", {}, words[number]);
      mark.style.top = `${(index + 0.5) * height}px`;
      return mark;
    }), element("div", { class: "width" }, words[0] || ""));
    const source = this.answer.source === "files" ? "from the run's files" : "live from Prometheus";
    this.note.textContent = `${ranks.length} ranks, ${source}` + (slow.length ? "" : "; none stands out");
  }

  hover(event) {
    const { ranks, slowness, times, latest } = this.answer;
    const row = Math.min(ranks.length - 1, Math.floor(event.offsetY / this.rowHeight));
    const column = Math.min(times.length - 1, Math.floor(event.offsetX / this.canvas.clientWidth * times.length));
    if (row < 0 || column < 0) return;
    const { rank, node, stage } = ranks[row], now = latest[row] || {};
    const split = this.parts.filter((part) => now[`${part}_s`]).map((part) => `${part.replace("_", " ")} ${inUnit(now[`${part}_s`], "s")}`).join(" · ");
    const value = slowness[row][column];
    this.canvas.setAttribute("data-tip", `rank ${rank} · ${node} · stage ${stage}\n${clock(times[column])}: ${known(value) ? value.toFixed(2) : DASH} × the median\nnow: ${split}`);
  }

  /* Where the time of the slowest ranks goes, beside a rank in the middle. */
  compare() {
    const { ranks, slowness, latest } = this.answer;
    const order = slowness.map((row, index) => [this.recent(row) ?? 0, index]).sort((a, b) => b[0] - a[0]);
    const chosen = [...order.slice(0, Math.min(4, order.length)).map(([value, index]) => [index, value])];
    if (order.length > 5) chosen.push([order[Math.floor(order.length / 2)][1], order[Math.floor(order.length / 2)][0], "in the middle"]);
    const longest = Math.max(...chosen.map(([index]) => this.parts.reduce((sum, part) => sum + (latest[index][`${part}_s`] || 0), 0)), 1e-9);
    this.bars.replaceChildren();
    for (const [index, value, words] of chosen) {
      const bar = element("div", { class: "bar" });
      this.parts.forEach((part, number) => {
        const seconds = latest[index][`${part}_s`] || 0;
        const piece = element("i", { "data-tip": `${part.replace("_", " ")}: ${inUnit(seconds, "s")}\n${this.metrics[`${part}_s`].meaning}` });
        piece.style.width = `${100 * seconds / longest}%`;
        piece.style.background = `var(--c${number})`;
        bar.append(piece);
      });
      this.bars.append(element("span", {}, `rank ${ranks[index].rank} · ${ranks[index].node}${words ? ` (${words})` : ""}`), bar, element("span", {}, `${value.toFixed(2)} ×`));
    }
    const legend = element("div", { class: "legend" }, ...this.parts.map((part, number) => {
      const mark = element("i"); mark.style.background = `var(--c${number})`;
      return element("span", { "data-tip": this.metrics[`${part}_s`].meaning }, mark, part.replace("_", " "));
    }));
    this.bars.append(element("span"), legend, element("span"));
  }

  repaint() { if (this.answer && this.answer.ranks.length) this.draw(); }
}
