// The open turn of the open episode. Nothing of other turns is on the page.

function turnColumn() {
  return el("div", { class: "column", id: "turn-column" },
    el("div", { class: "bar-line" },
      el("h3", { id: "turn-title", tabindex: -1 }),
      el("div", { class: "buttons" },
        button("‹ Episode", () => moveEpisode(-1), { "aria-label": "Previous episode", id: "previous-episode" }),
        button("Episode ›", () => moveEpisode(1), { "aria-label": "Next episode", id: "next-episode" }),
        button("‹ Turn", () => moveTurn(-1), { "aria-label": "Previous turn", id: "previous-turn" }),
        button("Turn ›", () => moveTurn(1), { "aria-label": "Next turn", id: "next-turn" }))),
    el("div", { id: "strip", role: "group", "aria-label": "Turns of this episode" }),
    el("div", { id: "turn" }));
}

function openEpisode(episode, turn = 0) {
  replay.episode = episode;
  replay.turn = episode ? Math.max(0, Math.min(episode.turns.length - 1, turn)) : 0;
  followSelected();
  drawRows();
  drawTurn();
}

function moveTurn(by) {
  if (!replay.episode) return;
  const to = Math.max(0, Math.min(replay.episode.turns.length - 1, replay.turn + by));
  if (to === replay.turn) return;
  replay.turn = to;
  drawTurn();
}

function drawTurn() {
  const { episode, turn: at } = replay;
  byId("turn-column").classList.toggle("empty", !episode);
  if (!episode) {
    byId("turn-title").textContent = "No episode";
    byId("strip").replaceChildren();
    byId("turn").replaceChildren();
    return;
  }
  const turn = episode.turns[at], focused = document.activeElement;
  const from = ["strip", "turn"].find((id) => byId(id).contains(focused));
  byId("turn-title").replaceChildren(visible(episodeName(episode)), el("span", { class: "muted", role: "status" }, ` turn ${at + 1} of ${episode.turns.length}`));
  const place = replay.shown.indexOf(episode);
  for (const [id, off] of [["previous-turn", at === 0], ["next-turn", at === episode.turns.length - 1], ["previous-episode", place <= 0], ["next-episode", place === replay.shown.length - 1]]) {
    byId(id).setAttribute("aria-disabled", off);
  }
  drawStrip(episode, at);
  byId("turn").replaceChildren(
    el("div", { class: "seen" }, frameOf(turn, at), chips(turn), numbers(turn)),
    el("div", { class: "said" }, ...notes(episode), ...spoken(turn)));
  // what had the focus is gone: keep it near, so that keys go on working
  if (from === "strip") byId("strip").querySelector("[aria-current]")?.focus();
  else if (from) byId("turn-title").focus({ preventScroll: true });
  writeHash();
}

/** A button for each turn; of long episodes, those around the open one. */
function drawStrip(episode, at) {
  const most = 40, count = episode.turns.length;
  const from = Math.max(0, Math.min(at - most / 2, count - most)), to = Math.min(count, from + most);
  const buttons = [];
  for (let i = from; i < to; i++) {
    const turn = episode.turns[i];
    const kl = (turn.kl || []).reduce((a, b) => Math.max(a, b ?? 0), 0);
    const trouble = !turn.valid ? "invalid reply" : !turn.legal ? "illegal action" : "";
    buttons.push(button(`${i + 1}${trouble ? " !" : ""}`, () => moveTurn(i - replay.turn), {
      class: levelClass(kl),
      "aria-current": i === at ? "step" : null,
      "aria-label": `Turn ${i + 1}${trouble ? `, ${trouble}` : ""}`,
      title: [trouble, turn.kl && turn.kl.length ? `highest KL ${fmt(kl)} nats` : ""].filter(Boolean).join(", ") || null,
    }));
  }
  if (from > 0) buttons.unshift("…");
  if (to < count) buttons.push(`… ${count}`);
  byId("strip").replaceChildren(...buttons);
  byId("strip").hidden = count < 2;
}

function frameOf(turn, at) {
  const held = typeof turn.frame === "number" ? byId(`frame-${turn.frame}`) : null;
  if (!held) return el("div", { class: "frame missing" }, el("span", {}, "No frame: ", visible(String(turn.frame))));
  return el("img", { class: "frame", src: held.textContent, alt: `Frame of turn ${at + 1}: what the agent saw`, onerror: (event) =>
    event.target.replaceWith(el("div", { class: "frame missing" }, "No frame: the browser cannot show it")) });
}

