// One chart: an SVG drawn at the size it is shown, with a cursor, a readout, and its data as a table.

const MARGIN = { top: 8, right: 10, bottom: 24, left: 44 };

/** About `count` round numbers covering [low, high]. */
function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((size) => size >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9), more = Math.floor(high / step + 1e-9) - first;
  const found = [];
  for (let n = 0; n <= more; n++) found.push(Number(((first + n) * step).toPrecision(12))); // first + 1 may be first
  return found;
}

/** Lines of a metric, and of the one it is shown with: {group, run, thin, part, x, y, low, high}; mean lines of groups have low, high, and their runs' count. */
function linesOf(metric, axis) {
  const pair = own(data.curves.pairs, metric);
  return pair ? pair.flatMap(([name, part]) => linesOfOne(name, axis, part)) : linesOfOne(metric, axis, "");
}

function linesOfOne(metric, axis, part) {
  const lines = [];
  data.curves.groups.forEach((group, g) => {
    const band = own(group.bands, metric);
    const having = group.runs.map((run) => [run, data.curves.runs[run]]).filter(([, columns]) => own(columns.metrics, metric));
    const smooth = having.map(([, columns]) => smoothed(columns.updates, columns.metrics[metric], curves.over));
    having.forEach(([run, columns], i) => lines.push({ group: g, run, part, thin: Boolean(band), ...points(columns[axis], smooth[i]) }));
    if (!band) return;
    const { mean, low, high } = curves.over > 1 || curves.band === "interval" ? bandOf(band.steps, having.map(([, columns]) => columns.steps), smooth) : band;
    lines.push({ group: g, run: null, part, thin: false, count: having.length, ...points(band[axis], mean, low, high) });
  });
  return lines.filter((line) => line.x.length);
}

/** Each value as the mean of those logged in the last `over` updates, its own among them. */
function smoothed(updates, ys, over) {
  if (over === 1) return ys;
  let from = 0;
  return ys.map((y, i) => {
    if (y === null) return null;
    while (updates[from] <= updates[i] - over) from++;
    const near = ys.slice(from, i + 1).filter((value) => value !== null);
    return near.reduce((sum, value) => sum + value, 0) / near.length;
  });
}

/** What the band of `count` runs shows. */
const bandName = (count) => (curves.band === "interval" && own(data.curves.quantiles, count) ? "95 % interval of the mean (Student's t)" : "lowest to highest seed");

/** Mean of several runs at `places`, where all of them have a value, and the ends of the band. */
function bandOf(places, steps, ys) {
  const tables = steps.map((column, run) => new Map(column.map((step, i) => [step, ys[run][i]])));
  const found = places.map((step) => tables.map((table) => table.get(step)).filter((value) => value !== undefined && value !== null));
  const mean = found.map((values) => values.reduce((sum, value) => sum + value, 0) / values.length);
  const quantile = curves.band === "interval" && own(data.curves.quantiles, ys.length);
  if (quantile) {
    const half = found.map((values, i) => {
      const squares = values.reduce((sum, value) => sum + (value - mean[i]) ** 2, 0);
      return quantile * Math.sqrt(squares / (values.length - 1) / values.length);
    });
    return { mean, low: mean.map((value, i) => value - half[i]), high: mean.map((value, i) => value + half[i]) };
  }
  return {
    mean,
    low: found.map((values) => Math.min(...values)),
    high: found.map((values) => Math.max(...values)),
  };
}

/** What a line is of: its group, and which of a pair. */
const lineName = (line) => plain(data.curves.groups[line.group].label) + (line.part ? `, ${line.part}` : "");

function points(xs, ys, low, high) {
  const line = { x: [], y: [], low: low && [], high: high && [] };
  xs.forEach((x, i) => {
    if (x === null || ys[i] === null) return;
    line.x.push(x);
    line.y.push(ys[i]);
    if (low) line.low.push(low[i]), line.high.push(high[i]);
  });
  return line;
}

/** Index of the value nearest to x in ascending xs. */
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle;
    else high = middle;
  }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
}

function extent(lines) {
  let low = Infinity, high = -Infinity;
  for (const line of lines) {
    for (const y of line.low || line.y) low = Math.min(low, y);
    for (const y of line.high || line.y) high = Math.max(high, y);
  }
  if (low >= 0 && low < 0.6 * high) low = 0; // far from zero, the axis need not show it
  if (high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high))) { // alike, but for rounding
    const around = Math.abs(low) * 0.1 || 1;
    return [low - around, high + around];
  }
  const room = (high - low) * 0.05;
  return [low === 0 ? 0 : low - room, high + room];
}

/** A tick's label, in the unit that suits the largest of its axis. */
function short(value, most) {
  if (value === 0) return "0";
  if (most >= 1e6) return `${+(value / 1e6).toPrecision(9)}M`;
  if (most >= 1e4) return `${+(value / 1e3).toPrecision(9)}k`;
  return (most < 0.001 ? fmt(value) : String(value)).replace("-", "−");
}

