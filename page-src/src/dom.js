// Elements without a framework.  el("button", { class: "quiet", onclick: send, "aria-label": "Send" }, icon("send"))

const SVG = "http://www.w3.org/2000/svg";

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
  return el("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick, ...props }, icon(name));
}

/** One of the page's signs, in the colour of the text around it. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  for (const [key, value] of Object.entries({ viewBox: "0 0 24 24", "aria-hidden": "true", class: "sign" })) {
    svg.setAttribute(key, value);
  }
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
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
  const heading = el("h2", { id: "dialog-title" }, title);
  const close = iconButton("close", "Close", () => dialog.close());
  const dialog = el("dialog", { class: className, "aria-labelledby": "dialog-title" },
    el("div", { class: "dialog-head" }, heading, close), content);
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
    const dialog = showDialog(title, el("div", {}, el("p", {}, question), el("div", { class: "dialog-foot" },
      el("button", { type: "button", class: "quiet", onclick: decide(false) }, "Cancel"),
      el("button", { type: "button", class: "danger", onclick: decide(true) }, yes))),
    { className: "small", onclose: () => resolve(answer) });
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

const PATHS = {
  alert: "M12 8v5m0 3.2v.1M10.3 4.2 2.9 17a2 2 0 0 0 1.7 3h14.8a2 2 0 0 0 1.7-3L13.7 4.2a2 2 0 0 0-3.4 0Z",
  back: "m14.5 6-6 6 6 6",
  check: "m5 12.5 4.5 4.5L19 7.5",
  close: "m6 6 12 12M18 6 6 18",
  columns: "M5 4.5h14a1.5 1.5 0 0 1 1.5 1.5v12a1.5 1.5 0 0 1-1.5 1.5H5A1.5 1.5 0 0 1 3.5 18V6A1.5 1.5 0 0 1 5 4.5ZM12 4.5v15",
  copy: "M9 8.5h9.5a1 1 0 0 1 1 1V19a1 1 0 0 1-1 1H9a1 1 0 0 1-1-1V9.500a1 1 0 0 1 1-1ZM5.500 15.500h-.5a1 1 0 0 1-1-1V5a1 1 0 0 1 1-1h9.500a1 1 0 0 1 1 1v.5",
  down: "M12 5v14m-6-6 6 6 6-6",
  edit: "M4 20h4L19.300 8.700a1.800 1.800 0 0 0 0-2.500l-1.500-1.500a1.800 1.800 0 0 0-2.500 0L4 16v4Z",
  experts: "M4 18V11m5.300 7V6m5.400 12v-8M20 18V8",
  inspect: "M10.500 17a6.500 6.500 0 1 0 0-13 6.500 6.500 0 0 0 0 13Zm4.800-1.700L20 20",
  keyboard: "M4.500 6.500h15a1 1 0 0 1 1 1v9a1 1 0 0 1-1 1h-15a1 1 0 0 1-1-1v-9a1 1 0 0 1 1-1ZM7 10h.1m3.200 0h.1m3.200 0h.1m3.200 0h.1M8 14h8",
  menu: "M4 7h16M4 12h16M4 17h10",
  moon: "M19.500 14.500A8 8 0 0 1 9.500 4.500a8 8 0 1 0 10 10Z",
  more: "M6 12h.1m5.900 0h.1m5.900 0h.1",
  next: "m9.500 6 6 6-6 6",
  plus: "M12 5v14M5 12h14",
  redo: "M19.500 12a7.500 7.500 0 1 1-2.300-5.400L19.500 9m0-4.500V9H15",
  search: "M10.500 17a6.500 6.500 0 1 0 0-13 6.500 6.500 0 0 0 0 13Zm4.800-1.700L20 20",
  send: "M12 19V5m-6 6 6-6 6 6",
  settings: "M4 7h9m4 0h3M4 17h3m4 0h9M15 9.500a2.500 2.500 0 1 0 0-5 2.500 2.500 0 0 0 0 5Zm-6 10a2.500 2.500 0 1 0 0-5 2.500 2.500 0 0 0 0 5Z",
  stop: "M7.500 7.500h9v9h-9Z",
  side: "M5 4.5h14a1.5 1.5 0 0 1 1.5 1.5v12a1.5 1.5 0 0 1-1.5 1.5H5A1.5 1.5 0 0 1 3.5 18V6A1.5 1.5 0 0 1 5 4.5ZM9 4.5v15",
  sun: "M12 16.500a4.500 4.500 0 1 0 0-9 4.500 4.500 0 0 0 0 9ZM12 2.500v2m0 15v2M2.500 12h2m15 0h2M5.300 5.300l1.400 1.400m10.600 10.600 1.400 1.400M5.300 18.700l1.400-1.400M17.300 6.700l1.400-1.400",
  trash: "M4.500 7h15M9.500 7V4.500h5V7M6.500 7l.8 12.500h9.400L17.500 7M10 11v5m4-5v5",
};
