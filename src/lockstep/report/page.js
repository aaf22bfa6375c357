"use strict";
// Draws the report from the data in the page. Counts per step and rank stay in typed arrays; each chart is drawn from at
// most so many bins of the range in view, so that 100,000 steps open fast and zooming shows more detail.
const DATA = JSON.parse(document.getElementById("data").textContent);
const MAX_BINS = 900;
const WAITING = 0, PREFILL = 1, DECODE = 2, FILLER = 3, SERVING = 4, KINDS = 5;
// Okabe and Ito's colours, which colour-blind people tell apart, and lighter ones of the same hues for a dark page.
const LIGHT = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#8c6d1f", "#666666"];
const DARK = ["#56b4e9", "#f0b429", "#2fc79a", "#ff8a5c", "#9fd4f5", "#e08fbd", "#cbb26a", "#b0b0b0"];
const PRINT = matchMedia("print"), PRINT_WIDTH = 690;  // page.css gives a printed page 185 mm, which is a little more
const lineColor = (index) => (PRINT.matches || !matchMedia("(prefers-color-scheme: dark)").matches ? LIGHT : DARK)[index % 8];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "solid", "dash", "dot"];
const $ = (id) => document.getElementById(id);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const percent = (share) => (100 * share).toFixed(share < 0.0995 ? 1 : 0) + " %";
const count = (value) => Math.round(value).toLocaleString("en");

async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.data), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  return { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array }[packed.type].from(
    new { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array }[packed.type](buffer));
}

function layout(extra) {
  const axis = { gridcolor: color("rule"), linecolor: color("rule"), zerolinecolor: color("rule"), automargin: true,
    exponentformat: "none", separatethousands: true };
  return Object.assign({
    autosize: !PRINT.matches, width: PRINT.matches ? PRINT_WIDTH : undefined,
    paper_bgcolor: color("paper"), plot_bgcolor: color("paper"), dragmode: "zoom",
    font: { color: color("ink"), size: 13, family: "system-ui, sans-serif" },
    margin: { l: 70, r: 15, t: 34, b: 45 }, hoverlabel: { font: { size: 13 } },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
  }, extra, { xaxis: Object.assign({}, axis, extra.xaxis), yaxis: Object.assign({}, axis, extra.yaxis) });
}
const CONFIG = { displaylogo: false, responsive: true, showSendToCloud: false,
  modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]] };

class Steps {
  constructor(arrays) {
    Object.assign(this, arrays);
    this.ranks = DATA.num_ranks;
    this.rows = DATA.num_rows;
    this.perRow = DATA.steps_per_row;
  }
  // Shares of time of each kind, and rows per step, of every rank in [first, last), in at most so many bins.
  bins(first, last, most) {
    const size = Math.max(1, Math.ceil((last - first) / most));
    const number = Math.ceil((last - first) / size);
    const shares = new Float32Array(number * this.ranks * KINDS), rows = new Float32Array(number * this.ranks);
    for (let bin = 0; bin < number; bin++) {
      const from = first + bin * size, to = Math.min(last, from + size);
      let weight = 0;
      for (let row = from; row < to; row++) weight += this.weight[row];
      for (let row = from; row < to; row++) {
        const part = weight > 0 ? this.weight[row] / weight : 1 / (to - from);
        for (let rank = 0; rank < this.ranks; rank++) {
          const cell = row * this.ranks + rank, at = (bin * this.ranks + rank) * KINDS;
          const busy = this.busy[cell] / 255, real = this.prefill[cell] + this.decode[cell];
          const filler = Math.min(1 - busy, this.filler ? this.filler[cell] / 255 : 0);
          if (real > 0) {
            shares[at + PREFILL] += part * busy * this.prefill[cell] / real;
            shares[at + DECODE] += part * busy * this.decode[cell] / real;
          } else {
            shares[at + SERVING] += part * busy;
          }
          shares[at + FILLER] += part * filler;
          shares[at + WAITING] += part * (1 - filler - busy);
          rows[bin * this.ranks + rank] += real / (to - from) / this.perRow;
        }
      }
    }
    return { size, number, first, shares, rows, step: (bin) => (first + (bin + 0.5) * size) * this.perRow - 0.5 };
  }
}

