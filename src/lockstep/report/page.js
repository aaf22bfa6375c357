"use strict";
// Draws the report from the data in the page, with nothing but SVG and a canvas: a chart library would be a hundred
// times as large as everything else. Counts per step and rank stay in typed arrays; each chart is drawn from at most as
// many bins of the range in view as it has pixels, so that 100,000 steps open fast and zooming shows more detail.
const DATA = JSON.parse(document.getElementById("data").textContent);
const WAITING = 0, PREFILL = 1, DECODE = 2, FILLER = 3, SERVING = 4, KINDS = 5;
const SHADES = ["waiting", "prefill", "decode", "filler", "serving"];
// What ranks did in this run, from the bottom of a lane to its top: kind, name of its colour, words.
const DONE = [PREFILL, DECODE, SERVING, FILLER, WAITING].filter((kind) => SHADES[kind] in DATA.activities)
  .map((kind) => [kind, SHADES[kind], DATA.activities[SHADES[kind]]]);
// Okabe and Ito's colours, which colour-blind people tell apart, and lighter ones of the same hues for a dark page.
const LIGHT = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#8c6d1f", "#666666"];
const DARK = ["#56b4e9", "#f0b429", "#2fc79a", "#ff8a5c", "#9fd4f5", "#e08fbd", "#cbb26a", "#b0b0b0"];
const DASHES = ["", "7 4", "2 3", "7 3 2 3", "12 4", "", "7 4", "2 3"];
const DARK_PAGE = matchMedia("(prefers-color-scheme: dark)"), PRINT = matchMedia("print");
const STEP_AXIS = "step (one forward pass of all ranks)";
const $ = (id) => document.getElementById(id);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const lineColor = (index) => (DARK_PAGE.matches && !PRINT.matches ? DARK : LIGHT)[index % 8];
const percent = (share) => (100 * share).toFixed(share < 0.0995 ? 1 : 0) + " %";
const count = (value) => Math.round(value).toLocaleString("en");
const full = (value) => value.toLocaleString("en", { maximumFractionDigits: 9 });
const short = (value) => Number(value.toPrecision(3)).toLocaleString("en", { maximumFractionDigits: 6 });
const rankName = (rank) => "rank " + rank;

async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.data), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const kind = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array }[packed.type];
  return new kind(await new Response(stream).arrayBuffer());
}

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  Object.assign(made, attributes);
  made.append(...children);
  return made;
}

function shape(parent, name, attributes, text, tooltip) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (tooltip) shape(made, "title", {}, tooltip);
  parent.append(made);
  return made;
}

// Round numbers in a range, about as many as are wanted.
function ticksOf(low, high, wanted, whole) {
  const rough = (high - low) / Math.max(1, wanted), power = 10 ** Math.floor(Math.log10(rough || 1));
  let step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  if (whole) step = Math.max(1, Math.round(step));
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) ticks.push(Number(tick.toPrecision(12)));
  return ticks;
}

