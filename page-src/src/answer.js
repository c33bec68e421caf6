// An answer on the screen: text as it comes, who spoke, what can be done with it.
import { Reader } from "./announce.js";
import { copyButton, eachFrame, el, fill, icon, iconButton } from "./dom.js";
import { addColours } from "./colours.js";
import { castOf, sameExperts, tokenClass } from "./experts.js";
import { MarkdownView } from "./markdown.js";
import { ShareBar } from "./sharebar.js";

export class AnswerView {
  /** `run` is the Run that fills the node, if one does; `act` is what the page can do (see main.js). */
  constructor({ node, run, server, act, compared = false }) {
    Object.assign(this, { node, run, server, experts: castOf(node, server.experts), act, compared });
    this.thoughtDrawn = 0; // characters of what was thought that are on the screen
    this.prose = el("div", { class: "prose" });
    this.thinking = el("pre", {});
    this.thought = el("details", { class: "thought", hidden: true }, el("summary", {}, "Thinking"), this.thinking);
    this.state = el("div", { class: "state" });
    this.shares = new ShareBar();
    this.foot = el("div", { class: "shares-place" }, this.shares.element);
    this.tools = el("div", { class: "tools" });
    this.element = el(
      "article",
      { class: "message answer", "data-id": node.id },
      el("h2", { class: "sr-only" }, "Answer"),
      this.#maskNote(),
      this.thought,
      this.prose,
      this.state,
      el("div", { class: "answer-foot" }, this.foot, this.tools),
    );
    this.#empty();
    this.reader = new Reader();
    if (run) this.#follow(run);
    else this.#whole();
  }