function drawTimeline(steps, bins) {
  const lane = Math.max(2, Math.min(24, Math.floor(420 / steps.ranks))), gap = steps.ranks <= 64 ? 1 : 0;
  const height = lane + gap, z = [], x = [];
  for (let bin = 0; bin < bins.number; bin++) x.push(bins.step(bin));
  const order = [PREFILL, DECODE, SERVING, FILLER, WAITING];
  for (let rank = 0; rank < steps.ranks; rank++) {
    const levels = Array.from({ length: height }, () => new Array(bins.number).fill(null));
    for (let bin = 0; bin < bins.number; bin++) {
      const at = (bin * steps.ranks + rank) * KINDS;
      let top = 0, level = 0;
      for (const kind of order) {
        top += bins.shares[at + kind];
        // Any work at all shows as one line at least, or a short prompt in a long range would be invisible.
        const to = kind === WAITING ? lane : Math.min(lane, Math.max(Math.round(top * lane), bins.shares[at + kind] > 0 ? level + 1 : level));
        while (level < to) levels[lane - 1 - level++][bin] = kind;  // lanes fill from below
      }
    }
    z.push(...levels);
  }
  const kinds = ["waiting", "prefill", "decode", "filler", "serving"];
  const scale = kinds.flatMap((kind, index) => [[index / KINDS, color(kind)], [(index + 1) / KINDS, color(kind)]]);
  const every = Math.ceil(steps.ranks / 32), ticks = [];
  for (let rank = 0; rank < steps.ranks; rank += every) ticks.push(rank);
  const trace = { type: "heatmap", z, x, colorscale: scale, zmin: -0.5, zmax: KINDS - 0.5, showscale: false, hoverinfo: "none" };
  if (bins.number === 1) { trace.x0 = x[0]; trace.dx = bins.size * steps.perRow; delete trace.x; }
  Plotly.react("timeline", [trace], layout({
    height: Math.max(180, Math.min(560, steps.ranks * 48)) + 60, hovermode: "closest",
    xaxis: { title: { text: "step (one forward pass of all ranks)" }, range: view(steps), showgrid: false, zeroline: false },
    yaxis: { tickvals: ticks.map((rank) => rank * height + lane / 2 - 0.5), ticktext: ticks.map((rank) => "rank " + DATA.rank_names[rank]),
      autorange: "reversed", showgrid: false, zeroline: false, fixedrange: true },
  }), CONFIG);
  $("timeline").readout = (event) => {
    const point = event.points[0], bin = point.pointIndex[1], rank = Math.floor(point.pointIndex[0] / height);
    const at = (bin * steps.ranks + rank) * KINDS, from = (bins.first + bin * bins.size) * steps.perRow;
    const to = Math.min((bins.first + (bin + 1) * bins.size) * steps.perRow, DATA.num_steps) - 1;
    $("readout").textContent = `Rank ${DATA.rank_names[rank]}, ${from === to ? "step " + count(from) : "steps " + count(from) + " to " + count(to)}: ` +
      `${percent(bins.shares[at + PREFILL])} prompts, ${percent(bins.shares[at + DECODE])} generating, ` +
      (DATA.has_serving ? `${percent(bins.shares[at + SERVING])} serving others, ` : "") +
      `${percent(bins.shares[at + FILLER])} dummy or padding, ${percent(bins.shares[at + WAITING])} waiting; ` +
      `${bins.rows[bin * steps.ranks + rank].toFixed(1)} rows per step`;
  };
}

