// Drawing: elements, scales, and the kinds of picture that figures are made of.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function make(parent, tag, attributes = {}, text) {
  const svg = tag === "svg" || parent instanceof SVGElement;
  const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent.appendChild(node);
  return node;
}

const tip = document.getElementById("tip");

function explain(node, text) {
  node.addEventListener("pointermove", (event) => {
    const words = typeof text === "function" ? text(event) : text;
    tip.hidden = !words;
    if (!words) return;
    tip.textContent = words;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.min(event.clientX + 14, innerWidth - box.width - 8) + "px";
    const below = event.clientY + 16;
    tip.style.top = (below + box.height > innerHeight ? event.clientY - box.height - 10 : below) + "px";
  });
  node.addEventListener("pointerleave", () => { tip.hidden = true; });
}

const show = {
  share: (x) => (x === null ? "–" : (100 * x).toFixed(Math.abs(x) < 0.1 && x !== 0 ? 2 : 1) + "%"),
  percent: (x) => (x === null ? "–" : (100 * x).toFixed(0) + "%"),
  number: (x) => (x === null ? "–" : Number(x.toPrecision(3)).toLocaleString("en-US")),
  whole: (x) => (x === null ? "–" : Math.round(x).toLocaleString("en-US")),
  ratio: (x) => (x === null ? "–" : x.toFixed(2)),
};

function panel(parent, model, index) {
  const box = make(parent, "div", { class: "panel" });
  const title = make(box, "b");
  make(title, "i", { class: "dot", style: `background:var(--series-${index})` });
  make(title, "span", {}, model.label);
  return box;
}

const panels = (parent) => make(parent, "div", { class: "panels" });

// A panel for each, all of them there before any is drawn in, since they share the width.
function inPanels(parent, shown) {
  const row = panels(parent);
  return shown.map((one) => ({ ...one, box: panel(row, one.model, one.index) }));
}

// A matrix of layers (down) by heads (across); the scale is shared by all models shown.
function matrices(parent, shown, { format, low, high, name }) {
  const legend = make(parent, "div", { class: "legend" });
  make(legend, "span", {}, format(low));
  if (high > low) {
    make(legend, "i", { class: "ramp", style: "background:linear-gradient(90deg in oklab,var(--low),var(--high))" });
    make(legend, "span", {}, format(high));
  } else make(legend, "span", {}, "everywhere");
  for (const { model, index, values, box } of inPanels(parent, shown)) {
    const heads = model.heads, layers = model.layers, left = 44, top = 18;
    const size = Math.max(16, Math.min(58, (box.clientWidth - left) / heads));
    const tall = Math.max(16, Math.min(30, size));
    const svg = make(box, "svg", { width: left + size * heads, height: top + tall * layers + 2, role: "img" });
    svg.setAttribute("aria-label", `${name}, ${model.label}: a matrix of layers by heads`);
    const some = Math.max(1, Math.ceil(heads / Math.max(1, Math.floor((size * heads) / 46))));
    for (let h = 0; h < heads; h += some)
      make(svg, "text", { x: left + (h + 0.5) * size, y: 12, "text-anchor": "middle" }, h ? h : "head 0");
    for (let l = 0; l < layers; l++) {
      make(svg, "text", { x: left - 6, y: top + (l + 0.5) * tall + 4, "text-anchor": "end" }, l ? l : "layer 0");
      for (let h = 0; h < heads; h++) {
        const value = values[l][h];
        const share = Math.max(0, Math.min(1, (value - low) / (high - low || 1)));
        const cell = make(svg, "rect", {
          x: left + h * size, y: top + l * tall, width: size - 1, height: tall - 1, rx: 2,
          style: `fill:color-mix(in oklab, var(--high) ${(100 * share).toFixed(1)}%, var(--low))`,
        });
        explain(cell, `${model.label}: layer ${l}, head ${h}\n${name}: ${format(value)}`);
        if (size < 40) continue;
        make(svg, "text", {
          x: left + (h + 0.5) * size, y: top + (l + 0.5) * tall + 4, "text-anchor": "middle",
          style: `fill:var(--on-${share > 0.5 ? "high" : "low"});pointer-events:none`,
        }, format(value));
      }
    }
  }
}

function ticks(low, high, log) {
  if (log) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      if (10 ** power >= low * 0.999 && 10 ** power <= high * 1.001) found.push(10 ** power);
    if (found.length > 1) return found;
    return [low, high];
  }
  const rough = (high - low) / 4 || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * unit).find((s) => s >= rough);
  const found = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-6; t += step) found.push(Math.abs(t) < step / 1e6 ? 0 : t);
  return found;
}

let clips = 0;