  #maskNote() {
    const only = this.experts.only(this.node.only);
    if (!only && !this.compared) return null;
    return el("p", { class: "mask-note" }, this.experts.describe(this.node.only));
  }

  // Nothing is drawn.
  #empty() {
    fill(this.prose);
    this.drawn = 0; // pieces that are on the screen
    this.pieces = this.node.pieces; // those that they were
    this.view = new MarkdownView(this.prose, (piece) => this.#speakerOf(piece));
    this.shares = new ShareBar();
    this.shares.element.hidden = true;
    fill(this.foot, this.shares.element);
  }

  /** See who may have spoken: known from the first piece on, as the server may not have been ready before. */
  recast() {
    const served = this.server.experts;
    this.experts = castOf(this.node, served);
    addColours(this.experts);
    const same = served.masks && sameExperts(this.experts, served);
    this.shares.speakers(this.experts, same ? (mask) => this.act.askAgain(this.node, mask) : null);
  }

  #speakerOf(piece) {
    const said = this.node.pieces?.[piece];
    return said && said[1] >= 0 ? { className: tokenClass(said[1], said[2]), name: this.experts.name(said[1]) } : null;
  }

  #follow(run) {
    this.element.setAttribute("aria-busy", "true");
    const draw = eachFrame(() => this.#draw());
    this.changed = draw;
    run.addEventListener("change", draw);
    run.addEventListener(
      "end",
      () => {
        run.removeEventListener("change", draw);
        this.run = null;
        this.#whole();
        this.act.drawn(this);
      },
      { once: true },
    );
    this.#draw();
    this.#drawTools();
  }

  // What is new since the last frame, and nothing else.
  #draw() {
    if (!this.run) return;
    this.#write();
    this.#showWaiting();
    this.reader.hear(this.node.content);
    this.act.drawn(this);
  }

  #showWaiting() {
    const { note } = this.run;
    if (note) fill(this.state, el("p", { class: "waiting", role: "status" }, note));
    else if (this.node.content) fill(this.state);
    else if (!this.state.querySelector(".typing")) fill(this.state, typing());
  }

  #write() {
    if (this.pieces && this.node.pieces !== this.pieces) this.#empty(); // cut anew
    this.pieces = this.node.pieces;
    const { pieces = [], content } = this.node;
    const from = this.drawn;
    if (!from && pieces.length) this.recast();
    if (!pieces.length && content && !from) this.view.write(content, 0);
    for (; this.drawn < pieces.length; this.drawn += 1) this.view.write(pieces[this.drawn][0], this.drawn);
    if (this.drawn > from) this.shares.add(pieces.slice(from));
    const { reasoning = "" } = this.node;
    if (reasoning.length > this.thoughtDrawn) {
      this.thought.hidden = false;
      this.thinking.append(reasoning.slice(this.thoughtDrawn));
      this.thoughtDrawn = reasoning.length;
    }
  }

  #whole() {
    this.#write();
    this.view.end();
    this.element.removeAttribute("aria-busy");
    fill(this.state, this.#ending());
    this.#drawTools();
    if (this.changed) this.reader.done(this.node.content, this.node.error ? "" : "End of the answer.");
  }

  #ending() {
    const { error, finish, content } = this.node;
    if (error) return this.#trouble(error);
    if (finish === "length")
      return el(
        "p",
        { class: "note" },
        `Cut at ${this.node.usage?.completion_tokens ?? "the most"} tokens: the longest answer that is set, or all that the context holds.`,
      );
    if (finish === "stopped") return el("p", { class: "note" }, "Stopped.");
    if (!finish)
      return el("p", { class: "note" }, content ? "This answer was interrupted." : "This answer never came.");
    return content ? null : el("p", { class: "note" }, "The model had nothing to say.");
  }

  #trouble({ kind, message }) {
    const titles = {
      gone: "The server does not answer",
      key: "The server wants an API key",
      busy: "The server is busy",
      loading: "The server is not ready",
      long: "This conversation is too long",
      refused: "The server refused",
      broke: "The answer broke off",
    };
    const again = el(
      "button",
      { type: "button", class: "quiet", onclick: () => this.act.retry(this.node) },
      "Try again",
    );
    const shorter =
      kind === "long" &&
      el(
        "button",
        { type: "button", class: "quiet", onclick: () => this.act.forget(this.node) },
        "Leave out the older half and try again",
      );
    return el(
      "div",
      { class: "trouble", role: "alert", "data-kind": kind },
      icon("alert"),
      el(
        "div",
        {},
        el("strong", {}, titles[kind] ?? titles.refused),
        message.startsWith("The server does not answer") ? null : el("p", {}, message),
        el("div", { class: "trouble-foot" }, shorter, again),
      ),
    );
  }

  #drawTools() {
    const { node, act, run } = this;
    if (this.compared) {
      fill(
        this.tools,
        run
          ? null
          : el("button", { type: "button", class: "quiet keep", onclick: () => act.keep(node) }, "Go on with this one"),
        this.#figures(),
      );
      return;
    }
    const others = act.siblings(node);
    fill(
      this.tools,
      branchButtons(node, others, act),
      run
        ? null
        : [
            node.content && copyButton("Copy answer", () => node.content),
            node.content && iconButton("redo", "Answer again", () => act.askAgain(node)),
            others.ids.length > 1 && iconButton("columns", "Compare two answers", () => act.compareWith(node)),
            node.pieces?.some(([, expert]) => expert >= 0) &&
              iconButton("inspect", "Look at the tokens one by one", () => act.inspect(this)),
            this.#figures(),
          ].flat(),
    );
  }

  #figures() {
    const { usage, seconds, model } = this.node;
    if (!usage?.completion_tokens) return null;
    const speed =
      seconds > 0.05 && usage.completion_tokens > 4
        ? ` · ${(usage.completion_tokens / seconds).toFixed(usage.completion_tokens / seconds < 10 ? 1 : 0)} tokens/s`
        : "";
    return el(
      "span",
      { class: "figures", title: `${model ?? ""}, prompt of ${usage.prompt_tokens} tokens` },
      `${usage.completion_tokens} tokens${speed}`,
    );
  }
}

const typing = () =>
  el("p", { class: "typing" }, el("span", { class: "sr-only" }, "Waiting for the answer"), el("i"), el("i"), el("i"));

/** "‹ 2 / 3 ›": the alternatives to a message; null where it is the only one. */
export function branchButtons(node, { ids, at }, act) {
  if (ids.length < 2) return null;
  const step = (name, label, to) =>
    iconButton(name, label, () => act.choose(ids[to]), { disabled: to < 0 || to >= ids.length });
  return el(
    "span",
    { class: "branches", role: "group", "aria-label": "Alternatives" },
    step("back", "Previous alternative", at - 1),
    el("span", {}, `${at + 1} / ${ids.length}`),
    step("next", "Next alternative", at + 1),
  );
}
