// The section of a comparison: for each measure a table of variants, with seeds and intervals on one scale.

const UNITS = {
  fraction: { text: percent, gap: (value) => signed(100 * value, 1) },
  seconds: { text: (value) => `${fmt(value)} s`, gap: (value) => `${signed(value, 1)} s` },
  MB: { text: (value) => `${fmt(value)} MB`, gap: (value) => `${signed(value, 0)} MB` },
  dollars: { text: (value) => `$${value.toFixed(2)}`, gap: (value) => `${signed(value, 2)} $` },
};

/** A difference with its sign, if it does not round to 0. */
function signed(value, digits) {
  const text = Math.abs(value).toFixed(digits);
  return Number(text) === 0 ? text : `${value < 0 ? "−" : "+"}${text}`;
}

function showComparison() {
  const made = data.comparison;
  if (!made) return;
  byId("comparison").hidden = false;
  byId("comparison-link").hidden = false;
  document.querySelector("h1").textContent = "GTR-Turbo comparison";
  const body = byId("comparison-body");
  body.append(
    el("p", {}, `Means over seeds with 95 % intervals (Student's t). Differences are to `, el("strong", {}, visible(made.base)),
      " where a table names no other, paired by seed, with the interval of the paired difference, those of successes in percentage points: an interval that holds 0 is no finding. " +
      "The intervals are not corrected for the number of comparisons."),
    el("ul", { class: "key muted" }, el("li", {}, sample("dot"), "one seed"), el("li", {}, sample("mean"), "mean and interval"), el("li", {}, "★ best mean")),
  );
  if (made.missing.length) {
    body.append(el("div", { class: "notice", role: "note" },
      el("p", {}, made.missing.length === 1 ? "One run is missing from every number:" : `${made.missing.length} runs are missing from every number:`),
      el("ul", {}, ...made.missing.map((text) => el("li", {}, visible(text))))));
  }
  body.append(...made.panels.filter((panel) => panel.main).map(comparisonPanel));
  if (made.target) body.append(targetTable(made.target));
  const more = made.panels.filter((panel) => !panel.main);
  if (more.length) body.append(el("details", {}, el("summary", {}, `${more.length} more measures`), ...more.map(comparisonPanel)));
}

/** A table with a plot in it; rows are variants. */
function comparisonPanel(panel) {
  const unit = UNITS[panel.unit];
  const scale = comparisonScale(panel);
  const gaps = panel.rows.some((row) => row.difference);
  const head = (text, more = {}) => el("th", { scope: "col", ...more }, text);
  const table = el("table", { class: "results compared" },
    el("caption", {}, visible(panel.title), panel.about ? el("span", { class: "muted" }, ` ${plain(panel.about)}`) : null),
    el("thead", {}, el("tr", {}, head("Variant"), head("Mean", { class: "number" }),
      gaps ? head("Difference", { class: "number" }) : null, head(comparisonAxis(scale, unit), { class: "plot" }))));
  const body = el("tbody");
  for (const row of panel.rows) {
    const runs = row.runs === row.planned ? `${row.runs} run${row.runs === 1 ? "" : "s"}` : `${row.runs} of ${row.planned} runs`;
    body.append(el("tr", {},
      el("th", { scope: "row" }, row.group === null ? null : swatch(row.group), " ", visible(row.label), el("br"), small(runs)),
      el("td", { class: "number" }, ...measured(row, unit.text, row.best ? "★ " : "")),
      gaps ? el("td", { class: "number" }, ...gapCell(row.difference, unit)) : null,
      el("td", { class: "plot" }, row.mean === null ? null : comparisonPlot(row, scale, unit))));
  }
  table.append(body);
  return el("div", { class: "scroll panel", tabindex: 0, role: "region", "aria-label": plain(panel.title) }, table);
}

const small = (text) => el("small", { class: "muted" }, text);

/** A paired difference, its interval, and how many pairs it rests on. */
function gapCell(gap, unit) {
  if (!gap) return ["–"];
  if (!gap.above && !gap.below) return ["the same"];
  return [...measured(gap, unit.gap, ""), el("br"), small(`higher in ${gap.above} of ${gap.pairs}`)];
}

