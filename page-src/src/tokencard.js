// The card of a token: who spoke it, how sure, and through which experts it went layer by layer. It shows where the
// pointer rests, stays where one taps or clicks, and walks along the answer with the arrow keys.
import { byId, el, fill, iconButton } from "./dom.js";
import { castOf } from "./experts.js";
import { Layers } from "./layers.js";
import { place } from "./menu.js";
import { percent, swatch } from "./sharebar.js";

const DELAY = 120;
const NAMED = 3; // experts that are named below the layers

export class TokenCard {
  /** nodeOf(id) -> the message; `settings.get("layers")` tells whether layers are asked for. */
  constructor({ nodeOf, server, settings }) {
    Object.assign(this, { nodeOf, server, settings });
    this.card = el("div", {
      class: "token-card",
      id: "token-card",
      role: "dialog",
      "aria-label": "Token",
      hidden: true,
    });
    byId("main").append(this.card);
    this.traces = new WeakMap(); // node -> Layers or null
    const list = byId("messages");
    list.addEventListener("pointerover", (event) => this.#over(event));
    list.addEventListener("pointerout", () => this.#out());
    list.addEventListener("click", (event) => this.#click(event));
    byId("scroller").addEventListener("scroll", () => !this.pinned && this.hide(), { passive: true });
    document.addEventListener("pointerdown", (event) => {
      if (this.pinned && !this.card.contains(event.target) && !event.target.closest?.(".tok")) this.hide();
    });
    this.card.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Walk through an answer's tokens, from its first. */
  inspect(answer) {
    const first = answer.element.querySelector(".tok");
    if (first) this.#show(first, true);
  }

  hide() {
    clearTimeout(this.timer);
    this.card.hidden = true;
    this.pinned = false;
    this.token?.classList.remove("looked-at");
    this.token = null;
  }

  get visible() {
    return !this.card.hidden;
  }

  #over(event) {
    const token = event.target.closest?.(".tok");
    clearTimeout(this.timer);
    if (!token || this.pinned || event.pointerType === "touch") return;
    this.timer = setTimeout(() => !this.pinned && this.#show(token, false), this.visible ? 0 : DELAY);
  }

  #out() {
    if (this.pinned) return;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => !this.pinned && this.hide(), DELAY);
  }

  #click(event) {
    const token = event.target.closest?.(".tok");
    if (!token || event.target.closest("a") || String(getSelection())) return;
    if (this.pinned && token === this.token) this.hide();
    else this.#show(token, true);
  }

  #key(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") {
      const back = this.token?.closest(".answer")?.querySelector(".tools button");
      this.hide();
      back?.focus();
    } else if (step) this.#step(step);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  #step(by) {
    const tokens = [...this.token.closest(".prose").querySelectorAll(".tok[data-i]")];
    const next = tokens[tokens.indexOf(this.token) + by];
    if (!next) return;
    next.scrollIntoView({ block: "nearest" });
    this.#show(next, true);
  }

  #show(token, pinned) {
    const node = this.nodeOf(token.closest("[data-id]")?.dataset.id);
    const at = Number(token.dataset.i);
    const piece = node?.pieces?.[at];
    if (!piece || !token.dataset.i) return;
    this.token?.classList.remove("looked-at");
    this.token = token;
    token.classList.add("looked-at");
    this.pinned = pinned;
    const walked = document.activeElement?.dataset.walk ?? "next";
    this.card.setAttribute("role", pinned ? "dialog" : "tooltip");
    fill(this.card, this.#content(node, at, piece, pinned));
    this.card.hidden = false;
    place(this.card, token.getClientRects()[0] ?? token.getBoundingClientRect());
    if (pinned) this.card.querySelector(`[data-walk=${walked}]`)?.focus({ preventScroll: true });
  }

  #content(node, at, [text, expert, weight], pinned) {
    const experts = castOf(node, this.server.experts);
    const layers = this.#layers(node, at);
    return [
      el("p", { class: "token-text" }, JSON.stringify(text)),
      el(
        "p",
        { class: "token-speaker" },
        swatch(expert),
        el("strong", {}, experts.name(expert)),
        weight === null ? null : el("span", { class: "weight" }, `${percent(weight)} of the ${experts.share}`),
      ),
      weight === null ? null : meter(expert, weight),
      layers ? grid(layers, experts) : pinned && experts.layers ? this.#askLayers() : null,
      pinned &&
        el(
          "div",
          { class: "token-walk" },
          iconButton("back", "Token before", () => this.#step(-1), { "data-walk": "back" }),
          el(
            "span",
            { class: "position", role: "status" },
            `token ${at + 1} of ${node.pieces.length}: ${experts.name(expert)}`,
          ),
          iconButton("next", "Token after", () => this.#step(1), { "data-walk": "next" }),
          iconButton("close", "Close", () => this.hide()),
        ),
    ].filter(Boolean);
  }

  // {experts, weights}: what the routers chose and how much of it each has, both per layer; null if not traced.
  #layers(node, at) {
    if (!node.routes) return null;
    if (!this.traces.has(node)) {
      this.traces.set(node, {
        experts: Layers.read(node.routes),
        weights: node.weights ? Layers.read(node.weights) : null,
      });
    }
    const { experts, weights } = this.traces.get(node);
    const count = node.usage?.completion_tokens ?? node.pieces.length;
    const chosen = experts?.of(at, count);
    return chosen ? { chosen, weights: weights?.of(at, count) ?? null } : null;
  }

  #askLayers() {
    const on = this.settings.get("layers");
    const button = on
      ? null
      : el(
          "button",
          {
            type: "button",
            class: "link",
            onclick: () => {
              this.settings.set("layers", true);
              this.#show(this.token, true);
            },
          },
          "Trace layers from the next answer on",
        );
    return el("p", { class: "no-layers" }, on ? "Layers are traced from the next answer on." : button);
  }
}

const meter = (expert, weight) => {
  const bar = el("span", { class: `e${expert}` });
  bar.style.width = `${Math.min(100, weight * 100)}%`;
  return el("div", { class: "meter" }, bar);
};

// One column a layer, the first chosen expert at the top; as high as its weight, where weights are known.
function grid({ chosen, weights }, experts) {
  const counts = new Map();
  for (const index of chosen.flat()) if (index >= 0) counts.set(index, (counts.get(index) ?? 0) + 1);
  const most = [...counts].sort((a, b) => b[1] - a[1]).slice(0, NAMED);
  const words = most.map(([index, count]) => `${experts.name(index)} in ${count}`);
  if (counts.size > NAMED) words.push(`${counts.size - NAMED} more in fewer,`);
  const cells = chosen.map((indices, layer) => cell(indices, weights?.[layer], layer, experts));
  return el(
    "div",
    { class: "layers" },
    el("div", { class: "layer-grid", "aria-hidden": "true" }, cells),
    el("p", {}, `${words.join(", ")} of ${chosen.length} layers`),
  );
}

function cell(indices, weights, layer, experts) {
  const said = indices.map((index, at) => `${experts.name(index)}${weights ? ` ${percent(weights[at])}` : ""}`);
  const title = `layer ${layer}: ${indices[0] < 0 ? "no experts" : said.join(", ")}`;
  return el(
    "span",
    { title },
    indices.map((index, at) => {
      const part = el("i", { class: `e${index}` });
      if (weights) part.style.flexGrow = weights[at];
      return part;
    }),
  );
}
