// A question on the screen, and its editing in place.
import { branchButtons } from "./answer.js";
import { copyButton, el, fill, iconButton } from "./dom.js";
import { sendsOn } from "./composer.js";

export class QuestionView {
  constructor({ node, act }) {
    Object.assign(this, { node, act });
    this.body = el("div", { class: "question-body" });
    this.element = el(
      "article",
      { class: "message question", "data-id": node.id },
      el("h2", { class: "sr-only" }, "You"),
      this.body,
    );
    this.#show();
  }

  #show() {
    const { node, act } = this;
    fill(
      this.body,
      el("div", { class: "bubble" }, node.content),
      el(
        "div",
        { class: "tools" },
        branchButtons(node, act.siblings(node), act),
        copyButton("Copy question", () => node.content),
        iconButton("edit", "Edit question", () => this.edit()),
      ),
    );
  }

  /** Change the question; sending it makes a branch, and the old one stays. */
  edit() {
    const area = el("textarea", { "aria-label": "Edit question", rows: "3" });
    area.value = this.node.content;
    const stop = () => {
      this.#show();
      this.body.querySelector(".tools button:last-child").focus();
    };
    const send = () => {
      if (area.value.trim()) this.act.editQuestion(this.node, area.value.trim());
    };
    area.addEventListener("keydown", (event) => {
      if (sendsOn(event)) {
        event.preventDefault();
        send();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        stop();
      }
    });
    fill(
      this.body,
      el(
        "div",
        { class: "editor" },
        area,
        el(
          "div",
          { class: "dialog-foot" },
          el("button", { type: "button", class: "quiet", onclick: stop }, "Cancel"),
          el("button", { type: "button", class: "primary", onclick: send }, "Send"),
        ),
      ),
    );
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}