function drawRows(steps, bins) {
  const x = [], traces = [];
  for (let bin = 0; bin < bins.number; bin++) x.push(bins.step(bin));
  const line = (name, y, index, dash) => ({ type: "scatter", mode: bins.number > 60 ? "lines" : "lines+markers", name, x, y,
    line: { color: lineColor(index), dash: dash || DASHES[index], width: 1.5, shape: bins.size === 1 ? "hvh" : "linear" },
    hovertemplate: "%{y:.1f} rows<extra>" + name + "</extra>" });
  const of = (rank) => x.map((_, bin) => bins.rows[bin * steps.ranks + rank]);
  if (steps.ranks <= 4 || (steps.ranks <= LIGHT.length && bins.size === 1)) {
    for (let rank = 0; rank < steps.ranks; rank++) traces.push(line("rank " + DATA.rank_names[rank], of(rank), rank));
  } else {
    const ordered = x.map((_, bin) => Array.from(bins.rows.subarray(bin * steps.ranks, (bin + 1) * steps.ranks)).sort((a, b) => a - b));
    traces.push(line("longest rank", ordered.map((values) => values[values.length - 1]), 1, "solid"));
    traces.push(line("middle rank (median)", ordered.map((values) => values[Math.floor(values.length / 2)]), 0, "dash"));
    traces.push(line("shortest rank", ordered.map((values) => values[0]), 2, "dot"));
  }
  Plotly.react("rows", traces, layout({ height: 320, hovermode: "x unified",
    xaxis: { title: { text: "step (one forward pass of all ranks)" }, range: view(steps) },
    yaxis: { title: { text: "rows per step" }, rangemode: "tozero", fixedrange: true } }), CONFIG);
}

let range = null;
function view(steps) { return range || [-0.5, DATA.num_steps - 0.5]; }

function drawView(steps) {
  const [from, to] = view(steps);
  const first = Math.max(0, Math.min(steps.rows - 1, Math.floor((from + 0.5) / steps.perRow)));
  const last = Math.max(first + 1, Math.min(steps.rows, Math.ceil((to + 0.5) / steps.perRow)));
  const bins = steps.bins(first, last, MAX_BINS);
  const grain = bins.size * steps.perRow;
  $("grain").textContent = grain === 1 ? "Each column is one step." :
    `Each column stands for ${count(grain)} steps. Drag over a range to see it in detail, double-click to see all.`;
  drawTimeline(steps, bins);
  drawRows(steps, bins);
}

function drawRanks(steps) {
  const bins = steps.bins(0, steps.rows, 1), names = DATA.rank_names.map((name) => "rank " + name);
  const kinds = [["running prompts", PREFILL, "prefill"], ["generating", DECODE, "decode"],
    ["serving other ranks", SERVING, "serving"], ["dummy or padding", FILLER, "filler"], ["waiting", WAITING, "waiting"]];
  const shown = kinds.filter(([, kind]) => (kind !== FILLER || DATA.has_filler) && (kind !== SERVING || DATA.has_serving));
  const traces = shown.map(([name, kind, shade]) => ({
    type: "bar", orientation: "h", name, y: names, x: names.map((_, rank) => 100 * bins.shares[rank * KINDS + kind]),
    marker: { color: color(shade), line: { width: steps.ranks <= 64 ? 1 : 0, color: color("paper") } },
    hovertemplate: "%{y}: %{x:.1f} % " + name + "<extra></extra>" }));
  Plotly.react("ranks", traces, layout({ height: Math.max(220, Math.min(700, 34 * steps.ranks + 100)), barmode: "stack", bargap: 0.15,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal" },
    xaxis: { title: { text: "share of the rank's time (%)" }, range: [0, 100] }, yaxis: { autorange: "reversed" } }), CONFIG);
}

function drawBars(id, items, unit, shade) {
  if (!$(id)) return;
  // Long names break at the space nearest to their middle.
  const broken = (text) => {
    if (text.length < 26) return text;
    const at = [...text.matchAll(/ /g)].map((match) => match.index)
      .reduce((best, index) => Math.abs(index - text.length / 2) < Math.abs(best - text.length / 2) ? index : best, 0);
    return text.slice(0, at) + "<br>" + text.slice(at + 1);
  };
  Plotly.react(id, [{ type: "bar", orientation: "h", y: items.map((item) => broken(item[0])), x: items.map((item) => item[1]),
    text: items.map((item) => item[1].toFixed(1) + " " + unit), textposition: "outside", cliponaxis: false,
    marker: { color: color(shade) }, hovertemplate: "%{y}: %{x:.2f} " + unit + "<extra></extra>" }],
  layout({ height: 60 * items.length + 90, margin: { l: 10, r: 70, t: 34, b: 45 },
    xaxis: { title: { text: DATA.loss_axis }, rangemode: "tozero" }, yaxis: { autorange: "reversed" } }), CONFIG);
}

