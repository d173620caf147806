// The section of curves: which charts, which axis, how smooth, one cursor for all of them.

const curves = { axis: "steps", shown: "main", over: 1, band: "range", charts: [] };
const OVER = [1, 3, 5, 10, 30, 100, 300, 1000, 3000]; // updates that a point can be the mean of
const MOST_THIN = 3; // with more groups, lines of single seeds would hide the means

function showCurves() {
  const body = byId("curves-body");
  const named = (name) => (own(data.curves.titles, name) ? `${data.curves.titles[name][0]} (${name})` : name);
  const groups = [...new Set(data.curves.names.map((name) => name.split("/")[0]))];
  const timed = data.curves.runs.some((run) => run.seconds.some((second) => second !== null));
  const show = select("Show", [
    ["main", "Main metrics"],
    { label: "All of a group", options: groups.map((name) => [`${name}/*`, name]) },
    { label: "One metric, large", options: data.curves.names.map((name) => [name, named(name)]) },
  ], (value) => {
    curves.shown = value;
    buildCharts();
  }, { id: "show-metrics" });
  const draw = () => curves.charts.forEach((chart) => chart.draw(curves.axis));
  const updates = Math.max(...data.curves.runs.map((run) => run.updates[run.updates.length - 1]));
  const widths = OVER.filter((over) => over === 1 || (over > data.curves.width && over <= updates / 5));
  // several lines cross too often to be read; one is shown as it is
  if (data.curves.groups.length > 1) curves.over = widths.filter((over) => over <= updates / 10).pop() || 1;
  const smooth = select("Each point", widths.map((over) => [over, over === 1 ? "as logged" : `mean of the last ${over} updates`]), (value) => {
    curves.over = Number(value);
    draw();
  }, { id: "smooth" });
  smooth.box.value = curves.over;
  const intervals = Object.keys(data.curves.quantiles).length > 0;
  if (intervals) curves.band = "interval";
  const band = select("Band", [["interval", "95 % interval of the mean"], ["range", "lowest to highest seed"]], (value) => {
    curves.band = value;
    body.querySelector(".legend").replaceWith(legend());
    draw();
  }, { id: "band" });
  const axis = el("fieldset", { class: "toggle" }, el("legend", { class: "visually-hidden" }, "Horizontal axis"),
    ...[["steps", "Environment steps"], ["seconds", "Wall time"]].map(([value, text]) =>
      el("label", {}, el("input", { type: "radio", name: "axis", value, checked: value === "steps", disabled: value === "seconds" && !timed,
        onchange: () => {
          curves.axis = value;
          draw();
        } }), el("span", {}, text))));
  body.append(
    el("div", { class: "controls" }, show.field, widths.length > 1 ? smooth.field : null, intervals ? band.field : null, axis),
    legend(),
    el("div", { id: "charts" }),
    el("output", { id: "curve-live", class: "visually-hidden", "aria-live": "polite" }),
  );
  if (data.curves.width > 1) {
    byId("charts").before(el("p", { class: "muted" }, `Each point is the mean over ${data.curves.width} updates.`));
  }
  buildCharts();
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) < 1) return;
    width = entry.contentRect.width;
    draw();
  }).observe(byId("charts"));
}

function legend() {
  const list = el("ul", { class: "legend", "aria-label": "Legend" });
  const kinds = new Set();
  data.curves.groups.forEach((group, g) => {
    const several = group.runs.length > 1;
    if (several) kinds.add(bandName(group.runs.length));
    const seeds = group.runs.map((run) => data.runs[run].seed);
    const text = several ? `: mean of ${group.runs.length} seeds (${seeds.map((seed) => plain(seed)).join(", ")})` : "";
    list.append(el("li", {}, swatch(g), el("span", {}, visible(group.label), text)));
  });
  if (kinds.size) list.append(el("li", { class: "muted" }, `band: ${[...kinds].sort().join("; of two seeds ")}${data.curves.groups.length > MOST_THIN ? "" : "; thin lines: single seeds"}`));
  return list;
}

function buildCharts() {
  const { names, main } = data.curves;
  const wanted = curves.shown === "main" ? (main.length ? main : names.slice(0, 12))
    : curves.shown.endsWith("/*") ? names.filter((name) => name.startsWith(curves.shown.slice(0, -1)))
    : [curves.shown];
  let waiting = null;
  const move = (x, byKey) => {
    if (waiting === null) requestAnimationFrame(() => {
      const { x: place, byKey: told, chart } = waiting;
      waiting = null;
      curves.charts.forEach((one) => one.point(place));
      if (told && place !== null) byId("curve-live").textContent = chart.words();
    });
    waiting = { x, byKey, chart: curves.charts.find((one) => one.figure.contains(document.activeElement)) || curves.charts[0] };
  };
  curves.charts = wanted.map((name) => makeChart(name, move));
  const box = byId("charts");
  box.className = wanted.length === 1 ? "charts one" : "charts";
  box.replaceChildren(...curves.charts.map((chart) => chart.figure));
  curves.charts.forEach((chart) => chart.draw(curves.axis));
}
