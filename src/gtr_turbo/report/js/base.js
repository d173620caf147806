// Building elements and showing text. Every text reaches the page through text nodes or attributes set
// by the DOM; nothing is ever parsed as HTML.

const data = JSON.parse(document.getElementById("data").textContent);

/** Element by id. */
const byId = (id) => document.getElementById(id);

/** A value that data itself holds under a name, and not what every object inherits. */
const own = (object, name) => (Object.hasOwn(object, name) ? object[name] : undefined);

/** An element with attributes, listeners (onclick: f) and children; strings become text nodes. */
function el(tag, attributes = {}, ...children) {
  const svg = el.svg.has(tag);
  const node = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("aria-") && typeof value === "boolean") node.setAttribute(name, String(value));
    else if (value === null || value === undefined || value === false) continue;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
el.svg = new Set(["svg", "path", "line", "text", "circle", "rect", "g", "title", "desc"]);

// Characters that would be invisible, or would change how their neighbours are shown: controls, bidirectional
// and zero-width marks, lone surrogates, line and paragraph separators. Line feed and tab are shown as they are.
const ODD = /(?![\n\t])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu;
const NAMES = { 0: "NUL", 7: "BEL", 8: "BS", 11: "VT", 12: "FF", 13: "CR", 27: "ESC", 127: "DEL" };

function oddName(char) {
  const code = char.codePointAt(0);
  return NAMES[code] || `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
}

/** Untrusted text as a fragment in which odd characters are boxed names. */
function visible(text) {
  const fragment = document.createDocumentFragment();
  let from = 0;
  for (const match of text.matchAll(ODD)) {
    if (match.index > from) fragment.append(text.slice(from, match.index));
    fragment.append(el("span", { class: "odd" }, oddName(match[0])));
    from = match.index + match[0].length;
  }
  if (from < text.length) fragment.append(text.slice(from));
  return fragment;
}

/** The same for places that take only a string (labels, options, titles). */
const plain = (text) => text.replace(ODD, (char) => `[${oddName(char)}]`);

/** A number with three significant digits, below 0.1 with two; an en dash for none. */
function fmt(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  if (size !== 0 && size < 0.0001) return value.toExponential(1).replaceAll("-", "−");
  return String(Number(value.toPrecision(size < 0.1 ? 2 : 3))).replace("-", "−");
}

/** Per cent with one digit; what rounds to 0 has no sign. */
const percent = (value) => `${(100 * value).toFixed(1).replace("-0.0", "0.0").replace("-", "−")} %`;

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

/** A group's line style: colours are in the style sheet, and dashes tell lines apart without them. */
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "12 4", "4 2"];
const hue = (group) => `var(--series-${group % 6})`;
const dash = (group) => DASHES[group % DASHES.length];
const groupOf = (run) => data.curves.groups.findIndex((group) => group.runs.includes(run));

/** A short line in a group's colour and dashes. */
function swatch(group, thin = false) {
  const line = el("line", { x1: 1, y1: 5, x2: 25, y2: 5, "stroke-width": thin ? 1 : 2.5, "stroke-dasharray": dash(group) });
  line.style.setProperty("stroke", hue(group));
  return el("svg", { width: 26, height: 10, class: "swatch", "aria-hidden": "true" }, line);
}

/** A labelled select; options are [value, text] or {label, options}. */
function select(label, options, onchange, extra = {}) {
  const make = ([value, text]) => el("option", { value }, plain(text));
  const box = el("select", { onchange: () => onchange(box.value), ...extra });
  for (const option of options) {
    box.append(Array.isArray(option) ? make(option) : el("optgroup", { label: plain(option.label) }, ...option.options.map(make)));
  }
  return { box, field: el("label", { class: "field" }, el("span", {}, label), box) };
}

const button = (text, onclick, extra = {}) => el("button", { type: "button", onclick, ...extra }, text);

// Theme: the system's, unless the button has chosen; remembered where the browser allows it.
function startTheme() {
  const modes = ["auto", "light", "dark"];
  let mode = "auto";
  try {
    mode = modes.find((known) => known === localStorage.getItem("gtr-turbo-theme")) || "auto";
  } catch { /* storage can be forbidden for files */ }
  const show = () => {
    if (mode === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = mode;
    byId("theme").textContent = `Theme: ${mode}`;
  };
  byId("theme").addEventListener("click", () => {
    mode = modes[(modes.indexOf(mode) + 1) % modes.length];
    try {
      localStorage.setItem("gtr-turbo-theme", mode);
    } catch { /* as above */ }
    show();
  });
  show();
}
