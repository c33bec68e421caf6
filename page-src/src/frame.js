// What is around the conversation: the two panels at the sides, title, theme, the server's state, the mask beside the question.
import { byId, el, fill, icon } from "./dom.js";
import { applyTheme } from "./settings.js";

const NARROW = matchMedia("(max-width: 1099px)"); // below, panels lie over the conversation (see layout.css)
const THEMES = { auto: ["Theme: as the system", "sun"], light: ["Theme: light", "sun"], dark: ["Theme: dark", "moon"] };

export class Frame {
  /** act: setMask(mask) */
  constructor({ settings, server, act }) {
    Object.assign(this, { settings, server, act });
    this.open = {
      sidebar: settings.get("sidebar") && !NARROW.matches,
      panel: settings.get("panel") && !NARROW.matches,
    };
    for (const [id, name] of [
      ["close-sidebar", "side"],
      ["open-sidebar", "side"],
      ["close-panel", "close"],
      ["settings", "settings"],
      ["shortcuts", "keyboard"],
      ["more", "more"],
      ["to-end", "down"],
    ]) {
      fill(byId(id), icon(name));
    }
    fill(byId("new-talk"), icon("plus"), "New conversation");
    fill(byId("open-panel"), icon("experts"), el("span", {}, "Who speaks"));
    byId("open-panel").setAttribute("aria-label", "Who speaks");
    for (const name of ["sidebar", "panel"]) {
      byId(`open-${name}`).addEventListener("click", () => this.toggle(name));
      byId(`close-${name}`).addEventListener("click", () => this.toggle(name));
    }
    byId("backdrop").addEventListener("click", () => this.closeOverlays());
    byId("theme").addEventListener("click", () => this.#nextTheme());
    NARROW.addEventListener("change", () => this.#narrowed());
    settings.addEventListener("change", () => this.#looks());
    this.#looks();
    this.#show();
  }

  toggle(name) {
    this.open[name] = !this.open[name];
    const other = name === "panel" ? "sidebar" : "panel";
    if (NARROW.matches) this.open[other] = false;
    else this.settings.set(name, this.open[name]);
    this.#show();
    byId(`${this.open[name] ? "close" : "open"}-${name}`).focus();
  }

  search() {
    if (!this.open.sidebar) this.toggle("sidebar");
    byId("search").focus();
  }

  /** Close what lies over the conversation; false where nothing does. */
  closeOverlays() {
    if (!NARROW.matches || (!this.open.sidebar && !this.open.panel)) return false;
    const opener = byId(this.open.sidebar ? "open-sidebar" : "open-panel");
    this.open = { sidebar: false, panel: false };
    this.#show();
    opener.focus();
    return true;
  }

  #narrowed() {
    this.open = NARROW.matches
      ? { sidebar: false, panel: false }
      : { sidebar: this.settings.get("sidebar"), panel: this.settings.get("panel") };
    this.#show();
  }

  #show() {
    const over = NARROW.matches && (this.open.sidebar || this.open.panel);
    for (const name of ["sidebar", "panel"]) {
      byId(name).hidden = !this.open[name];
      byId(`open-${name}`).setAttribute("aria-expanded", this.open[name]);
    }
    byId("open-sidebar").hidden = this.open.sidebar && !NARROW.matches;
    byId("backdrop").hidden = !over;
    byId("main").inert = over;
  }

  #nextTheme() {
    const names = Object.keys(THEMES);
    this.settings.set("theme", names[(names.indexOf(this.settings.get("theme")) + 1) % names.length]);
  }

  #looks() {
    const theme = THEMES[this.settings.get("theme")] ? this.settings.get("theme") : "auto";
    applyTheme(theme);
    document.body.dataset.speakers = this.settings.get("mode");
    const [label, sign] = THEMES[theme];
    fill(byId("theme"), icon(sign), theme === "auto" ? el("span", { class: "auto" }, "A") : null);
    byId("theme").setAttribute("aria-label", label);
    byId("theme").title = label;
  }

  title(talk) {
    byId("title").textContent = talk.title || this.server.models[0]?.id || "octad";
    document.title = talk.title ? `${talk.title} · octad` : "octad";
  }

  /** Beside the question: who may speak in the answer to it. */
  mask(talk) {
    const only = this.server.experts.only(talk.only);
    byId("mask").hidden = !only;
    if (!only) return;
    fill(
      byId("mask"),
      icon("experts"),
      el("span", {}, `Next answer: ${this.server.experts.describe(talk.only)}`),
      el("button", { type: "button", class: "link", onclick: () => this.act.setMask(null) }, "All may speak"),
    );
  }

  /** The banner says what keeps the server from answering. */
  banner() {
    const { state, progress, message } = this.server;
    const said = {
      loading: "The model is being loaded",
      draining: "The server is shutting down; running answers are finished",
      away: "The engine behind this server does not answer; trying again",
      gone: "The server does not answer; trying again",
      locked: "The server wants an API key",
    }[state];
    const banner = byId("banner");
    banner.dataset.state = state;
    if (!said) return fill(banner);
    const bar = progress === null ? null : el("progress", { max: "1", value: progress, "aria-label": "Loading" });
    const detail = message && message !== said ? `: ${message}` : "";
    return fill(
      banner,
      el(
        "span",
        {},
        `${said}${state === "locked" ? "" : detail}${progress === null ? "." : ` (${Math.round(progress * 100)} %)`}`,
      ),
      bar,
      state === "locked" &&
        el("button", { type: "button", class: "link", onclick: () => this.act.enterKey() }, "Enter the key"),
    );
  }
}