// An empty chart in the element: axes, grid and labels; x and y turn values into places.
function frame(id, { height, x, y, left = 56, right = 14, top = 10 }) {
  const holder = $(id), width = Math.max(260, holder.clientWidth), bottom = 44;
  const svg = shape(holder, "svg", { viewBox: `0 0 ${width} ${height}`, width: "100%", role: "img" });
  const place = (range, from, to) => (value) => from + (value - range[0]) / (range[1] - range[0] || 1) * (to - from);
  const chart = { holder, svg, width, height, left, right: width - right, top, bottom: height - bottom };
  chart.x = place(x.range, chart.left, chart.right);
  chart.y = place(y.range, chart.bottom, chart.top);
  chart.value = (at) => x.range[0] + (at - chart.left) / (chart.right - chart.left) * (x.range[1] - x.range[0]);
  for (const tick of ticksOf(...x.range, (chart.right - chart.left) / 80, x.whole)) {
    const at = chart.x(tick);
    shape(svg, "line", { x1: at, x2: at, y1: chart.top, y2: chart.bottom, class: "grid" });
    shape(svg, "text", { x: at, y: chart.bottom + 17, "text-anchor": "middle" }, full(tick));
  }
  shape(svg, "text", { x: (chart.left + chart.right) / 2, y: height - 8, "text-anchor": "middle", class: "axis" }, x.label);
  const marks = y.marks || ticksOf(...y.range, (chart.bottom - chart.top) / 45).map((tick) => [tick, full(tick)]);
  for (const [tick, text] of marks) {
    const at = chart.y(tick);
    if (!y.marks) shape(svg, "line", { x1: chart.left, x2: chart.right, y1: at, y2: at, class: "grid" });
    shape(svg, "text", { x: chart.left - 7, y: at + 4, "text-anchor": "end" }, text);
  }
  if (y.label) {
    const middle = (chart.top + chart.bottom) / 2;
    shape(svg, "text", { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})`, class: "axis" }, y.label);
  }
  return chart;
}

function legend(id, items) {
  $(id).prepend(element("div", { className: "legend" }, ...items.map(([name, paint, dash]) => {
    const svg = shape(document.createDocumentFragment(), "svg", { width: dash === undefined ? 12 : 26, height: 12 });
    if (dash === undefined) shape(svg, "rect", { width: 12, height: 12, fill: paint });
    else shape(svg, "line", { x1: 0, x2: 26, y1: 6, y2: 6, stroke: paint, "stroke-width": 2, "stroke-dasharray": dash });
    return element("span", {}, svg, " " + name);
  })));
}

// Lines over one x axis; pointing at the chart reads all of them there.
function drawLines(id, lines, options, read) {
  const chart = frame(id, options);
  for (const line of lines) {
    let path = "";
    line.x.forEach((x, index) => {
      const at = chart.x(x).toFixed(1), height = chart.y(line.y[index]).toFixed(1);
      if (!index) path = `M${at},${height}`;
      else path += options.steps ? `H${at}V${height}` : `L${at},${height}`;
    });
    shape(chart.svg, "path", { d: path, fill: "none", stroke: line.paint, "stroke-width": 1.8, "stroke-dasharray": line.dash });
    if (line.x.length <= 60 && options.dots)
      line.x.forEach((x, index) => shape(chart.svg, "circle", { cx: chart.x(x), cy: chart.y(line.y[index]), r: 2.5, fill: line.paint }));
  }
  if (lines.length > 1) legend(id, lines.map((line) => [line.name, line.paint, line.dash]));
  const readout = element("div", { className: "readout screen", textContent: "Point at a place in the chart to read it." });
  chart.holder.append(readout);
  onPoint(chart, (at) => { readout.textContent = read(chart.value(at)); });
  return chart;
}

// Where the pointer is, in the chart's own units, whatever size the page gives it.
function onPoint(chart, told) {
  for (const kind of ["pointermove", "pointerdown"]) chart.svg.addEventListener(kind, (event) => {
    const box = chart.svg.getBoundingClientRect(), scale = chart.width / box.width;
    const at = (event.clientX - box.left) * scale, height = (event.clientY - box.top) * scale;
    if (at >= chart.left && at <= chart.right && height >= chart.top && height <= chart.bottom) told(at, height);
  });
}

// Dragging over a range of steps shows it in detail.
function onDrag(chart, chosen) {
  let from = null, box = null;
  chart.svg.classList.add("zooms");
  onPoint(chart, (at) => {
    if (from === null) return;
    box = box || shape(chart.svg, "rect", { y: chart.top, height: chart.bottom - chart.top, class: "chosen" });
    box.setAttribute("x", Math.min(from, at));
    box.setAttribute("width", Math.abs(at - from));
    box.to = at;
  });
  chart.svg.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "mouse") return;  // a finger scrolls the page
    const view = chart.svg.getBoundingClientRect();
    from = (event.clientX - view.left) * chart.width / view.width;
    event.preventDefault();
  });
  addEventListener("pointerup", () => {
    if (from !== null && box && Math.abs(box.to - from) > 5) chosen([from, box.to].sort((a, b) => a - b).map(chart.value));
    else if (box) box.remove();
    from = box = null;
  }, { signal: chart.holder.listening.signal });
  chart.svg.addEventListener("dblclick", () => chosen(null));
}

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
    return { size, number, first, last, shares, rows };
  }
}

let range = null;  // the steps in view, all where null
const edge = (steps, bins, bin) => Math.min(bins.first + bin * bins.size, bins.last) * steps.perRow - 0.5;
const binAt = (steps, bins, step) => Math.max(0, Math.min(bins.number - 1, Math.floor(((step + 0.5) / steps.perRow - bins.first) / bins.size)));

function stepsOf(steps, bins, bin) {
  const from = (bins.first + bin * bins.size) * steps.perRow;
  const to = Math.min((bins.first + (bin + 1) * bins.size) * steps.perRow, DATA.num_steps) - 1;
  return from === to ? "step " + count(from) : `steps ${count(from)} to ${count(to)}`;
}

function drawTimeline(steps, bins, view, zoom) {
  const every = Math.ceil(steps.ranks / 32), marks = [];
  for (let rank = 0; rank < steps.ranks; rank += every) marks.push([rank + 0.5, rankName(rank)]);
  const height = Math.max(130, Math.min(560, steps.ranks * 44)) + 54;
  const chart = frame("timeline", { height, left: 66, x: { range: view, label: STEP_AXIS, whole: true },
    y: { range: [steps.ranks, 0], marks } });
  const ratio = devicePixelRatio || 1, wide = chart.right - chart.left, high = chart.bottom - chart.top;
  const canvas = element("canvas", { width: Math.round(wide * ratio), height: Math.round(high * ratio) });
  const picture = canvas.getContext("2d"), paint = SHADES.map(color), lane = canvas.height / steps.ranks;
  const gap = lane > 8 * ratio ? ratio : 0;
  for (let bin = 0; bin < bins.number; bin++) {
    const left = Math.floor((chart.x(edge(steps, bins, bin)) - chart.left) * ratio);
    const right = Math.ceil((chart.x(edge(steps, bins, bin + 1)) - chart.left) * ratio);
    for (let rank = 0; rank < steps.ranks; rank++) {
      const at = (bin * steps.ranks + rank) * KINDS;
      picture.fillStyle = paint[WAITING];
      picture.fillRect(left, rank * lane, right - left, lane - gap);
      let bottom = (rank + 1) * lane - gap;  // lanes fill from below
      for (const kind of [PREFILL, DECODE, SERVING, FILLER]) {
        const share = bins.shares[at + kind];
        if (share <= 0) continue;
        // Any work at all shows as one line at least, or a short prompt in a long range would be invisible.
        const tall = Math.min(Math.max(share * (lane - gap), ratio), bottom - rank * lane);
        picture.fillStyle = paint[kind];
        picture.fillRect(left, bottom - tall, right - left, tall);
        bottom -= tall;
      }
    }
  }
  shape(chart.svg, "image", { x: chart.left, y: chart.top, width: wide, height: high, href: canvas.toDataURL(), preserveAspectRatio: "none" });
  onPoint(chart, (place, depth) => {
    const rank = Math.min(steps.ranks - 1, Math.floor((depth - chart.top) / high * steps.ranks));
    const bin = binAt(steps, bins, chart.value(place)), at = (bin * steps.ranks + rank) * KINDS;
    $("readout").textContent = `${rankName(rank)}, ${stepsOf(steps, bins, bin)}: ` +
      DONE.map(([kind, , words]) => `${percent(bins.shares[at + kind])} ${words}`).join(", ") +
      `; ${bins.rows[bin * steps.ranks + rank].toFixed(1)} rows per step`;
  });
  legend("timeline", DONE.map(([, shade, words]) => [words, color(shade)]));
  onDrag(chart, zoom);
}

function drawRows(steps, bins, view, zoom) {
  const x = [], lines = [];
  for (let bin = 0; bin < bins.number; bin++) x.push((edge(steps, bins, bin) + edge(steps, bins, bin + 1)) / 2);
  const line = (name, y, index, dash) => lines.push({ name, x, y, paint: lineColor(index), dash: DASHES[dash] });
  if (steps.ranks <= 4 || (steps.ranks <= LIGHT.length && bins.size === 1)) {
    for (let rank = 0; rank < steps.ranks; rank++) line(rankName(rank), x.map((_, bin) => bins.rows[bin * steps.ranks + rank]), rank, rank);
  } else {
    const ordered = x.map((_, bin) => bins.rows.slice(bin * steps.ranks, (bin + 1) * steps.ranks).sort());
    line("longest rank", ordered.map((values) => values[values.length - 1]), 1, 0);
    line("middle rank (median)", ordered.map((values) => values[Math.floor(values.length / 2)]), 0, 1);
    line("shortest rank", ordered.map((values) => values[0]), 2, 2);
  }
  const most = Math.max(1, ...lines.map((each) => each.y.reduce((a, b) => Math.max(a, b), 0)));
  const chart = drawLines("rows", lines, { height: 300, left: 66, dots: true, x: { range: view, label: STEP_AXIS, whole: true },
    y: { range: [0, 1.05 * most], label: "rows per step" } }, (step) => {
    const bin = binAt(steps, bins, step);
    return `${stepsOf(steps, bins, bin)}: ` + lines.map((each) => `${each.name} ${each.y[bin].toFixed(1)}`).join(", ") + " rows per step";
  });
  onDrag(chart, zoom);
}

function drawView(steps) {
  const view = range || [-0.5, DATA.num_steps - 0.5];
  const first = Math.max(0, Math.min(steps.rows - 1, Math.floor((view[0] + 0.5) / steps.perRow)));
  const last = Math.max(first + 1, Math.min(steps.rows, Math.ceil((view[1] + 0.5) / steps.perRow)));
  const bins = steps.bins(first, last, Math.max(100, Math.min(900, $("timeline").clientWidth - 80)));
  const grain = bins.size * steps.perRow;
  const zoom = (chosen) => { range = chosen; drawView(steps); };
  clear("timeline", "rows");
  $("grain").textContent = (grain === 1 ? "Each column is one step." : `Each column stands for ${count(grain)} steps.`) +
    (range ? " Double-click to see all." : " Drag over a range to see it in detail.");
  drawTimeline(steps, bins, view, zoom);
  drawRows(steps, bins, view, zoom);
}

// Bars of several parts, one per rank; `parts` are [name, shade, values].
function drawStack(id, parts, label, most, told) {
  if (!$(id)) return;
  const ranks = DATA.num_ranks, every = Math.ceil(ranks / 32), marks = [];
  for (let rank = 0; rank < ranks; rank += every) marks.push([rank + 0.5, rankName(rank)]);
  const chart = frame(id, { height: Math.max(60, Math.min(640, 32 * ranks)) + 54, left: 66,
    x: { range: [0, most], label }, y: { range: [ranks, 0], marks } });
  const tall = (chart.bottom - chart.top) / ranks;
  for (let rank = 0; rank < ranks; rank++) {
    let from = 0;
    for (const [name, shade, values] of parts) {
      const left = chart.x(from), right = chart.x(from += values[rank]);
      if (right > left) shape(chart.svg, "rect", { x: left, width: right - left, y: chart.top + (rank + 0.08) * tall,
        height: 0.84 * tall, fill: color(shade) }, undefined, `${rankName(rank)}: ${told(values[rank])} ${name}`);
    }
  }
  legend(id, parts.map(([name, shade]) => [name, color(shade)]));
}

function drawRanks(steps) {
  const bins = steps.bins(0, steps.rows, 1);
  const parts = DONE.map(([kind, shade, words]) =>
    [words, shade, Array.from({ length: steps.ranks }, (_, rank) => 100 * bins.shares[rank * KINDS + kind])]);
  drawStack("ranks", parts, "share of the rank's time (%)", 100, (value) => value.toFixed(1) + " %");
  const most = Math.max(1, ...parts[0][2].map((_, rank) => DATA.row_kinds.reduce((sum, kind) => sum + kind[2][rank], 0)));
  drawStack("kinds", DATA.row_kinds.filter((kind) => kind[2].some(Boolean)), "rows of the whole run", most, count);
}

function drawLoss() {
  const most = Math.max(...DATA.loss.map((item) => item[1]), 1e-9);
  for (const [name, value] of DATA.loss) {
    const bar = element("div", { className: "bar" });
    bar.style.width = 100 * value / most + "%";
    $("loss").append(element("div", { className: "cause" }, element("span", { textContent: name }),
      element("b", { textContent: value.toFixed(1) + " %" }), bar));
  }
}

function drawLatency(latency, index) {
  const lines = latency.curves.map((curve, at) => ({ name: curve.name, x: [0, ...curve.values], y: [0, ...curve.shares.map((share) => 100 * share)],
    paint: lineColor(at), dash: DASHES[at] }));
  const most = Math.max(...lines.flatMap((line) => line.x), 1e-9);
  drawLines("latency" + index, lines, { height: 280, steps: true, x: { range: [0, most], label: latency.unit === "s" ? "seconds" : latency.unit },
    y: { range: [0, 101], label: "requests (%)" } }, (value) => `within ${short(value)} ${latency.unit}: ` +
      lines.map((line) => `${line.y[line.x.filter((x) => x <= value).length - 1].toFixed(1)} % ${line.name}`).join(", "));
}

// A heat map: a row per MoE layer, a column per expert, from none to four times the layer's mean or more.
function drawExperts(overMean) {
  const experts = DATA.num_experts, layers = overMean.length / experts, most = 4;
  const chart = frame("experts", { height: Math.max(64, Math.min(480, 14 * layers)) + 54, x: { range: [-0.5, experts - 0.5], label: "expert", whole: true },
    y: { range: [layers - 0.5, -0.5], label: "MoE layer", marks: ticksOf(0, layers - 1, Math.min(layers, 12), true).map((layer) => [layer, layer]) } });
  const canvas = element("canvas", { width: experts, height: layers }), picture = canvas.getContext("2d");
  overMean.forEach((value, cell) => {
    picture.globalAlpha = 1;
    picture.fillStyle = color("panel");
    picture.fillRect(cell % experts, Math.floor(cell / experts), 1, 1);
    picture.globalAlpha = Math.min(1, value / most);
    picture.fillStyle = color("bad");
    picture.fillRect(cell % experts, Math.floor(cell / experts), 1, 1);
  });
  shape(chart.svg, "image", { x: chart.left, y: chart.top, width: chart.right - chart.left, height: chart.bottom - chart.top,
    href: canvas.toDataURL(), preserveAspectRatio: "none", style: "image-rendering: pixelated" });
  const bar = element("span", { className: "scale" });
  const readout = element("div", { className: "readout screen", textContent: "Point at a place in the chart to read it." });
  chart.holder.prepend(element("div", { className: "legend" }, element("span", {}, "no rows ", bar, " 4 times the mean or more")));
  chart.holder.append(readout);
  onPoint(chart, (at, depth) => {
    const expert = Math.min(experts - 1, Math.round(chart.value(at)));
    const layer = Math.min(layers - 1, Math.floor((depth - chart.top) / (chart.bottom - chart.top) * layers));
    readout.textContent = `expert ${expert} of MoE layer ${layer}: ${short(overMean[layer * experts + expert])} times the mean of its layer`;
  });
}

function drawSettings() {
  const all = DATA.settings, groups = [...new Set(all.map((item) => item.group))];
  const x = all.map((item) => item.x), least = Math.min(...x), span = Math.max(...x) - least || least || 1;
  const height = Math.max(...all.map((item) => item.y)) || 1;
  const label = 68, wide = Math.max(100, $("settings").clientWidth - 90 - label);  // pixels of a label, and of all points
  const chart = frame("settings", { height: 400, x: { range: [least - label / wide * span, least + 1.05 * span], label: DATA.settings_axes[0] },
    y: { range: [0, 1.08 * height], label: DATA.settings_axes[1] } });
  const places = new Map();  // the settings at each place, the least lost time first: points at one place share a label
  for (const item of [...all].sort((one, other) => one.y - other.y)) {
    const place = `${Math.round(chart.x(item.x))},${Math.round(chart.y(item.y))}`;
    places.set(place, [...(places.get(place) || []), item]);
  }
  groups.forEach((group, index) => {
    const items = all.filter((item) => item.group === group), paint = lineColor(index);
    const points = items.map((item) => `${chart.x(item.x)},${chart.y(item.y)}`).join(" ");
    shape(chart.svg, "polyline", { points, fill: "none", stroke: paint, "stroke-width": 1.8, "stroke-dasharray": DASHES[index % 8] });
    for (const item of items) shape(chart.svg, "circle", { cx: chart.x(item.x), cy: chart.y(item.y), r: 5, fill: paint });
  });
  // A label is below or above its point, to the left or to the right, where nothing else is; otherwise it is left out.
  const taken = all.map((item) => [chart.x(item.x) - 5, chart.y(item.y) - 5, chart.x(item.x) + 5, chart.y(item.y) + 5]);
  for (const items of places.values()) {
    const x = chart.x(items[0].x), y = chart.y(items[0].y), kind = items[0].label.replace(/\S*$/, "");
    const text = kind + [...new Set(items.map((item) => item.label.replace(kind, "")))].join(", ");  // delay 0, 10, 30
    shape(chart.svg, "circle", { cx: x, cy: y, r: 7, fill: "transparent" }, undefined,
      items.map((item) => `${item.name}: ${item.y.toFixed(1)} % lost, ${short(item.x)} s`).join("\n"));
    for (const [side, below] of [[-1, 16], [1, 16], [-1, -8], [1, -8]]) {
      const start = side < 0 ? x - 7 - 7 * text.length : x + 9, box = [start, y + below - 11, start + 7 * text.length, y + below + 3];
      if (box[0] < chart.left || box[2] > chart.width || box[3] > chart.bottom) continue;
      if (taken.some((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3])) continue;
      taken.push(box);
      shape(chart.svg, "text", { x: side < 0 ? x - 7 : x + 9, y: y + below, "text-anchor": side < 0 ? "end" : "start" }, text);
      break;
    }
  }
  if (groups.length > 1) legend("settings", groups.map((group, index) => [group, lineColor(index), DASHES[index % 8]]));
}

function clear(...ids) {
  for (const holder of ids.map($).filter(Boolean)) {
    if (holder.listening) holder.listening.abort();
    holder.listening = new AbortController();
    holder.replaceChildren();
  }
}

async function main() {
  const arrays = {};
  for (const [name, packed] of Object.entries(DATA.arrays)) arrays[name] = await unpack(packed);
  const steps = new Steps(arrays);
  const drawAll = () => {
    clear("ranks", "kinds", "loss", "experts", "settings", ...DATA.latencies.map((_, index) => "latency" + index));
    if (steps.rows) { drawView(steps); drawRanks(steps); drawLoss(); }
    if (steps.experts) drawExperts(steps.experts);
    DATA.latencies.forEach(drawLatency);
    if (DATA.settings.length) drawSettings();
  };
  drawAll();
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawAll(); } });
  for (const media of [DARK_PAGE, PRINT]) media.addEventListener("change", drawAll);
  document.documentElement.dataset.drawn = "yes";
}
main().catch((error) => {
  $("failure").hidden = false;
  $("failure").textContent = "The charts could not be drawn: " + error.message + ". The numbers above are complete.";
});