/** A mean, and its interval on a second line. */
function measured(row, text, before) {
  if (row.mean === null) return ["–"];
  const interval = row.low === null ? (row.seeds === 1 ? "one seed" : "no spread") : `${text(row.low)} to ${text(row.high)}`;
  return [el("strong", {}, before + text(row.mean)), el("br"), small(interval)];
}

const PLOT = { width: 280, height: 36, side: 26 };

/** The places of values: {x, ticks}, over all seeds and intervals of a panel. */
function comparisonScale(panel) {
  const values = panel.rows.filter((row) => row.mean !== null).flatMap((row) => [row.mean, row.low ?? row.mean, row.high ?? row.mean, ...row.points]);
  let low = Math.min(...values), high = Math.max(...values);
  const least = panel.unit === "fraction" ? 0.1 : 0.1 * Math.max(Math.abs(low), Math.abs(high)) || 1;
  if (high - low < least) [low, high] = [(low + high - least) / 2, (low + high + least) / 2];
  const over = high - 1;
  if (panel.unit === "fraction" && over > 0 && Math.max(...values) <= 1) [low, high] = [low - over, 1]; // no success above 100 %
  const marks = ticks(low, high, panel.unit === "fraction" ? 4 : 3);
  return { marks, x: (value) => PLOT.side + ((value - low) / (high - low)) * (PLOT.width - 2 * PLOT.side) };
}

function comparisonAxis(scale, unit) {
  const svg = el("svg", { width: PLOT.width, height: 16, "aria-hidden": "true" });
  for (const value of scale.marks) svg.append(el("text", { x: scale.x(value), y: 12, class: "tick middle" }, unit.text(value)));
  return el("span", {}, svg, el("span", { class: "visually-hidden" }, "Seeds and interval"));
}

function comparisonPlot(row, scale, unit) {
  const words = `seeds ${row.points.map(unit.text).join(", ")}; mean ${unit.text(row.mean)}${row.low === null ? "" : `, interval ${unit.text(row.low)} to ${unit.text(row.high)}`}`;
  const svg = el("svg", { width: PLOT.width, height: PLOT.height, viewBox: `0 0 ${PLOT.width} ${PLOT.height}`, role: "img", "aria-label": words });
  for (const value of scale.marks) svg.append(el("line", { x1: scale.x(value), x2: scale.x(value), y1: 0, y2: PLOT.height, class: "grid" }));
  const colour = row.group === null ? "var(--text)" : hue(row.group);
  if (row.low !== null) svg.append(el("line", { x1: scale.x(row.low), x2: scale.x(row.high), y1: 25, y2: 25, class: "whisker", style: { stroke: colour } }));
  for (const value of row.points) svg.append(el("circle", { cx: scale.x(value), cy: 10, r: 3.5, class: "seed", style: { stroke: colour } }));
  svg.append(diamond(scale.x(row.mean), 25, colour));
  return svg;
}

const diamond = (x, y, colour) => el("path", { d: `M${x - 5},${y}L${x},${y - 5}L${x + 5},${y}L${x},${y + 5}Z`, style: { fill: colour } });

function sample(kind) {
  const svg = el("svg", { width: 30, height: 12, "aria-hidden": "true" });
  if (kind === "dot") svg.append(el("circle", { cx: 15, cy: 6, r: 3.5, class: "seed", style: { stroke: "var(--muted)" } }));
  else svg.append(el("line", { x1: 2, x2: 28, y1: 6, y2: 6, class: "whisker", style: { stroke: "var(--muted)" } }), diamond(15, 6, "var(--muted)"));
  return svg;
}

function targetTable(target) {
  const table = el("table", { class: "results compared" }, el("caption", {}, `Reaching ${percent(target.success)}`, el("span", { class: "muted" }, ` ${target.about}`)),
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Variant"), el("th", { scope: "col", class: "number" }, "Seeds that reached it"), el("th", { scope: "col", class: "number" }, "Steps, median"))));
  table.append(el("tbody", {}, ...target.rows.map((row) => el("tr", {}, el("th", { scope: "row" }, visible(row.label)),
    el("td", { class: "number" }, `${row.reached} of ${row.seeds}`), el("td", { class: "number" }, row.steps === null ? "–" : row.steps.toLocaleString("en-US"))))));
  return el("div", { class: "scroll panel", tabindex: 0, role: "region", "aria-label": "Reaching the target" }, table);
}
