// The reply token by token, coloured by the teacher's disagreement: by tint, and by the underline's thickness.

const LEVELS = [0.01, 0.05, 0.2, 0.5, 1]; // nats; fixed, so that colours compare between turns and runs

/** 0 (below the first bound) to 5; negative estimates (k1) have levels of their own by size. */
function levelOf(kl) {
  if (kl === null || kl === undefined) return 0;
  return LEVELS.filter((bound) => Math.abs(kl) >= bound).length;
}

const levelClass = (kl) => (levelOf(kl) ? `level-${levelOf(kl)}${kl < 0 ? " negative" : ""}` : null);

function scale(turn) {
  const list = el("ul", { class: "scale", "aria-label": "Scale of the KL estimate, in nats" });
  const texts = [`< ${LEVELS[0]}`, ...LEVELS.map((bound, i) => (i + 1 < LEVELS.length ? `${bound}–${LEVELS[i + 1]}` : `≥ ${bound}`))];
  texts.forEach((text, i) => list.append(el("li", {}, el("span", { class: `token${i ? ` level-${i}` : ""}` }, text))));
  if ((turn.kl || []).some((kl) => kl <= -LEVELS[0])) list.append(el("li", {}, el("span", { class: "token level-3 negative" }, "negative")));
  return list;
}

/** A token's text; line feeds and lone blanks are shown, or they could not be pointed at. */
function tokenText(text) {
  if (text === "") return el("span", { class: "odd" }, "empty");
  if (!text.includes("\n")) return visible(text);
  const fragment = document.createDocumentFragment();
  text.split("\n").forEach((part, i) => {
    if (i) fragment.append(el("span", { class: "odd" }, "↵"), "\n");
    fragment.append(visible(part));
  });
  return fragment;
}

/** A token where it stands alone: blanks are counted, as they could not be seen. */
function tokenName(text) {
  if (/^ +$/.test(text)) return el("span", { class: "odd" }, text.length === 1 ? "blank" : `${text.length} blanks`);
  return el("code", {}, tokenText(text));
}

/** The reply's tokens with scale and readout. */
function tokenView(turn) {
  const thoughts = turn.kl ? Math.min(turn.kl.length, turn.tokens.length) : 0;
  const readout = el("p", { class: "token-readout", role: "status" });
  const box = el("div", { class: "tokens", role: "group", "aria-label": "Tokens of the reply. Left and right arrow keys select a token." });
  let chosen = thoughts ? turn.kl.slice(0, thoughts).reduce((best, kl, i) => ((kl ?? -Infinity) > (turn.kl[best] ?? -Infinity) ? i : best), 0) : 0;
  const tell = (i) => {
    const kl = i < thoughts ? turn.kl[i] : undefined;
    const level = levelOf(kl);
    const said = kl === undefined ? (turn.kl ? "no KL: not part of the thought" : "the KL was not measured")
      : kl === null ? "KL not stored" : `KL ${fmt(kl)} nats${level ? `, level ${level} of ${LEVELS.length}` : ""}`;
    readout.replaceChildren(`Token ${i + 1} of ${turn.tokens.length}: `, tokenName(turn.tokens[i]), " ", el("strong", {}, said));
  };
  const spans = turn.tokens.map((text, i) => {
    const kl = i < thoughts ? turn.kl[i] : undefined;
    return el("span", {
      class: ["token", i < thoughts ? levelClass(kl) : "rest"].filter(Boolean).join(" "),
      tabindex: i === chosen ? 0 : -1,
      role: "button",
      "data-i": i,
      title: kl === undefined || kl === null ? "no KL" : `KL ${fmt(kl)} nats`,
    }, tokenText(text));
  });
  const choose = (i, focus) => {
    spans[chosen].tabIndex = -1;
    spans[chosen].classList.remove("chosen");
    chosen = Math.max(0, Math.min(spans.length - 1, i));
    spans[chosen].tabIndex = 0;
    spans[chosen].classList.add("chosen");
    if (focus) spans[chosen].focus();
    tell(chosen);
  };
  const indexOf = (event) => {
    const token = event.target.closest(".token");
    return token && token.dataset.i !== undefined ? Number(token.dataset.i) : null;
  };
  box.append(...spans);
  box.addEventListener("click", (event) => indexOf(event) !== null && choose(indexOf(event), true));
  box.addEventListener("pointerover", (event) => indexOf(event) !== null && tell(indexOf(event)));
  box.addEventListener("pointerleave", () => spans.length && tell(chosen));
  box.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: chosen - 1, ArrowRight: chosen + 1, Home: 0, End: spans.length - 1 }[event.key];
    if (to === undefined) return;
    choose(to, true);
    event.preventDefault();
    event.stopPropagation();
  });
  if (spans.length) choose(chosen, false);
  const hint = thoughts ? "Tint and underline: the teacher's disagreement with each token of the thought, in nats. Grey: the action, for which no KL is stored."
    : turn.kl ? "No part of this reply counts as a thought, so no KL is stored for it." : "The KL to the teacher was not measured.";
  return el("div", {}, el("p", { class: "hint muted" }, hint), thoughts ? scale(turn) : null, box, spans.length ? readout : null);
}

/** Without stored tokens the KL cannot be laid on the text: bars by position instead. */
function klBars(turn) {
  const known = turn.kl.filter((kl) => kl !== null);
  if (!known.length) return null;
  const height = 60, step = Math.max(2, Math.min(9, 600 / turn.kl.length)), width = Math.ceil(step * turn.kl.length) + 2;
  const top = Math.max(0.05, ...known.map(Math.abs));
  const most = turn.kl.indexOf(known.reduce((a, b) => Math.max(a, b)));
  const svg = el("svg", { class: "bars", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `KL by token of the thought; highest ${fmt(turn.kl[most])} nats at token ${most + 1} of ${turn.kl.length}` });
  svg.style.setProperty("max-width", `${width}px`);
  turn.kl.forEach((kl, i) => {
    const size = Math.max(1, (Math.abs(kl ?? 0) / top) * (height - 4));
    svg.append(el("rect", { x: 1 + i * step, y: height - 1 - size, width: Math.max(1, step - 1), height: size, class: `bar ${levelClass(kl) || ""}` },
      el("title", {}, `token ${i + 1}: ${fmt(kl)} nats`)));
  });
  return el("div", {},
    el("p", { class: "hint muted" }, `KL by token of the thought, in nats: highest ${fmt(turn.kl[most])} at token ${most + 1} of ${turn.kl.length}. This run stored no tokens, so it cannot be shown on the text.`),
    svg);
}