function clock(seconds) {
  if (seconds >= 3600) return `${+(seconds / 3600).toFixed(2)} h`;
  if (seconds >= 60) return `${+(seconds / 60).toFixed(1)} min`;
  return `${+seconds.toFixed(0)} s`;
}

/** Round times: ticks in the unit that they are shown in. */
function timeTicks(low, high, count) {
  const unit = high >= 7200 ? 3600 : high >= 120 ? 60 : 1;
  return ticks(low / unit, high / unit, count).map((n) => n * unit);
}

/** A chart as {figure, draw(axis), point(x)}; `onmove(x, byKey)` is told where the cursor is, null for nowhere. */
function makeChart(metric, onmove) {
  const [title, unit] = own(data.curves.titles, metric) || [metric, ""];
  const svg = el("svg", { class: "chart", tabindex: 0, role: "img" });
  const readout = el("div", { class: "readout" });
  const body = el("div", { class: "table-body" });
  const details = el("details", { class: "data", ontoggle: () => {
    body.replaceChildren(details.open ? dataTable(title, state) : "");
  } }, el("summary", {}, "Table"), body);
  const figure = el("figure", { "data-metric": metric },
    el("figcaption", { title: metric }, el("h3", {}, title), el("span", { class: "muted" }, unit || metric), unit ? el("code", { class: "muted name" }, metric) : null),
    readout, svg, details);
  const state = { lines: [], axis: "steps", cursor: null, x: null, at: null, tall: 0 };

  const base = () => state.lines.find((line) => !line.thin) || state.lines[0];
  const move = (event) => {
    if (!state.x) return;
    const box = svg.getBoundingClientRect();
    onmove(state.x.invert(event.clientX - box.left), false);
  };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerdown", move);
  svg.addEventListener("pointerleave", () => onmove(null, false));
  svg.addEventListener("blur", () => onmove(null, false));
  svg.addEventListener("keydown", (event) => {
    const xs = base() ? base().x : [];
    if (!xs.length) return;
    const now = state.at === null ? xs.length : nearest(xs, state.at); // from nowhere, left is the last point
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: xs.length - 1, PageUp: now - 10, PageDown: now + 10 }[event.key];
    if (event.key === "Escape") onmove(null, true);
    else if (to !== undefined) onmove(xs[Math.max(0, Math.min(xs.length - 1, to))], true);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  return {
    figure,
    metric,
    draw(axis) {
      state.axis = axis;
      state.lines = linesOf(metric, axis);
      state.tall = 0;
      readout.style.removeProperty("min-height");
      drawChart(svg, state, title, unit);
      this.point(null);
      if (details.open) body.replaceChildren(dataTable(title, state));
    },
    point(x) {
      state.at = x;
      if (!state.x) return;
      const line = base();
      const place = x === null || !line ? null : line.x[nearest(line.x, x)];
      state.cursor.setAttribute("visibility", place === null ? "hidden" : "visible");
      if (place !== null) {
        state.cursor.setAttribute("x1", state.x(place));
        state.cursor.setAttribute("x2", state.x(place));
      }
      readout.replaceChildren(...readings(state, place));
      const height = readout.offsetHeight; // it never shrinks, or the chart would move under the pointer
      if (height > state.tall) readout.style.setProperty("min-height", `${(state.tall = height)}px`);
    },
    words: () => `${title}. ${readout.textContent}`,
  };
}

/** Whether x lies beyond a line's last point, by more than a step of that line. */
function ended(line, x) {
  const end = line.x.length - 1;
  return x !== null && x - line.x[end] > (end ? line.x[end] - line.x[end - 1] : 0);
}

/** What the lines say at x, or at their ends for null. */
function readings(state, x) {
  const shown = state.lines.filter((line) => !line.thin);
  if (!shown.length) return ["not logged by these runs"];
  const where = x === null ? "last" : state.axis === "steps" ? `${x.toLocaleString("en-US")} steps` : clock(x);
  return [
    el("span", { class: "muted" }, `${where}: `),
    ...shown.map((line) => {
      const i = x === null ? line.x.length - 1 : nearest(line.x, x);
      const range = line.low ? ` (${fmt(line.low[i])} to ${fmt(line.high[i])})` : "";
      const name = data.curves.groups.length > 1 ? el("span", { class: "visually-hidden" }, ` ${lineName(line)}: `) : null;
      return el("span", { class: "reading" }, swatch(line.group), name, line.part ? `${line.part} ` : null, ended(line, x) ? el("span", { class: "muted" }, "ended") : el("strong", {}, fmt(line.y[i])), ended(line, x) ? null : range);
    }),
  ];
}

function drawChart(svg, state, title, unit) {
  const width = Math.max(200, Math.round(svg.clientWidth || 320)), height = Math.round(svg.clientHeight || 170);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren(el("title", {}, title));
  state.x = null;
  if (!state.lines.length) return;
  const right = width - MARGIN.right, bottom = height - MARGIN.bottom;
  const drawn = data.curves.groups.length > MOST_THIN ? state.lines.filter((line) => !line.thin) : state.lines;
  const last = Math.max(...drawn.map((line) => line.x[line.x.length - 1]));
  const first = Math.min(0, ...drawn.map((line) => line.x[0]));
  const [low, high] = extent(drawn);
  const scale = (from, to, a, b) => {
    const f = (v) => a + ((v - from) / (to - from || 1)) * (b - a);
    f.invert = (p) => from + ((p - a) / (b - a)) * (to - from);
    return f;
  };
  const x = scale(first, last, MARGIN.left, right), y = scale(low, high, bottom, MARGIN.top);
  state.x = x;
  const marks = (state.axis === "seconds" ? timeTicks : ticks)(first, last, width / 90);
  const heights = ticks(low, high, 4), most = Math.max(...heights.map(Math.abs));
  for (const value of heights) {
    svg.append(
      el("line", { x1: MARGIN.left, x2: right, y1: y(value), y2: y(value), class: "grid" }),
      el("text", { x: MARGIN.left - 6, y: y(value) + 4, class: "tick end" }, short(value, most)),
    );
  }
  for (const value of marks) {
    svg.append(el("text", { x: x(value), y: bottom + 17, class: x(value) > right - 20 ? "tick end" : "tick middle" }, state.axis === "seconds" ? clock(value) : short(value, last)));
  }
  for (const line of drawn) drawLine(svg, line, x, y);
  state.cursor = el("line", { y1: MARGIN.top, y2: bottom, class: "cursor", visibility: "hidden" });
  svg.append(state.cursor);
  const told = state.lines.filter((line) => !line.thin).map((line) => {
    return `${lineName(line)}: from ${fmt(line.y[0])} to ${fmt(line.y[line.y.length - 1])}`;
  });
  const words = `${title}${unit ? `, ${unit}` : ""}, over ${state.axis === "steps" ? "environment steps" : "wall time"}. ${told.join("; ")}. Left and right arrow keys read values.`;
  svg.append(el("desc", {}, words));
  svg.setAttribute("aria-label", words);
}

function drawLine(svg, line, x, y) {
  const path = (ys) => line.x.map((v, i) => `${i ? "L" : "M"}${x(v).toFixed(1)},${y(ys[i]).toFixed(1)}`).join("");
  if (line.low) {
    const back = line.x.map((v, i) => `L${x(v).toFixed(1)},${y(line.high[i]).toFixed(1)}`).reverse().join("");
    const area = el("path", { d: `${path(line.low)}${back}Z`, class: "band" });
    area.style.setProperty("fill", hue(line.group));
    svg.append(area);
  }
  const stroke = el("path", { d: path(line.y), class: line.thin ? "line thin" : "line", "stroke-dasharray": line.part === "merge" ? "1 4" : line.thin ? "" : dash(line.group) });
  stroke.style.setProperty("stroke", hue(line.group));
  svg.append(stroke);
  if (line.x.length === 1) {
    const dot = el("circle", { cx: x(line.x[0]), cy: y(line.y[0]), r: 3 });
    dot.style.setProperty("fill", hue(line.group));
    svg.append(dot);
  }
}

/** The chart's numbers: a row for each place on the axis, a column for each run and each mean. */
function dataTable(title, state) {
  const heads = state.lines.map((line) => (line.run === null ? `${data.curves.groups[line.group].label} (mean; ${bandName(line.count)})` : data.runs[line.run].label) + (line.part ? `, ${line.part}` : ""));
  const rows = new Map();
  state.lines.forEach((line, column) => line.x.forEach((x, i) => {
    if (!rows.has(x)) rows.set(x, []);
    rows.get(x)[column] = line.low ? `${fmt(line.y[i])}; ${fmt(line.low[i])} to ${fmt(line.high[i])}` : fmt(line.y[i]);
  }));
  const table = el("table", {}, el("caption", { class: "visually-hidden" }, title),
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, state.axis === "steps" ? "Steps" : "Time"), ...heads.map((head) => el("th", { scope: "col" }, visible(head))))));
  const body = el("tbody");
  for (const x of [...rows.keys()].sort((a, b) => a - b)) {
    const cells = rows.get(x);
    body.append(el("tr", {}, el("th", { scope: "row" }, state.axis === "steps" ? x.toLocaleString("en-US") : clock(x)), ...heads.map((_, i) => el("td", {}, cells[i] || ""))));
  }
  table.append(body);
  return el("div", { class: "scroll tall", tabindex: 0, role: "region", "aria-label": `Data of ${title}` }, table);
}
