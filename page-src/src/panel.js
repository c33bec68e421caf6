// The panel "Who speaks": the experts with their shares of an answer, masks for the next ones, how speakers are shown, and
// what the mixture is made of.
import { byId, el, fill, icon } from "./dom.js";
import { castOf, sameExperts, shares } from "./experts.js";
import { makeUpView } from "./makeup.js";
import { MODES } from "./settings.js";
import { percent, swatch } from "./sharebar.js";

const NOBODY = [];

const foreign = ({ live }) =>
  `Another engine answers here. It tells who was chosen but not with how much weight, so a share is one of places${live ? "" : "; colours come when an answer is whole"}. Masks need octad’s own engine.`;

export class Panel {
  /** act: setMask(mask), compareMask(), latest() -> the newest answer's node or null, talk() */
  constructor({ server, settings, act }) {
    Object.assign(this, { server, settings, act });
    this.body = byId("panel-body");
    fill(this.body, el("p", { class: "note" }, "Waiting for the server."));
    settings.addEventListener("change", () => this.#marks());
  }

  /** Build it for the experts that the server has. */
  build() {
    const { experts } = this.server;
    if (!experts.known) {
      fill(
        this.body,
        el(
          "p",
          { class: "note" },
          "This server does not tell which expert speaks: a dense model, or a backend without routing. " +
            "Chatting works as usual; colours, shares and masks need a mixture that octad serves.",
        ),
        makeUpView(experts),
      );
      return;
    }
    this.rows = new Map(experts.list.map((expert) => [expert.index, this.#row(expert)]));
    this.status = el("p", { class: "mask-state", role: "status" });
    this.reset = el(
      "button",
      { type: "button", class: "quiet", onclick: () => this.act.setMask(null) },
      "All may speak",
    );
    this.compare = el(
      "button",
      { type: "button", class: "primary", onclick: () => this.act.compareMask() },
      icon("columns"),
      "Answer again and compare",
    );
    this.about = el("p", { class: "note about" });
    fill(
      this.body,
      this.#modes(),
      this.about,
      experts.masks ? null : el("p", { class: "note" }, foreign(experts)),
      el(
        "ul",
        { class: "experts", role: "list" },
        [...this.rows.values()].map(({ element }) => element),
      ),
      el("div", { class: "mask-foot" }, this.status, this.compare, this.reset),
      this.#layersSwitch(),
      makeUpView(experts),
    );
    this.#marks();
    this.update();
  }

  #modes() {
    return el(
      "fieldset",
      { class: "segments" },
      el("legend", { class: "sr-only" }, "Show speakers by"),
      MODES.map(({ name, label }) =>
        el(
          "label",
          {},
          el("input", { type: "radio", name: "mode", value: name, onchange: () => this.settings.set("mode", name) }),
          el("span", {}, label),
        ),
      ),
    );
  }

  #layersSwitch() {
    this.layers = el("input", {
      type: "checkbox",
      role: "switch",
      onchange: () => this.settings.set("layers", this.layers.checked),
    });
    return el(
      "label",
      { class: "switch" },
      this.layers,
      el(
        "span",
        {},
        "Trace layers",
        el("small", {}, "each token’s experts layer by layer; the server reads the conversation again for it"),
      ),
    );
  }

  #row({ index, name, domain }) {
    const toggle = (label, long, press) =>
      el(
        "button",
        {
          type: "button",
          class: "toggle",
          "aria-pressed": "false",
          "aria-label": `${long} ${name}`,
          title: `${long} ${name}`,
          onclick: press,
        },
        label,
      );
    const row = {
      share: el("span", { class: "share" }),
      meter: el("span", { class: `e${index}` }),
      solo: toggle("Solo", "Solo", () => this.#solo(index)),
      mask: toggle("Mask", "Mask", () => this.#mask(index)),
    };
    row.element = el(
      "li",
      { "data-expert": index },
      swatch(index),
      el(
        "span",
        { class: "expert-name" },
        el("b", {}, name),
        domain && domain !== name ? el("small", {}, domain) : null,
      ),
      row.share,
      this.server.experts.masks ? el("span", { class: "toggles" }, row.solo, row.mask) : null,
      el("span", { class: "meter" }, row.meter),
    );
    for (const [event, focus] of [
      ["pointerenter", index],
      ["pointerleave", null],
      ["focusin", index],
      ["focusout", null],
    ]) {
      row.element.addEventListener(event, () => this.#focus(focus));
    }
    return row;
  }

  // The others fade while one is pointed at.
  #focus(index) {
    if (index === null) delete byId("messages").dataset.focus;
    else byId("messages").dataset.focus = index;
  }

  #solo(index) {
    const { only } = this.act.talk();
    this.act.setMask(only?.length === 1 && only[0] === index ? null : [index]);
  }

  #mask(index) {
    const all = this.server.experts.list.map((expert) => expert.index);
    const now = this.act.talk().only ?? all;
    const then = now.includes(index) ? now.filter((other) => other !== index) : [...now, index].sort((a, b) => a - b);
    if (!then.length) this.status.textContent = "One expert must be left to speak.";
    else this.act.setMask(then.length === all.length ? null : then);
  }

  #marks() {
    if (!this.rows) return;
    for (const input of this.body.querySelectorAll("input[name=mode]"))
      input.checked = input.value === this.settings.get("mode");
    this.layers.checked = this.settings.get("layers");
  }

  /** Shares of the newest answer, and the mask that holds. */
  update() {
    if (!this.rows) return;
    const node = this.act.latest();
    const told =
      node && sameExperts(castOf(node, this.server.experts), this.server.experts) ? (node.pieces ?? NOBODY) : NOBODY;
    const found = new Map(shares(told).map((row) => [row.index, row.share]));
    this.about.textContent = found.size
      ? "Shares of the latest answer’s tokens"
      : "Each token has one expert that has most say in it.";
    for (const [index, { share, meter }] of this.rows) {
      const value = found.get(index) ?? 0;
      share.textContent = found.size ? percent(value) : "";
      meter.style.width = `${value * 100}%`;
    }
    this.#showMask(node);
  }

  #showMask(node) {
    const { experts } = this.server;
    const { only } = this.act.talk();
    for (const [index, { element, solo, mask }] of this.rows) {
      const silent = only !== null && !only.includes(index);
      element.classList.toggle("silent", silent);
      mask.setAttribute("aria-pressed", silent);
      solo.setAttribute("aria-pressed", only?.length === 1 && only[0] === index);
    }
    this.status.textContent = only ? `Next answers: ${experts.describe(only)}.` : "";
    this.reset.hidden = !only;
    this.compare.hidden = !only || !node || String(node.only ?? "") === String(only);
  }
}
