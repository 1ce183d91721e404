// The figures: each draws itself into its <div> from the data in the page.
"use strict";

const report = JSON.parse(document.getElementById("data").textContent);
const models = report.models;
const numbered = models.map((model, index) => ({ model, index }));
const series = (index) => `var(--series-${index})`;
const chosen = { tile: "64", tiles: "training" };

function shown(name) {
  return models.map((model, index) => ({ model, index, values: model.matrices[name] })).filter((s) => s.values);
}

function matrix(box, name, title, format, range) {
  const found = shown(name), all = found.flatMap((s) => s.values.flat());
  const [low, high] = range || [Math.min(...all), Math.max(...all)];
  matrices(box, found, { format, low, high, name: title });
}

const byLayer = (values) => values.map((_, i) => i);
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
const modelKey = (box) => key(box, models.map((model, i) => ({ colour: series(i), label: model.label })));

// One small panel a layer, a line a head, from near-sighted (light) to far-sighted heads.
function curves(box, pick, options) {
  for (const [index, model] of models.entries()) {
    const found = pick(model);
    if (!found) continue;
    const title = panel(box, model, index);
    key(title, [{ colour: "var(--near)", label: "nearest-sighted head" }, { colour: "var(--far)", label: "farthest-sighted" }]);
    const grid = panels(title);
    grid.style.gridTemplateColumns = "repeat(auto-fill, minmax(14.5rem, 1fr))";
    for (let layer = 0; layer < model.layers; layer++) {
      const cell = make(grid, "div");
      make(cell, "small", { style: "color:var(--soft)" }, `layer ${layer}`);
      const sight = model.matrices.mean_distance[layer];
      const order = sight.map((_, h) => h).sort((a, b) => sight[a] - sight[b]);
      const drawn = found.curves[layer].map((y, head) => {
        const far = (100 * order.indexOf(head)) / Math.max(1, sight.length - 1);
        const colour = `color-mix(in oklab, var(--far) ${far.toFixed(0)}%, var(--near))`;
        return { x: found.at.map((x) => x + 1), y, colour, label: `head ${head}`, width: 1.5 };
      });
      lines(cell, drawn, { xLog: true, xName: "distance + 1, tokens", height: 170, ...options(found), name: `${model.label}, layer ${layer}` });
    }
  }
}