function chips(turn) {
  const list = el("ul", { class: "chips", "aria-label": "Flags and facts" });
  const chip = (name, good, kind) => list.append(el("li", { class: `chip ${kind}` }, `${good === null ? "" : good ? "✓ " : "✗ "}`, visible(name)));
  chip(turn.valid ? "valid" : "not valid", turn.valid, turn.valid ? "good" : "bad");
  chip(turn.legal ? "legal" : "not legal", turn.legal, turn.legal ? "good" : "bad");
  if (turn.terminated) chip("terminated", null, "");
  if (turn.truncated) chip("truncated", null, "warn");
  if (turn.success !== null) chip(turn.success ? "success" : "no success", turn.success, turn.success ? "good" : "bad");
  for (const [name, holds] of Object.entries(turn.facts)) chip(`${name}: ${holds ? "right" : "wrong"}`, holds, holds ? "good" : "bad");
  return list;
}

function numbers(turn) {
  const known = (turn.kl || []).filter((kl) => kl !== null);
  const rows = [
    ["Reward", turn.reward, "the environment's"],
    ["Format reward", turn.format, "for the form of the reply"],
    ["Value", turn.value, "the critic's estimate before the turn"],
    ["Advantage", turn.advantage, "guidance included"],
    ["KL, mean", known.length ? known.reduce((a, b) => a + b, 0) / known.length : null, "nats per thought token"],
    ["KL, highest", known.length ? known.reduce((a, b) => Math.max(a, b)) : null, "nats"],
    ["Update", turn.update, "in which the turn was collected"],
    ["Step", turn.step, "turn of the episode, from 0"],
  ];
  return el("dl", { class: "numbers" }, ...rows.map(([name, value, about]) => el("div", { title: about }, el("dt", {}, name), el("dd", {}, fmt(value)))));
}

function notes(episode) {
  let text = null;
  if (!episode.complete) text = "Turns of this episode are missing from the stored files.";
  else if (episode.outcome === "unfinished") text = "The end of this episode was not stored: the run ended first.";
  return text ? [el("p", { class: "notice" }, text)] : [];
}

const block = (title, content, extra = {}) => el("section", { class: "block", ...extra }, el("h4", {}, title), content);
const pre = (text, extra = {}) => (text === "" ? el("p", { class: "muted" }, "(empty)") : el("pre", extra, visible(text)));

/** Details that stay open or closed, once the reader has chosen, while turns go by. */
const choices = {};
function folded(id, open, title, note, content) {
  const summary = el("summary", { onclick: () => { choices[id] = !details.open; } }, el("h4", {}, title), note && el("span", { class: "muted" }, note));
  const details = el("details", { class: "block", id, open: choices[id] ?? open }, summary, content);
  return details;
}

/** Prompt, what the reply says field by field, the action, and the reply itself. */
function spoken(turn) {
  const prompt = data.prompts[turn.prompt];
  const parts = [folded("prompt", prompt.length <= 400, "Prompt", ` ${prompt.length.toLocaleString("en-US")} characters`, pre(prompt))];
  const thoughts = turn.fields.filter(([name]) => name !== "action");
  if (thoughts.length) {
    parts.push(block(turn.valid ? "Thought" : "Thought (read from a reply that is not valid)", el("dl", { class: "fields" },
      ...thoughts.map(([name, text]) => el("div", {}, el("dt", {}, visible(name)), el("dd", {}, text === "" ? el("span", { class: "muted" }, "(empty)") : visible(text))))), { id: "thought" }));
  } else if (!turn.fields.length) {
    parts.push(block("Thought", el("p", { class: "muted" }, "The reply is not the JSON object that was asked for; it is shown below as it is."), { id: "thought" }));
  }
  parts.push(block("Action", turn.action === "" ? el("p", { class: "muted" }, "(none was understood)") : el("pre", { class: "action" }, visible(turn.action)), { id: "action" }));
  const raw = folded("raw", !turn.tokens, "Raw reply", null, pre(turn.reply));
  if (turn.tokens) parts.push(block("Reply, token by token", tokenView(turn), { id: "tokens" }), raw);
  else {
    parts.push(raw);
    const bars = turn.kl && klBars(turn);
    if (bars) parts.push(block("The teacher's disagreement", bars, { id: "bars" }));
  }
  return parts;
}
