// Elements without a framework.  el("button", { class: "quiet", onclick: send, "aria-label": "Send" }, icon("send"))

import { icon } from "./icons.js";

export { icon };

/** An element: properties that start with "on" are listeners, null and false are left out, true is an empty attribute. */
export function el(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "class") made.className = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/** A button with a sign and no words; the label is read aloud and shown when the pointer rests on it. */
export function iconButton(name, label, onclick, props = {}) {
  return el(
    "button",
    { type: "button", class: "icon", "aria-label": label, title: label, onclick, ...props },
    icon(name),
  );
}

/** The element of the document with this id. */
export const byId = (id) => document.getElementById(id);

/** Put children in the place of those that an element has. */
export const fill = (element, ...children) => element.replaceChildren(...children.flat().filter(Boolean));

/** Run at most once a frame, however often it is asked for. */
export function eachFrame(work) {
  let asked = 0;
  return () => {
    asked ||= requestAnimationFrame(() => {
      asked = 0;
      work();
    });
  };
}

/** A dialog with a heading, closed by Escape, its button, or a press outside; removed when it closes. */
export function showDialog(title, content, { className = "", onclose = () => {} } = {}) {
  const heading = el("h2", { id: "dialog-title", tabindex: "-1", autofocus: true }, title);
  const close = iconButton("close", "Close", () => dialog.close());
  const dialog = el(
    "dialog",
    { class: className, "aria-labelledby": "dialog-title" },
    el("div", { class: "dialog-head" }, heading, close),
    content,
  );
  dialog.addEventListener("close", () => {
    dialog.remove();
    onclose();
  });
  dialog.addEventListener("mousedown", (event) => {
    if (event.target === dialog) dialog.close();
  });
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** Ask a yes-or-no question; resolves to true or false. */
export function confirmDialog(question, { title, yes }) {
  return new Promise((resolve) => {
    let answer = false;
    const decide = (value) => () => {
      answer = value;
      dialog.close();
    };
    const dialog = showDialog(
      title,
      el(
        "div",
        {},
        el("p", {}, question),
        el(
          "div",
          { class: "dialog-foot" },
          el("button", { type: "button", class: "quiet", onclick: decide(false) }, "Cancel"),
          el("button", { type: "button", class: "danger", onclick: decide(true) }, yes),
        ),
      ),
      { className: "small", onclose: () => resolve(answer) },
    );
  });
}

/** Keep text on the clipboard; where the browser allows it only to secure pages, through a selection. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = el("textarea", { class: "sr-only", "aria-hidden": "true", tabindex: "-1" });
    area.value = text;
    const host = document.querySelector("dialog[open]") ?? document.body;
    host.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/** A button that copies what `text()` gives, and says that it did. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const done = await copyText(text());
    fill(button, icon(done ? "check" : "alert"));
    button.setAttribute("aria-label", done ? "Copied" : "Could not copy");
    setTimeout(() => {
      fill(button, icon("copy"));
      button.setAttribute("aria-label", label);
    }, 1600);
  });
  return button;
}
