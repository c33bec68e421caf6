// The messages of a conversation, top to bottom. What is on the screen already stays; two answers can stand side by side.
import { AnswerView } from "./answer.js";
import { byId, el, iconButton } from "./dom.js";
import { path, siblings } from "./conversation.js";
import { QuestionView } from "./question.js";

const NEAR = 80; // pixels from the end within which the view follows the text

export class Thread {
  constructor({ act, server, runs }) {
    Object.assign(this, { act, server, runs });
    this.list = byId("messages");
    this.scroller = byId("scroller");
    this.views = new Map();
    this.pair = null; // [id, id] of two answers side by side
    this.follows = true;
    this.top = 0;
    this.scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    new ResizeObserver(() => this.#resized()).observe(this.list);
    byId("to-end").addEventListener("click", () => this.toEnd());
  }

  /** Show the conversation as it is now. `fresh` draws everything anew: another conversation, other experts. */
  show(talk, { fresh = false } = {}) {
    if (fresh || talk !== this.talk) {
      this.views.clear();
      this.pair = null;
    }
    this.talk = talk;
    const nodes = path(talk);
    if (this.pair && !nodes.some(({ id }) => this.pair.includes(id))) this.pair = null;
    const wanted = new Map();
    for (const node of nodes) {
      const id = this.pair?.includes(node.id) ? this.pair.join() : node.id;
      const key = `${id} ${siblings(talk, node.id).ids.length}`;
      wanted.set(key, this.views.get(key) ?? this.#view(node));
      if (this.pair?.includes(node.id)) break;
    }
    this.views = wanted;
    this.#place([...wanted.values()].map((view) => view.element));
    this.#markCut(talk);
    byId("main").classList.toggle("empty", nodes.length === 0);
  }

  /** Draw this message anew when it is shown next: it is answered again in its place. */
  forget(id) {
    for (const key of this.views.keys()) if (key.includes(id)) this.views.delete(key);
  }

  /** Put two answers to one question side by side. */
  compare(left, right) {
    this.pair = [left, right];
    this.show(this.talk);
    this.follows = false;
    const [first, second] = this.list.querySelectorAll(".pair .answer");
    const stacked = second.offsetTop > first.offsetTop; // in a narrow window; what is new is the second
    (stacked ? second : first.closest(".pair")).scrollIntoView({ block: "start" });
  }

  toEnd() {
    this.follows = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  /** The server has other experts now. */
  recast() {
    for (const view of this.views.values()) for (const answer of view.answers ?? [view]) answer.recast?.();
  }

  #view(node) {
    if (node.role === "user") return new QuestionView({ node, act: this.act });
    if (this.pair?.includes(node.id)) return this.#pairView();
    return this.#answer(node, false);
  }

  #answer(node, compared) {
    return new AnswerView({
      node,
      run: this.runs.get(node.id),
      server: this.server,
      act: this.act,
      compared,
    });
  }

  #pairView() {
    const answers = this.pair.map((id) => this.#answer(this.talk.nodes[id], true));
    const close = iconButton("close", "Close the comparison", () => this.act.closePair());
    return {
      answers,
      element: el(
        "section",
        { class: "pair", "aria-label": "Two answers side by side" },
        el("div", { class: "pair-head" }, el("span", {}, "Two answers to the same question"), close),
        el(
          "div",
          { class: "pair-body" },
          answers.map(({ element }) => element),
        ),
      ),
    };
  }

  // Elements that are there already are not moved: moving one would lose the reader's place and selection.
  #place(elements) {
    const keep = new Set(elements);
    for (const child of [...this.list.children]) if (!keep.has(child)) child.remove();
    elements.forEach((element, at) => {
      if (this.list.children[at] !== element) this.list.insertBefore(element, this.list.children[at] ?? null);
    });
  }

  #markCut(talk) {
    for (const element of this.list.children) {
      if (element.dataset.id === talk.cut && talk.cut)
        element.dataset.cut = "The messages above are not sent any more.";
      else delete element.dataset.cut;
    }
  }

  // Text has grown, a formula was drawn, a block has come into sight: go along if the reader is at the end.
  #resized() {
    if (this.follows) this.scroller.scrollTop = this.scroller.scrollHeight;
    else this.#showEnd();
  }

  // Only who goes up stops following: growth alone also takes the end away.
  #scrolled() {
    const { scrollTop } = this.scroller;
    if (this.#distance < NEAR) this.follows = true;
    else if (scrollTop < this.top) this.follows = false;
    this.top = scrollTop;
    this.#showEnd();
  }

  get #distance() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight;
  }

  #showEnd() {
    byId("to-end").hidden = this.follows || this.#distance < NEAR;
  }
}
