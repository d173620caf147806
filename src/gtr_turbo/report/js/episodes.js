// The list of episodes: filters, order, and rows; only rows in view exist.

const ROW = 54; // pixels, as in the style sheet
const SIGN = { success: "✓", failed: "✗", unfinished: "…" };

const replay = { shown: [], episode: null, turn: 0, list: null, inner: null };

const FILTERS = () => ({ run: "all", outcome: "all", invalid: false, from: null, to: null, search: "", order: "training" });
let filters = FILTERS();

/** Numbers that the list needs, worked out once. */
function describe(episode) {
  let most = null, sum = 0, count = 0;
  for (const turn of episode.turns) {
    for (const kl of turn.kl || []) {
      if (kl === null) continue;
      if (most === null || kl > most) most = kl;
      sum += kl;
      count += 1;
    }
  }
  episode.klMost = most;
  episode.klMean = count ? sum / count : null;
  episode.invalid = episode.turns.filter((turn) => !turn.valid).length;
  episode.first = episode.turns[0].update;
  episode.last = episode.turns[episode.turns.length - 1].update;
}

/** Everything that was asked, answered or done in an episode, for the search. */
function haystack(episode) {
  episode.text ??= episode.turns
    .map((turn) => `${data.prompts[turn.prompt]}\n${turn.reply}\n${turn.action}`)
    .join("\n").toLowerCase();
  return episode.text;
}

const ofRun = (episode) => filters.run === "all" || episode.run === Number(filters.run);

function passes(episode) {
  return ofRun(episode)
    && (filters.outcome === "all" || episode.outcome === filters.outcome)
    && (!filters.invalid || episode.invalid > 0)
    && (filters.from === null || episode.last >= filters.from)
    && (filters.to === null || episode.first <= filters.to)
    && (!filters.search || haystack(episode).includes(filters.search.toLowerCase()));
}

const down = (value) => (value === null ? -Infinity : value);
const ORDERS = {
  training: ["Order of training", null],
  kl: ["Highest token KL", (a, b) => down(b.klMost) - down(a.klMost)],
  mean: ["Highest mean KL", (a, b) => down(b.klMean) - down(a.klMean)],
  return: ["Lowest return", (a, b) => (a.return ?? Infinity) - (b.return ?? Infinity)],
  length: ["Most turns", (a, b) => b.turns.length - a.turns.length],
};

/** Filter and order the list; the open episode stays if it passes, unless the list is to be read from its top. */
function applyFilters(fromTop = false) {
  replay.shown = data.episodes.filter(passes);
  const compare = ORDERS[filters.order][1];
  if (compare) replay.shown.sort((a, b) => compare(a, b) || 0); // the sort is stable: ties keep the order of training
  const several = data.episodes.length !== replay.shown.length;
  byId("count").textContent = several ? `${replay.shown.length} of ${data.episodes.length} episodes` : `${data.episodes.length} episodes`;
  replay.inner.style.setProperty("height", `${Math.max(1, replay.shown.length) * ROW}px`);
  replay.list.scrollTop = 0;
  if (!replay.shown.length) openEpisode(null);
  else if (fromTop || !replay.shown.includes(replay.episode)) openEpisode(replay.shown[0]);
  else followSelected();
  drawRows();
}

/** Filters' controls and the list, in a column. */
function episodeColumn() {
  const updates = data.episodes.flatMap((episode) => [episode.first, episode.last]);
  const low = updates.reduce((a, b) => Math.min(a, b)), high = updates.reduce((a, b) => Math.max(a, b));
  const change = (name, read) => (value) => {
    filters[name] = read ? read(value) : value;
    applyFilters(name === "order");
  };
  const run = select("Run", [["all", "all runs"], ...data.runs.map((one, i) => [i, one.label])], change("run"), { id: "filter-run" });
  const outcome = select("Outcome", [["all", "any outcome"], ["success", "success"], ["failed", "failed"], ["unfinished", "unfinished"]], change("outcome"), { id: "filter-outcome" });
  const order = select("Order", Object.entries(ORDERS).map(([key, [text]]) => [key, text]), change("order"), { id: "filter-order" });
  const invalid = el("input", { type: "checkbox", id: "filter-invalid", onchange: () => change("invalid")(invalid.checked) });
  const limit = (id, label, place) => {
    const box = el("input", { type: "number", id, min: low, max: high, placeholder: place, "aria-label": label, oninput: () =>
      change(id.slice(7), (text) => (text === "" ? null : Number(text)))(box.value) });
    return box;
  };
  const search = el("input", { type: "search", id: "filter-search", placeholder: "Search prompts and replies", "aria-label": "Search prompts and replies",
    oninput: () => change("search")(search.value) });
  const reset = button("Reset", resetFilters, { id: "filter-reset" });
  replay.inner = el("div", { class: "rows" });
  replay.list = el("div", { id: "episodes", class: "list", role: "listbox", tabindex: 0, "aria-label": "Episodes", onscroll: drawRows }, replay.inner);
  return el("div", { class: "column" },
    el("form", { class: "filters", role: "search", "aria-label": "Filter episodes", onsubmit: (event) => event.preventDefault() },
      el("div", { class: "wide" }, search),
      data.runs.length > 1 ? run.field : null, outcome.field, order.field,
      el("div", { class: "field range", role: "group", "aria-label": "Updates" }, el("span", {}, "Updates"),
        el("div", {}, limit("filter-from", "First update", low), "to", limit("filter-to", "Last update", high))),
      el("label", { class: "check" }, invalid, "with an invalid reply"),
      el("div", { class: "wide line" }, el("output", { id: "count", "aria-live": "polite" }), reset),
    ),
    replay.list);
}

