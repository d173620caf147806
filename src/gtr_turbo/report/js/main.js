// The replay as a whole: deep links, keys, help; and the start.

const KEYS = [
  ["← →", "previous, next turn"],
  ["Home End", "first, last turn"],
  ["j k", "next, previous episode"],
  ["↓ ↑", "the same, while the focus is in the replay"],
  ["/", "search episodes"],
  ["?", "this help"],
  ["Esc", "leave a field, or close this help"],
];

/** `#replay/RUN/ENV/EPISODE/STEP`, kept up to date without filling the history. */
function writeHash() {
  if (!writeHash.on) return;
  const { episode, turn } = replay;
  const place = [data.runs[episode.run].label, episode.env, episode.episode, episode.turns[turn].step];
  const hash = `#replay/${place.map((part) => encodeURIComponent(String(part).toWellFormed())).join("/")}`;
  if (hash !== location.hash) history.replaceState(null, "", hash);
}

/** Open what location.hash names; true if it names a turn. */
function readHash() {
  const parts = location.hash.split("/");
  if (parts[0] !== "#replay" || parts.length !== 5 || !data.episodes.length) return false;
  let label;
  try {
    label = decodeURIComponent(parts[1]);
  } catch {
    return false;
  }
  const [env, number, step] = parts.slice(2).map(Number);
  const episode = data.episodes.find((one) =>
    String(data.runs[one.run].label).toWellFormed() === label && one.env === env && one.episode === number);
  byId("lost").hidden = Boolean(episode);
  if (!episode) {
    byId("lost").replaceChildren("This file does not hold the episode that the link names (", visible(`${label}, env ${env}, episode ${number}`), ").");
    return false;
  }
  if (!replay.shown.includes(episode)) resetFilters();
  openEpisode(episode, Math.max(0, episode.turns.findIndex((turn) => turn.step === step)));
  byId("replay").scrollIntoView({ block: "start" });
  return true;
}

function showReplay() {
  const body = byId("replay-body");
  if (!data.episodes.length) {
    body.append(el("p", { class: "notice", id: "replay-empty" }, visible(data.empty)));
    return;
  }
  data.episodes.forEach(describe);
  const left = data.stored - data.episodes.length;
  body.append(
    el("p", { class: "muted" }, left
      ? `${data.episodes.length} of ${data.stored} stored episodes, evenly over the training; ${left} were left out to keep this file small.`
      : `All ${data.stored} stored episodes.`),
    el("p", { class: "notice", id: "lost", hidden: true }),
    el("div", { class: "replay" }, episodeColumn(), turnColumn()));
  applyFilters();
  writeHash.on = true;
  addEventListener("hashchange", readHash);
  readHash();
}

/** Keys of the page; what is typed into a field is left alone. */
function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  const target = event.target;
  if (target.matches("input:not([type=checkbox], [type=radio]), textarea, select")) {
    if (event.key !== "Escape") return;
    event.preventDefault(); // a browser would empty the field and tell nobody
    target.blur();
    return;
  }
  const inside = byId("replay").contains(target);
  if (event.key.length > 1 && target.closest(".scroll, pre, [type=radio]")) return; // arrows scroll or choose there
  const last = replay.episode ? replay.episode.turns.length : 0;
  const actions = {
    ArrowLeft: () => moveTurn(-1),
    ArrowRight: () => moveTurn(1),
    Home: inside ? () => moveTurn(-last) : null,
    End: inside ? () => moveTurn(last) : null,
    j: () => moveEpisode(1),
    k: () => moveEpisode(-1),
    ArrowDown: inside ? () => moveEpisode(1) : null,
    ArrowUp: inside ? () => moveEpisode(-1) : null,
    "/": () => byId("filter-search").focus(),
    "?": openHelp,
  };
  const action = actions[event.key];
  if (!action || (!data.episodes.length && event.key !== "?")) return;
  event.preventDefault();
  if (event.key !== "?" && !inside) byId("replay").scrollIntoView({ block: "start" });
  action();
}

function openHelp() {
  byId("help").showModal();
}

function start() {
  startTheme();
  showComparison();
  showOverview();
  showCurves();
  showReplay();
  const close = button("Close", () => byId("help").close());
  byId("help").append(
    el("h2", { id: "help-title" }, "Keys"),
    el("dl", { class: "keys" }, ...KEYS.map(([keys, what]) => el("div", {}, el("dt", {}, ...keys.split(" ").flatMap((key) => [el("kbd", {}, key), " "])), el("dd", {}, what)))),
    el("p", { class: "muted" }, "Charts and tokens have the same arrow keys while they have the focus. The address of the page leads back to the open turn."),
    close);
  byId("help-open").addEventListener("click", openHelp);
  document.addEventListener("keydown", onKey);
  document.documentElement.dataset.ready = "true";
}

start();