const figures = {
  zeros: (box) => matrix(box, "zeros", "exact zeros", show.percent, [0, 1]),
  silent: (box) => matrix(box, "silent", "queries that attend to nothing", show.share),

  allocation(box) {
    key(box, [
      { colour: "var(--first)", label: "on the first token" },
      { colour: "var(--other)", label: "on other tokens" },
      { colour: "var(--removed)", label: "removed (not attended to anything)" },
    ]);
    for (const { model, box: cell } of inPanels(box, numbered)) {
      const left = 44, wide = Math.max(160, cell.clientWidth - left - 4), tall = 20;
      const svg = make(cell, "svg", { width: left + wide, height: tall * model.layers + 20, role: "img", "aria-label": `allocation of ${model.label}` });
      model.allocation.forEach((parts, layer) => {
        make(svg, "text", { x: left - 6, y: layer * tall + 14, "text-anchor": "end" }, layer ? layer : "layer 0");
        let start = 0;
        parts.forEach((part, i) => {
          const name = ["on the first token", "on other tokens", "removed"][i];
          const bar = make(svg, "rect", {
            x: left + start * wide, y: layer * tall, width: Math.max(0, part * wide - 1), height: tall - 3, rx: 1.5,
            style: `fill:var(--${["first", "other", "removed"][i]})`,
          });
          explain(bar, `${model.label}, layer ${layer}\n${name}: ${show.share(part)}`);
          start += Math.max(0, part);
        });
      });
      for (const t of [0, 0.5, 1])
        make(svg, "text", { x: left + t * wide, y: tall * model.layers + 14, "text-anchor": ["start", "middle", "end"][2 * t] }, show.percent(t));
    }
  },

  sink(box) {
    modelKey(box);
    const drawn = models.map((model, i) => ({
      x: model.sink.by_position.map((_, k) => k), y: model.sink.by_position, colour: series(i), label: model.label, dots: true,
    }));
    const highest = Math.max(0.05, ...drawn.flatMap((s) => s.y));
    lines(box, drawn, { xName: "position k of the token", yName: "share of heads", format: show.share, yRange: [0, highest], name: "sink metric by position" });
  },
  first: (box) => matrix(box, "first_token", "mean weight on the first token", show.share),

  tiles(box) {
    const row = make(box, "div", { class: "controls" });
    const set = (name) => (value) => { chosen[name] = value; redraw("tiles"); };
    choice(row, "what", [["visited", "visited"], ["live", "live"], ["training", "training cost"], ["inference", "inference cost"]], chosen.tiles, set("tiles"));
    choice(row, "tile size", [["64", "64 x 64"], ["128", "128 x 128"]], chosen.tile, set("tile"));
    const cost = chosen.tiles === "training" || chosen.tiles === "inference";
    const name = `${chosen.tiles}_${chosen.tile}`;
    const all = shown(name).flatMap((s) => s.values.flat());
    matrix(box, name, cost ? "products over softmax's" : `${chosen.tiles} tiles`, cost ? show.ratio : show.percent, [0, Math.max(1, ...all)]);
    const more = make(box, "details");
    make(more, "summary", {}, "All of these by head, as a table");
    const table = make(make(more, "div", { class: "scroll" }), "table");
    const head = make(make(table, "thead"), "tr");
    const kinds = ["visited", "live", "inference", "training"], sizes = ["64", "128"];
    for (const text of ["model, layer, head", ...sizes.flatMap((s) => kinds.map((k) => `${k} ${s}`))]) make(head, "th", {}, text);
    const body = make(table, "tbody");
    for (const model of models)
      for (let l = 0; l < model.layers; l++)
        for (let h = 0; h < model.heads; h++) {
          const line = make(body, "tr");
          make(line, "td", {}, `${model.label} ${l}.${h}`);
          for (const s of sizes)
            for (const k of kinds) make(line, "td", {}, (kinds.indexOf(k) < 2 ? show.percent : show.ratio)(model.matrices[`${k}_${s}`][l][h]));
        }
  },

  span: (box) => matrix(box, "span", "span, tokens", show.whole),
  distance(box) {
    curves(box, (m) => ({ at: m.distance.at, curves: m.distance.within }), () => ({ yRange: [0, 1], format: show.percent }));
  },

  offsets(box) {
    const drawn = numbered.filter(({ model }) => model.matrices.offset);
    key(box, drawn.map(({ model, index }) => ({ colour: series(index), label: model.label })));
    const all = drawn.flatMap(({ model }) => model.matrices.offset.flat());
    const layers = Math.max(...drawn.map(({ model }) => model.layers)), low = 1.1 * Math.min(0, ...all), high = 1.1 * Math.max(0, ...all);
    const width = Math.max(240, box.clientWidth), height = 240, left = 52, bottom = 36, top = 10, right = 16;
    const svg = make(box, "svg", { width, height, role: "img", "aria-label": "learned offsets by layer" });
    const px = (layer) => left + ((layer + 0.5) / layers) * (width - left - right);
    const py = (v) => height - bottom - ((v - low) / (high - low || 1)) * (height - top - bottom);
    for (const t of ticks(low, high)) {
      make(svg, "line", { class: "grid", x1: left, x2: width - right, y1: py(t), y2: py(t) });
      make(svg, "text", { x: left - 6, y: py(t) + 4, "text-anchor": "end" }, show.number(t));
    }
    const some = Math.ceil(layers / 24);
    for (let l = 0; l < layers; l += some) make(svg, "text", { x: px(l), y: height - bottom + 16, "text-anchor": "middle" }, l);
    make(svg, "text", { class: "name", x: width - right, y: height - 4, "text-anchor": "end" }, "layer");
    for (const { model, index } of drawn)
      model.matrices.offset.forEach((heads, layer) => {
        const place = px(layer) + (index - (models.length - 1) / 2) * 12;
        heads.forEach((tau, head) => {
          const dot = make(svg, "circle", { cx: place, cy: py(tau), r: 5, style: `fill:${series(index)};fill-opacity:.65` });
          explain(dot, `${model.label}: layer ${layer}, head ${head}\ntau ${tau.toFixed(3)}`);
        });
        const middle = py(mean(heads));
        make(svg, "line", { x1: place - 9, x2: place + 9, y1: middle, y2: middle, style: `stroke:${series(index)}`, "stroke-width": 2 });
      });
  },
  bias: (box) => curves(box, (m) => m.bias, (found) => {
    const all = found.curves.flat(2).sort((a, b) => a - b);
    return { yRange: [Math.max(all[0], -20), all[all.length - 1]], format: show.number };
  }),

  maps(box) {
    const legend = make(box, "div", { class: "legend" });
    make(legend, "i", { class: "swatch", style: "background:var(--nothing)" });
    make(legend, "span", {}, "exactly 0");
    make(legend, "i", { class: "ramp", style: "margin-left:1rem;background:linear-gradient(90deg,var(--map-0),var(--map-1),var(--map-2),var(--map-3));" });
    make(legend, "span", {}, "weight 0 to 1, square root");
    const grid = make(box, "div", { class: "maps", style: `--card:${models.length > 1 ? 26 : 15}rem` });
    const names = [...new Set(models.flatMap((m) => m.maps.map((map) => `${map.layer}.${map.head}`)))];
    for (const name of names) {
      const card = make(grid, "div", { class: "map" });
      const [layer, head] = name.split(".").map(Number);
      make(card, "b", {}, `Layer ${layer}, head ${head}`);
      const both = make(card, "div");
      for (const [index, model] of models.entries()) {
        const map = model.maps.find((m) => m.layer === layer && m.head === head);
        if (!map) continue;
        const side = make(both, "section", { style: "margin:0;min-width:0" });
        const label = make(side, "span");
        make(label, "i", { class: "dot", style: `background:${series(index)}` });
        make(label, "span", {}, `${model.label}, ${show.percent(model.matrices.zeros[layer][head])} zeros`);
        const canvas = make(side, "canvas", { role: "img", "aria-label": `attention map of ${model.label}, layer ${layer}, head ${head}` });
        const levels = paint(canvas, map.image, map.cells, map.cells, (q, k) => k <= q);
        explain(canvas, (event) => {
          const area = canvas.getBoundingClientRect();
          const k = Math.floor(((event.clientX - area.left) / area.width) * map.cells);
          const q = Math.floor(((event.clientY - area.top) / area.height) * map.cells);
          if (k > q || q >= map.cells || k < 0) return "";
          const words = (cell) => model.tokens.slice(cell * map.cell, Math.min(cell * map.cell + Math.min(map.cell, 6), model.length)).join("|");
          const level = levels[q * map.cells + k];
          const weight = level ? show.share(((level - 1) / 254) ** 2) : "exactly 0";
          return `query ${q * map.cell}: ${words(q)}\nkey ${k * map.cell}: ${words(k)}\nlargest weight: ${weight}`;
        });
      }
    }
  },

  entropy: (box) => matrix(box, "entropy", "entropy, nats", show.ratio),

  cosine(box) {
    modelKey(box);
    const drawn = models.map((m, i) => ({ x: byLayer(m.states.cosine), y: m.states.cosine, colour: series(i), label: m.label, dots: true }));
    lines(box, drawn, { xName: "after layer (0: embedding)", yName: "cosine", format: show.ratio, yRange: [Math.min(0, ...drawn.flatMap((s) => s.y)), 1], name: "mean pairwise cosine by layer" });
  },
  massive(box) {
    key(box, models.flatMap((m, i) => [
      { colour: series(i), label: `${m.label}: three largest` },
      { colour: series(i), label: `${m.label}: median`, dash: true },
    ]));
    const drawn = models.flatMap((m, i) => [
      ...[0, 1, 2].map((n) => ({ x: byLayer(m.states.top), y: m.states.top.map((t) => t[n]), colour: series(i), label: `${m.label}, number ${n + 1}`, width: n ? 1 : 2, dots: !n })),
      { x: byLayer(m.states.median), y: m.states.median, colour: series(i), label: `${m.label}, median`, dash: "5 4" },
    ]);
    lines(box, drawn, { xName: "after layer (0: embedding)", yName: "magnitude", yLog: true, name: "largest activations by layer" });
  },

  rollout(box) {
    for (const { model, box: cell } of inPanels(box, numbered)) {
      const { rows, columns, image, largest } = model.rollout;
      const canvas = make(cell, "canvas", { style: "max-width:24rem", role: "img", "aria-label": `attention rollout of ${model.label}` });
      paint(canvas, image, rows, columns, (q, k) => k / columns <= (q + 1) / rows);
      make(cell, "small", { style: "color:var(--soft)" }, `end of the ramp: ${show.percent(largest)} of a token from one cell`);
    }
  },
  rolloutfirst(box) {
    modelKey(box);
    const drawn = models.map((m, i) => ({ x: m.rollout.first.map((_, l) => l + 1), y: m.rollout.first, colour: series(i), label: m.label, dots: true }));
    lines(box, drawn, { xName: "after layer", yName: "share", format: show.share, yRange: [0, Math.max(...drawn.flatMap((s) => s.y))], name: "share of the rollout on the first token" });
  },

  inserted(box) {
    key(box, models.flatMap((m, i) => [
      { colour: series(i), label: `${m.label}: the fixed token at k` },
      { colour: series(i), label: `${m.label}: the text's own token at k`, dash: true },
    ]));
    const drawn = models.flatMap((m, i) => [
      { x: m.inserted.places.map((k) => k + 1), y: m.inserted.weight.map(mean), colour: series(i), label: `${m.label}, fixed token`, dots: true },
      { x: m.inserted.places.map((k) => k + 1), y: m.inserted.before.map(mean), colour: series(i), label: `${m.label}, own token`, dash: "5 4" },
    ]);
    lines(box, drawn, { xName: "position k + 1", yName: "weight", xLog: true, format: show.share, yRange: [0, Math.max(...drawn.flatMap((s) => s.y))], name: "weight on an inserted token" });
  },
};

function redraw(name) {
  const box = document.querySelector(`[data-figure="${name}"]`);
  box.replaceChildren();
  figures[name](box);
  box.dataset.marks = box.querySelectorAll("rect,path,circle,canvas").length;
}

function drawAll() {
  for (const box of document.querySelectorAll("[data-figure]")) redraw(box.dataset.figure);
  document.documentElement.dataset.drawn = document.querySelectorAll("[data-figure]").length;
}

const dark = matchMedia("(prefers-color-scheme: dark)");
let theme = null;
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  document.getElementById("theme").textContent = name === "dark" ? "Light colours" : "Dark colours";
  drawAll();
}
dark.addEventListener("change", () => { if (theme === null) setTheme(dark.matches ? "dark" : "light"); });
document.getElementById("theme").addEventListener("click", () => {
  theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  setTheme(theme);
});
let width = 0;
new ResizeObserver(([main]) => {
  if (Math.abs(main.contentRect.width - width) > 1 && width) drawAll();
  width = main.contentRect.width;
}).observe(document.querySelector("main"));
setTheme(dark.matches ? "dark" : "light");
