// Who spoke how much of an answer: a bar in the experts' colours and a legend to act on.
import { el } from "./dom.js";
import { COLOURS } from "./experts.js";
import { openMenu } from "./menu.js";

const SHOWN = 4; // experts named beside the bar; the others are in its description and in the panel

export const percent = (share) => (share > 0 && share < 0.005 ? "<1 %" : `${Math.round(share * 100)} %`);

/** A square in an expert's colour; with its pattern, which tells it from the others without colours. */
export const swatch = (index) => el("span", { class: `swatch e${index} s${index % COLOURS}`, "aria-hidden": "true" });

export class ShareBar {
  constructor() {
    this.counts = new Map();
    this.total = 0;
    this.bar = el("div", { class: "bar", role: "img" });
    this.legend = el("div", { class: "legend" });
    this.element = el("div", { class: "shares" }, this.bar, this.legend);
  }

  /** ask(mask): answer again with only these experts, and compare; null where the server has other experts. */
  speakers(experts, ask) {
    Object.assign(this, { experts, ask, drawn: null });
    if (this.total) this.#draw();
  }

  /** Count these pieces, too, and draw. */
  add(pieces) {
    for (const [, expert] of pieces) {
      if (expert < 0) continue;
      this.counts.set(expert, (this.counts.get(expert) ?? 0) + 1);
      this.total += 1;
    }
    this.#draw();
  }

  #draw() {
    const rows = [...this.counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
    this.element.hidden = rows.length === 0;
    for (const [index] of rows)
      if (!this.bar.querySelector(`.e${index}`)) this.bar.append(el("span", { class: `e${index}` }));
    for (const part of this.bar.children) {
      const index = Number(part.className.slice(1));
      part.style.flexGrow = this.counts.get(index);
      part.style.order = rows.findIndex(([other]) => other === index);
    }
    const words = rows.map(([index, count]) => `${this.experts.name(index)} ${percent(count / this.total)}`);
    this.bar.setAttribute("aria-label", `Spoken by ${words.join(", ")}`);
    this.#drawLegend(rows.slice(0, SHOWN));
  }

  #drawLegend(rows) {
    const key = rows.map(([index]) => index).join();
    if (key !== this.drawn) {
      this.drawn = key;
      this.legend.replaceChildren(...rows.map(([index]) => this.#chip(index)));
    }
    rows.forEach(([, count], at) => {
      this.legend.children[at].lastChild.textContent = percent(count / this.total);
    });
  }

  #chip(index) {
    const name = this.experts.name(index);
    const inside = [swatch(index), el("span", {}, name), el("span", { class: "share" })];
    if (!this.ask) return el("span", { class: "chip", "data-expert": index }, inside);
    const chip = el(
      "button",
      {
        type: "button",
        class: "chip",
        "aria-haspopup": "menu",
        "aria-expanded": "false",
        "data-expert": index,
        title: `Mask or solo ${name}, and compare`,
        onclick: () => this.#menu(chip, index),
      },
      inside,
    );
    return chip;
  }

  #menu(chip, index) {
    const name = this.experts.name(index);
    const others = this.experts.list.map((expert) => expert.index).filter((other) => other !== index);
    openMenu(chip, [
      { label: `Answer again without ${name}`, action: () => this.ask(others) },
      { label: `Answer again with ${name} alone`, action: () => this.ask([index]) },
    ]);
  }
}
