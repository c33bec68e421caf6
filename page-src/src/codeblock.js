// A block of code: its language, a button that copies it, and colours once it is whole.
import { copyButton, el } from "./dom.js";

const LONGEST = 60_000; // characters; longer ones stay without colours

/** Begin a block below an element; returns the element that takes the code. */
export function startCode(parent) {
  const code = el("code");
  const name = el("span", { class: "language" }, "code");
  const copy = copyButton("Copy code", () => code.textContent);
  const pre = el("pre", { tabindex: "0", role: "group", "aria-label": "Code" }, code);
  parent.append(el("div", { class: "code" }, el("div", { class: "code-head" }, name, copy), pre));
  return code;
}

/** Say which language a block is in. */
export function nameLanguage(code, language) {
  code.dataset.language = language;
  if (!language) return;
  code.closest(".code").querySelector(".language").textContent = language;
  code.parentElement.setAttribute("aria-label", `Code, ${language}`);
}

/** Nothing more comes into this block. */
export async function finishCode(code) {
  const language = code.dataset.language;
  if (!language) return;
  const text = code.textContent;
  if (text.length > LONGEST) return;
  const { ranges } = await import("./code.js");
  paint(code, ranges(text, language));
}

// Splits each text node where a range begins or ends; the spans around them, which say who spoke, stay.
function paint(code, ranges) {
  const walker = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
  const nodes = [];
  while (walker.nextNode()) nodes.push(walker.currentNode);
  let at = 0;
  let next = 0;
  for (const node of nodes) {
    const end = at + node.data.length;
    const parts = [];
    let done = at;
    while (next < ranges.length && ranges[next].start < end) {
      const { start, end: until, kind } = ranges[next];
      if (start > done) parts.push(node.data.slice(done - at, start - at));
      const from = Math.max(start, done);
      const to = Math.min(until, end);
      parts.push(el("span", { class: `hl-${kind}` }, node.data.slice(from - at, to - at)));
      done = to;
      if (until > end) break;
      next += 1;
    }
    if (parts.length) {
      if (done < end) parts.push(node.data.slice(done - at));
      node.replaceWith(...parts);
    }
    at = end;
  }
}