function resetFilters() {
  filters = FILTERS();
  for (const [id, value] of [["run", "all"], ["outcome", "all"], ["order", "training"], ["from", ""], ["to", ""], ["search", ""]]) {
    if (byId(`filter-${id}`)) byId(`filter-${id}`).value = value;
  }
  byId("filter-invalid").checked = false;
  applyFilters();
}

function drawRows() {
  const first = Math.max(0, Math.floor(replay.list.scrollTop / ROW) - 3);
  const end = Math.min(replay.shown.length, Math.ceil((replay.list.scrollTop + replay.list.clientHeight) / ROW) + 3);
  const rows = [];
  for (let i = first; i < end; i++) rows.push(episodeRow(replay.shown[i], i));
  if (!replay.shown.length) rows.push(el("p", { class: "muted none" }, data.episodes.some(ofRun)
    ? "No episode matches. Change the filters, or reset them." : "This file holds no episode of this run."));
  replay.inner.replaceChildren(...rows);
  const at = replay.shown.indexOf(replay.episode);
  if (at >= first && at < end) replay.list.setAttribute("aria-activedescendant", `row-${at}`);
  else replay.list.removeAttribute("aria-activedescendant");
}

function episodeRow(episode, i) {
  const selected = episode === replay.episode;
  const updates = episode.first === episode.last ? `update ${episode.first}` : `updates ${episode.first}–${episode.last}`;
  const about = [updates, `${episode.turns.length} turn${episode.turns.length > 1 ? "s" : ""}`];
  if (episode.klMost !== null) about.push(`max KL ${fmt(episode.klMost)}`);
  if (episode.invalid) about.push(`${episode.invalid} invalid`);
  const row = el("div", { class: "row", role: "option", id: `row-${i}`, "aria-selected": selected, "aria-posinset": i + 1, "aria-setsize": replay.shown.length,
    onclick: () => openEpisode(episode) },
    el("span", { class: `sign ${episode.outcome}`, title: episode.outcome }, SIGN[episode.outcome], el("span", { class: "visually-hidden" }, ` ${episode.outcome}`)),
    el("span", { class: "name" }, data.curves.groups.length > 1 ? swatch(groupOf(episode.run)) : null,
      `env ${episode.env}, episode ${episode.episode}`, data.runs.length > 1 ? el("span", { class: "muted" }, " · ", visible(data.runs[episode.run].label)) : null),
    el("span", { class: "return", title: "return of the episode" }, fmt(episode.return)),
    el("span", { class: "about muted" }, about.join(" · ")));
  row.style.setProperty("top", `${i * ROW}px`);
  return row;
}

function episodeName(episode) {
  const place = `env ${episode.env}, episode ${episode.episode}`;
  return data.runs.length > 1 ? `${data.runs[episode.run].label}: ${place}` : place;
}

/** Scroll the list, and only the list, so that the open episode is in view. */
function followSelected() {
  const at = replay.shown.indexOf(replay.episode), list = replay.list;
  if (at < 0) return;
  if (at * ROW < list.scrollTop) list.scrollTop = at * ROW;
  else if ((at + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (at + 1) * ROW - list.clientHeight;
}

function moveEpisode(by) {
  const at = replay.shown.indexOf(replay.episode);
  const next = replay.shown[Math.max(0, Math.min(replay.shown.length - 1, at + by))];
  if (next && next !== replay.episode) openEpisode(next);
}
