"use strict";
/* Curves over steps with uPlot: phases shaded, restarts and events marked, cursors together, live numbers in the legend. */

const CHART_HEIGHT = 200;
const cursors = uPlot.sync("steps");

/* Mean of the values before each; it starts anew where a phase begins: other solves, other numbers. */
function runningMean(values, window, starts = new Set()) {
  const result = new Array(values.length).fill(null);
  let sum = 0, members = 0, queue = [];
  values.forEach((value, index) => {
    if (starts.has(index)) [sum, members, queue] = [0, 0, []];
    queue.push(value);
    if (known(value)) { sum += value; members += 1; }
    if (queue.length > window) {
      const old = queue.shift();
      if (known(old)) { sum -= old; members -= 1; }
    }
    result[index] = members && known(value) ? sum / members : null;
  });
  return result;
}

/* Rows at which a phase begins. */
function phaseStarts(steps, phases) {
  return new Set(phases.slice(1).map((phase) => steps.findIndex((step) => step >= phase.first)));
}

/* 1, 2 and 5 of every power of ten in a range. */
function decades(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
    for (const digit of [1, 2, 5]) ticks.push(Number(`${digit}e${power}`));
  return ticks.filter((tick) => tick >= low && tick <= high);
}

/* What stands behind the curves: phases, the places where another job took over. */
function backdrop(context) {
  const band = (u, from, to) => [u.valToPos(from, "x", true), u.valToPos(to, "x", true)];
  return {
    hooks: {
      drawClear: (u) => {
        const { ctx, bbox } = u;
        ctx.save();
        ctx.beginPath(); ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height); ctx.clip();
        context().phases.forEach((phase, index) => {
          const [left, right] = band(u, phase.first - 0.5, phase.last + 0.5);
          if (index % 2) { ctx.fillStyle = color("--phase"); ctx.fillRect(left, bbox.top, right - left, bbox.height); }
        });
        ctx.restore();
      },
      draw: (u) => {
        const { ctx, bbox } = u, ratio = devicePixelRatio;
        ctx.save();
        ctx.beginPath(); ctx.rect(bbox.left, bbox.top - 16 * ratio, bbox.width, bbox.height + 16 * ratio); ctx.clip();
        ctx.font = `${11 * ratio}px system-ui, sans-serif`;
        ctx.textAlign = "left";
        ctx.textBaseline = "alphabetic";
        const { phases, attempts } = context();
        const line = (at, style, dash) => {
          ctx.strokeStyle = style; ctx.lineWidth = ratio; ctx.setLineDash(dash);
          ctx.beginPath(); ctx.moveTo(at, bbox.top); ctx.lineTo(at, bbox.top + bbox.height); ctx.stroke();
        };
        phases.forEach((phase, index) => {
          if (phases.length < 2) return;
          const [left] = band(u, phase.first - 0.5, phase.last);
          if (index) line(left, color("--line"), []);
          ctx.fillStyle = color("--dim");
          ctx.fillText(phase.name, Math.max(left, bbox.left) + 4 * ratio, bbox.top - 4 * ratio);
        });
        attempts.forEach((attempt) => line(u.valToPos(attempt.step - 0.5, "x", true), color("--mark"), [4 * ratio, 3 * ratio]));
        ctx.restore();
      },
    },
  };
}

class Chart {
  /* definition: {title, unit, logarithmic, from_zero, stacked, tip, lines: [{label, tip, color, width, alpha, dash}]} */
  constructor(definition, context, zoom) {
    this.definition = definition;
    this.context = context;
    this.zoom = zoom;
    this.values = definition.lines.map(() => element("b", {}, DASH));
    this.legend = element("div", { class: "legend" }, ...definition.lines.map((line, index) =>
      line.hidden ? null : element("span", { "data-tip": line.tip }, this.swatch(line), line.label, this.values[index])));
    this.place = element("div");
    const title = element("h2", {}, element("span", { "data-tip": definition.tip }, definition.title),
      element("small", {}, definition.unit === "share" ? "" : definition.unit));
    this.root = element("section", {}, title, this.legend, this.place);
    this.plot = null;
  }

  swatch(line) {
    const mark = element("i");
    mark.style.background = `var(${line.color})`;
    return mark;
  }

  set(data) {
    this.raw = data;
    this.data = this.definition.stacked ? this.stack(data) : data;
    if (!this.plot) this.build();
    else this.plot.setData(this.data, !this.zoomed);
    this.tell(null);
  }

  stack(data) {
    const [steps, ...rows] = data;
    const base = new Array(steps.length).fill(0);
    return [steps, ...rows.map((row) => row.map((value, index) => (known(value) ? (base[index] += value) : null)))];
  }

