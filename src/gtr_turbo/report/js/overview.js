// The top of the page: what this is, facts, the table of results, notices; and the settings.

function showOverview() {
  const count = data.runs.length;
  byId("what").append(
    `${count === 1 ? "One training run" : `${count} training runs`} of a vision-language agent by multi-turn RL. ` +
      "Everything is in this file; it loads nothing.",
  );
  byId("footer").append(`Made ${data.made} by gtr-turbo ${data.version}. What agents wrote is shown as text, never interpreted.`);
  byId("facts").append(
    fact("Runs", data.curves.groups.map((group) => (group.runs.length > 1 ? `${group.label} (${group.runs.length} seeds)` : group.label))),
    ...data.facts.map(([what, values]) => fact(what, values)),
  );
  byId("results-table").append(resultsTable());
  if (data.warnings.length) {
    byId("notices").append(
      el("div", { class: "notice", role: "note" },
        el("p", {}, data.warnings.length === 1 ? "One thing is missing or was skipped:" : `${data.warnings.length} things are missing or were skipped:`),
        el("ul", {}, ...data.warnings.slice(0, 20).map((text) => el("li", {}, visible(text)))),
        data.warnings.length > 20 ? el("p", {}, `and ${data.warnings.length - 20} more`) : null,
      ),
    );
  }
  showSettings();
}

function fact(what, values) {
  return el("div", {}, el("dt", {}, what), ...(values.every((value) => value.length < 30) ? [values.join(", ")] : values).map((value) => el("dd", {}, visible(value))));
}

const STAGES = ["before", "after", "merge"];

function resultsTable() {
  const rows = data.results;
  const splits = rows.some((row) => row.split);
  const measured = rows.some((row) => row.stages.some(Boolean));
  const counts = new Set(rows.flatMap((row) => row.stages).filter(Boolean).map((stage) => stage.episodes));
  const numeric = (text) => el("th", { scope: "col", class: "number" }, text);
  const plainHead = (text) => el("th", { scope: "col" }, text);
  const table = el("table", { class: "results" }, el("thead", {}, el("tr", {},
    plainHead("Run"), splits ? plainHead("Split") : null,
    numeric("Agent before"), numeric("Agent after"), numeric("Merge after"),
    measured ? plainHead("Success, 0 to 100 %") : null,
    numeric("Steps"), numeric("Time"), numeric("Memory"))));
  let body = null;
  rows.forEach((row, i) => {
    const same = (other) => other && other.run === row.run && other.group === row.group;
    const first = !same(rows[i - 1]);
    const span = rows.filter(same).length;
    if (first) {
      body = el("tbody", { class: row.run === null ? "mean" : null });
      table.append(body);
    }
    const once = (text) => (first ? el("td", { class: "number", rowspan: span }, row.run === null ? "" : text) : null);
    body.append(el("tr", {},
      first ? el("th", { scope: "rowgroup", rowspan: span }, nameOf(row)) : null,
      splits ? el("td", {}, visible(row.split)) : null,
      ...row.stages.map((stage) => el("td", { class: "number" }, stageText(stage, counts.size > 1))),
      measured ? el("td", { class: "plot" }, row.stages.some(Boolean) ? intervals(row) : null) : null,
      once(fmt(row.steps)), once(duration(row.seconds)), once(row.memory ? `${fmt(row.memory)} MB` : "–")));
  });
  const scroll = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of results" }, table);
  if (!measured) return el("div", {}, el("p", { class: "muted" }, "No evaluations are stored for these runs."), scroll);
  const means = rows.some((row) => row.run === null);
  return el("div", {},
    el("p", { class: "muted" }, `Success in the runs' evaluations${counts.size === 1 && !counts.has(null) ? `, ${fmt([...counts][0])} episodes each` : ""}, with its 95 % interval (Wilson).`,
      means ? " Over several seeds: the mean, and the range from the worst to the best seed." : ""),
    scroll,
    el("p", { class: "key muted" }, ...["agent before training", "agent after", "merge after"].flatMap((name, i) => [mark(i), el("span", {}, name)])));
}