// Lines over one horizontal axis. Series: {x, y, colour, label, dash, dots, width}.
function lines(parent, series, options) {
  const { xName, yName, xLog, yLog, format = show.number, xFormat = show.number, height = 230, name } = options;
  const width = Math.max(220, parent.clientWidth || 480), left = 52, right = 12, top = 10, bottom = 36;
  const ys = series.flatMap((s) => s.y.filter((v) => v !== null && (!yLog || v > 0)));
  const xs = series.flatMap((s) => s.x);
  const at = (value, low, high, log) => (log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low || 1));
  const [x0, x1] = options.xRange || [Math.min(...xs), Math.max(...xs)];
  let [y0, y1] = options.yRange || [Math.min(...ys), Math.max(...ys)];
  if (y0 === y1) y1 = y0 + 1;
  const px = (v) => left + at(v, x0, x1, xLog) * (width - left - right);
  const py = (v) => height - bottom - at(v, y0, y1, yLog) * (height - top - bottom);
  const svg = make(parent, "svg", { width, height, role: "img", "aria-label": name || yName });
  for (const t of ticks(y0, y1, yLog)) {
    make(svg, "line", { class: "grid", x1: left, x2: width - right, y1: py(t), y2: py(t) });
    make(svg, "text", { x: left - 6, y: py(t) + 4, "text-anchor": "end" }, format(t));
  }
  for (const t of ticks(x0, x1, xLog)) {
    make(svg, "line", { class: "axis", x1: px(t), x2: px(t), y1: height - bottom, y2: height - bottom + 4 });
    make(svg, "text", { x: px(t), y: height - bottom + 16, "text-anchor": "middle" }, xFormat(t));
  }
  make(svg, "line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom });
  make(svg, "text", { class: "name", x: width - right, y: height - 4, "text-anchor": "end" }, xName);
  const clip = `clip${clips++}`;
  const inside = { x: left - 4, y: top - 4, width: width - left - right + 8, height: height - top - bottom + 8 };
  make(make(svg, "clipPath", { id: clip }), "rect", inside);
  const plot = make(svg, "g", { "clip-path": `url(#${clip})` });
  for (const s of series) {
    const points = s.x.map((v, i) => [v, s.y[i]]).filter(([, v]) => v !== null && (!yLog || v > 0));
    const path = points.map(([a, b], i) => `${i ? "L" : "M"}${px(a).toFixed(1)},${py(b).toFixed(1)}`).join("");
    make(plot, "path", {
      d: path, fill: "none", style: `stroke:${s.colour}`, "stroke-width": s.width || 2,
      "stroke-dasharray": s.dash || "none", "stroke-linejoin": "round",
    });
    if (s.dots) for (const [a, b] of points) make(plot, "circle", { cx: px(a), cy: py(b), r: 3, style: `fill:${s.colour}` });
  }
  const hair = make(svg, "line", { class: "axis", y1: top, y2: height - bottom, visibility: "hidden" });
  explain(svg, (event) => {
    const place = event.clientX - svg.getBoundingClientRect().left;
    const near = series[0].x.reduce((best, v) => (Math.abs(px(v) - place) < Math.abs(px(best) - place) ? v : best));
    hair.setAttribute("x1", px(near));
    hair.setAttribute("x2", px(near));
    hair.setAttribute("visibility", "visible");
    const rows = series.filter((s) => s.x.includes(near)).slice(0, 12);
    return [`${xName}: ${xFormat(near)}`, ...rows.map((s) => `${s.label}: ${format(s.y[s.x.indexOf(near)])}`)].join("\n");
  });
  svg.addEventListener("pointerleave", () => hair.setAttribute("visibility", "hidden"));
}

function key(parent, entries) {
  const legend = make(parent, "div", { class: "legend" });
  for (const { colour, label, dash } of entries) {
    const entry = make(legend, "span", { class: "entry" });
    const style = dash ? `height:0;border-radius:0;border-top:2px dashed ${colour}` : `background:${colour}`;
    make(entry, "i", { class: "swatch", style });
    make(entry, "span", {}, label);
  }
}

function bytes(image) {
  return Uint8Array.from(atob(image), (letter) => letter.charCodeAt(0));
}

// The ramp of attention maps as 256 colours; 0 means exactly zero.
function ramp() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => {
    const hex = style.getPropertyValue(name).trim();
    return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  };
  const stops = [0, 1, 2, 3].map((i) => colour(`--map-${i}`));
  const found = [colour("--nothing")];
  for (let level = 1; level < 256; level++) {
    const place = ((level - 1) / 254) * 3, below = Math.min(2, Math.floor(place));
    found.push(stops[below].map((c, i) => c + (stops[below + 1][i] - c) * (place - below)));
  }
  return found;
}

function paint(canvas, image, rows, columns, visible) {
  canvas.width = columns;
  canvas.height = rows;
  const colours = ramp(), levels = bytes(image), context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  for (let i = 0; i < rows * columns; i++) {
    const seen = visible(Math.floor(i / columns), i % columns);
    pixels.data.set([...colours[levels[i]].map(Math.round), seen ? 255 : 0], 4 * i);
  }
  context.putImageData(pixels, 0, 0);
  return levels;
}

function choice(parent, name, options, chosen, change) {
  const group = make(parent, "span", { class: "choice", role: "group", "aria-label": name });
  for (const [value, label] of options) {
    const button = make(group, "button", { type: "button", "aria-pressed": String(value === chosen) }, label);
    button.addEventListener("click", () => change(value));
  }
}