function drawKinds(steps) {
  if (!$("kinds")) return;
  const names = DATA.rank_names.map((name) => "rank " + name);
  const traces = DATA.row_kinds.map(([name, shade, values]) => ({ type: "bar", name, x: names, y: values,
    marker: { color: color(shade) }, hovertemplate: "%{x}: %{y:,} " + name + "<extra></extra>" }));
  Plotly.react("kinds", traces, layout({ height: 320, barmode: "stack", yaxis: { title: { text: "rows of the whole run" } } }), CONFIG);
}

function drawLatencies() {
  DATA.latencies.forEach((latency, index) => Plotly.react("latency" + index, latency.curves.map((curve, at) => ({
    type: "scatter", mode: "lines", name: curve.name, x: curve.values, y: curve.shares.map((share) => 100 * share),
    line: { color: lineColor(at), dash: DASHES[at], width: 2, shape: "hv" },
    hovertemplate: "%{y:.1f} % within %{x:.3g} " + latency.unit + "<extra>" + curve.name + "</extra>" })),
  layout({ height: 300, xaxis: { title: { text: latency.axis }, rangemode: "tozero" },
    yaxis: { title: { text: "requests (%)" }, range: [0, 101] } }), CONFIG));
}

function drawSettings() {
  if (!$("settings")) return;
  const groups = [...new Set(DATA.settings.map((item) => item.group))];
  const x = DATA.settings.map((item) => item.x), least = Math.min(...x), span = Math.max(...x) - least || least;
  const height = Math.max(...DATA.settings.map((item) => item.y)) || 1;
  // Where lines lie close together, the lowest of the points with one name bears it for all of them.
  const named = (item) => !DATA.settings.some((other) => other.label === item.label && other.y < item.y &&
    Math.abs(other.x - item.x) < 0.08 * span && item.y - other.y < 0.12 * height);
  Plotly.react("settings", groups.map((group, index) => {
    const items = DATA.settings.filter((item) => item.group === group);
    return { type: "scatter", mode: "lines+markers+text", name: group, x: items.map((item) => item.x), y: items.map((item) => item.y),
      text: items.map((item) => named(item) ? item.label : ""), textposition: "bottom left", cliponaxis: false, customdata: items.map((item) => item.name),
      line: { color: lineColor(index), dash: DASHES[index % 8] }, marker: { size: 9, symbol: index % 8 },
      hovertemplate: "%{customdata}<br>%{y:.1f} % lost, %{x:.3g} s<extra></extra>" };
  }), layout({ height: 420, xaxis: { title: { text: DATA.settings_axes[0] }, range: [least - 0.15 * span, least + 1.05 * span] },
    yaxis: { title: { text: DATA.settings_axes[1] }, rangemode: "tozero" } }), CONFIG);
}

async function main() {
  const arrays = {};
  for (const [name, packed] of Object.entries(DATA.arrays)) arrays[name] = await unpack(packed);
  const steps = new Steps(arrays);
  const drawAll = () => {
    if (steps.rows) { drawView(steps); drawRanks(steps); drawKinds(steps); drawBars("loss", DATA.loss, "%", "decode"); }
    drawLatencies();
    drawSettings();
  };
  drawAll();
  if (steps.rows) {
    $("timeline").on("plotly_hover", (event) => $("timeline").readout(event));
    for (const id of ["timeline", "rows"]) {
      $(id).on("plotly_relayout", (change) => {
        if ("xaxis.range[0]" in change) range = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
        else if (change["xaxis.range"]) range = change["xaxis.range"];
        else if (change["xaxis.autorange"]) range = null;
        else return;
        drawView(steps);
      });
    }
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  PRINT.addEventListener("change", drawAll);
  document.documentElement.dataset.drawn = "yes";
}
main().catch((error) => {
  $("failure").hidden = false;
  $("failure").textContent = "The charts could not be drawn: " + error.message + ". The numbers above are complete.";
});