function nameOf(row) {
  const name = el("span", {}, visible(row.label));
  if (row.run !== null && !row.ended) name.append(el("span", { class: "muted" }, " (not ended)"));
  return name;
}

function stageText(stage, counted) {
  if (!stage) return "–";
  const text = el("span", {}, el("strong", {}, percent(stage.success)));
  if (stage.low !== null) text.append(el("br"), el("small", { class: "muted" }, `${(100 * stage.low).toFixed(1)} – ${(100 * stage.high).toFixed(1)}`));
  if (counted && stage.episodes !== null) text.append(el("br"), el("small", { class: "muted" }, `${fmt(stage.episodes)} episodes`));
  return text;
}

/** The mark of a stage: ring, disc, square. */
function stageMark(i, x, y) {
  if (i === 2) return el("rect", { x: x - 4, y: y - 4, width: 8, height: 8, class: "stage stage-2" });
  return el("circle", { cx: x, cy: y, r: 4, class: `stage stage-${i}` });
}

const mark = (i) => el("svg", { width: 14, height: 12, "aria-hidden": "true" }, stageMark(i, 7, 6));

function intervals(row) {
  const width = 220, height = 46;
  const x = (value) => 8 + value * (width - 16);
  const words = row.stages.map((stage, i) => (stage ? `${STAGES[i]} ${percent(stage.success)}` : "")).filter(Boolean);
  const svg = el("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": words.join(", ") });
  for (const value of [0, 0.25, 0.5, 0.75, 1]) {
    svg.append(el("line", { x1: x(value), x2: x(value), y1: 2, y2: height - 2, class: value % 0.5 ? "grid faint" : "grid" }));
  }
  row.stages.forEach((stage, i) => {
    if (!stage) return;
    const y = 9 + 14 * i;
    if (stage.low !== null) svg.append(el("line", { x1: x(stage.low), x2: x(stage.high), y1: y, y2: y, class: `whisker stage-${i}` }));
    svg.append(stageMark(i, x(stage.success), y));
  });
  return svg;
}

function showSettings() {
  const body = byId("settings-body");
  if (!data.settings.length) {
    body.append(el("p", { class: "muted" }, "No config.yaml was found in these runs."));
    return;
  }
  const different = data.settings.filter((row) => row.differs);
  const apart = different.filter((row) => !["run", "seed"].includes(row.name));
  const each = data.runs.map((run, i) => ({ label: run.label, run: i }));
  if (data.runs.length > 1) {
    body.append(el("p", {}, apart.length
      ? `These runs differ in ${apart.length === 1 ? "one setting" : `${apart.length} settings`} besides seed and folder:`
      : "These runs differ in nothing but seed and folder."));
    const groups = data.curves.groups.map((group) => ({ label: group.label, run: group.runs[0] }));
    const alike = apart.every((row) => data.curves.groups.every((group) => group.runs.every((run) => row.values[run] === row.values[group.runs[0]])));
    if (apart.length) body.append(settingsTable(apart, alike ? groups : each, "Settings that differ"));
  }
  const all = settingsTable(data.settings, different.length > 0 ? each : [{ label: "Value", run: 0 }], "All settings");
  body.append(el("details", {}, el("summary", {}, `All ${data.settings.length} settings`), all));
}

/** A row for each setting, a column for each of `columns`: {label, run}. */
function settingsTable(rows, columns, label) {
  const table = el("table", { class: "settings" },
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Setting"), ...columns.map((column) => el("th", { scope: "col" }, visible(column.label))))));
  const body = el("tbody");
  const some = rows.some((row) => !row.differs); // where all differ, marking them says nothing
  for (const row of rows) {
    const name = el("th", { scope: "row" }, el("code", {}, visible(row.name)));
    const marked = row.differs && some;
    if (marked) name.append(" ", el("span", { class: "badge" }, "differs"));
    body.append(el("tr", { class: marked ? "differs" : null }, name,
      ...columns.map(({ run }) => row.values[run]).map((value) => el("td", {}, value === null ? "–" : el("code", {}, visible(value))))));
  }
  table.append(body);
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, table);
}