  build() {
    const { definition } = this, axis = { stroke: color("--dim"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line"), width: 1 }, font: "11px system-ui, sans-serif" };
    const options = {
      width: Math.max(280, this.place.clientWidth || 540), height: CHART_HEIGHT, padding: [16, 14, 0, 0],
      cursor: { sync: { key: cursors.key }, drag: { x: true, y: false }, points: { size: 6 } },
      legend: { show: false },
      scales: {
        x: { time: false },
        y: definition.logarithmic ? { distr: 3, range: (u, low, high) => (low > 0 ? [low / 1.25, high * 1.25] : [0.1, 1]) } : { range: (u, low, high) => this.range(low, high) },
      },
      axes: [
        { ...axis, size: 26, gap: 4, values: (u, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? short(tick) : "")) },
        { ...axis, size: 62, ...(definition.logarithmic ? { splits: (u, index, low, high) => decades(low, high), filter: (u, ticks) => ticks } : {}), values: (u, ticks) => ticks.map((tick) => (known(tick) ? inUnit(tick, definition.unit) : "")) },
      ],
      series: [{}, ...definition.lines.map((line) => ({
        stroke: this.paint(line.color, line.alpha ?? 1), width: line.width ?? 1.6, dash: line.dash, spanGaps: line.sparse ?? false,
        points: { show: (u, index) => Boolean(line.sparse) || this.raw[0].length < 3, size: 4 }, fill: definition.stacked ? this.paint(line.color, 0.75) : undefined,
      }))],
      bands: definition.stacked ? definition.lines.slice(1).map((_, index) => ({ series: [index + 2, index + 1] })) : undefined,
      plugins: [backdrop(this.context)],
      hooks: {
        setCursor: [(u) => this.tell(u.cursor.idx)],
        setSelect: [(u) => { if (u.select.width > 4 && this.zoom) this.zoom(u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")); u.setSelect({ width: 0, height: 0 }, false); }],
      },
    };
    options.cursor.drag.setScale = false;
    this.plot = new uPlot(options, this.data, this.place);
    this.plot.over.addEventListener("dblclick", () => this.zoom && this.zoom(null, null));
    this.place.dataset.points = String(this.data[0].length);
  }

  range(low, high) {
    if (!known(low) || !known(high)) return [0, 1];
    const margin = 0.06 * (high - low || Math.abs(high) || 1);
    return [this.definition.from_zero ? Math.min(0, low) : low - margin, high + margin];
  }

  paint(name, alpha) {
    const value = color(name);
    if (alpha === 1) return value;
    return value + Math.round(255 * alpha).toString(16).padStart(2, "0");
  }

  /* The legend's numbers: at the cursor, else the newest. */
  tell(index) {
    if (!this.raw) return;
    this.definition.lines.forEach((line, number) => {
      const column = this.raw[number + 1];
      let at = index;
      if (!known(at)) { at = column.length - 1; while (at > 0 && !known(column[at])) at -= 1; }
      this.values[number].textContent = inUnit(column[at], this.definition.unit);
    });
  }

  resize() { if (this.plot) this.plot.setSize({ width: Math.max(280, this.place.clientWidth), height: CHART_HEIGHT }); }

  repaint() { if (this.plot) { this.plot.destroy(); this.plot = null; this.build(); } }
}

/* The chart of a panel: its series, and a running mean of the first where it is noisy. */
function panelChart(panel, metrics, context, zoom) {
  const meaning = (key) => (metrics[key] ? metrics[key].meaning : "");
  const lines = panel.series.map((key, index) => ({
    key, label: panel.labels[key] || (panel.series.length > 1 ? (metrics[key] || {}).title || key : ""), tip: meaning(key), color: `--c${index}`,
    width: index ? 1.3 : 1.8, sparse: key === "validation_loss",
  }));
  if (panel.smooth) {
    Object.assign(lines[0], { alpha: 0.35, width: 1 });
    lines.splice(1, 0, { ...lines[0], label: "", tip: "Mean of the steps before.", smooth: true, alpha: 1, width: 2, hidden: true });
  }
  const tip = panel.meaning || panel.series.map((key) => (panel.series.length > 1 ? `${panel.labels[key] || key}: ` : "") + meaning(key)).join("\n");
  const chart = new Chart({ ...panel, tip, lines }, context, zoom);
  chart.show = (curves) => {
    const window = Math.max(1, Math.floor(curves.step.length / 40));
    const starts = phaseStarts(curves.step, context().phases);
    const empty = new Array(curves.step.length).fill(null);
    chart.set([curves.step, ...lines.map((line) => (line.smooth ? runningMean(curves[line.key] || empty, window, starts) : curves[line.key] || empty))]);
  };
  return chart;
}
