// Markdown as it streams in, every token in a span of its own that says who spoke.
//
//     const view = new MarkdownView(element, speakerOf);    // piece number -> {className, name}, or null for nobody
//     view.write("**He", 0); view.write("llo**", 1); view.end();
//
// streaming-markdown reads each character once and never takes anything back, so a token costs the same at the end of a
// long answer as at its start. There is no way from the model's text to markup: elements are made one by one, raw HTML
// stays text, links go to http, https and mailto only, and pictures become links, because loading one would tell its
// address to somebody. What turns out not to be a link or a formula ("a[i]", "$HOME") gets its characters back.
import * as smd from "streaming-markdown";
import { Attribution } from "./attribution.js";
import { finishCode, nameLanguage, startCode } from "./codeblock.js";
import { el } from "./dom.js";
import { drawFormula } from "./formula.js";

const DEPTH = 22; // the parser's own limit is 24
const LONGEST_INLINE_FORMULA = 600;
const LONGEST_FORMULA = 6000;
const BLOCK_STARTED = 105; // the parser has seen \[ or $$ and waits for a line to end
const HEADINGS = [smd.HEADING_1, smd.HEADING_2, smd.HEADING_3, smd.HEADING_4, smd.HEADING_5, smd.HEADING_6];
const TAGS = {
  [smd.BLOCKQUOTE]: "blockquote",
  [smd.PARAGRAPH]: "p",
  [smd.LINE_BREAK]: "br",
  [smd.RULE]: "hr",
  [smd.ITALIC_AST]: "em",
  [smd.ITALIC_UND]: "em",
  [smd.STRONG_AST]: "strong",
  [smd.STRONG_UND]: "strong",
  [smd.STRIKE]: "s",
  [smd.CODE_INLINE]: "code",
  [smd.RAW_URL]: "a",
  [smd.LINK]: "a",
  [smd.IMAGE]: "a",
  [smd.LIST_UNORDERED]: "ul",
  [smd.LIST_ORDERED]: "ol",
  [smd.LIST_ITEM]: "li",
  [smd.CHECKBOX]: "span",
};
const SIGNS = { $1: ["$", "$"], $2: ["$$", "$$"], "\\1": ["\\(", "\\)"], "\\2": ["\\[", "\\]"] }; // opening and closing
const LINKS = new Set([smd.LINK, smd.RAW_URL, smd.IMAGE]);

export class MarkdownView {
  constructor(root, speakerOf = () => null) {
    this.speakerOf = speakerOf;
    this.lastName = null; // of the newest span: the first span of another speaker carries the name, for all to see
    this.open = [{ type: smd.DOCUMENT, element: root }];
    this.attribution = new Attribution();
    this.heading = 2; // the last heading's level: content starts below the message's own, and skips none
    this.plain = false;
    this.parser = smd.parser({
      data: this,
      add_token: (view, type) => view.#start(type),
      end_token: (view) => view.#finish(),
      add_text: (view, text) => view.#text(text),
      set_attr: (view, type, value) => view.#attribute(type, value),
    });
  }

  /** The next piece of the answer, and its number. */
  write(text, piece) {
    this.attribution.feed(text, piece);
    if (this.plain) return this.#text(text);
    try {
      this.#parse(text);
    } catch (error) {
      this.#giveUp(error);
    }
    return undefined;
  }

  /** Nothing more comes: what is pending is shown, open formulas become text again. */
  end() {
    if (this.plain) return;
    try {
      smd.parser_end(this.parser);
      if ([smd.EQUATION_INLINE, smd.EQUATION_BLOCK].includes(this.#top.type)) {
        this.#abandonFormula();
        smd.parser_end(this.parser);
      }
      while (this.open.length > 1) this.#finish({ cut: true });
    } catch (error) {
      this.#giveUp(error);
    }
  }

  // A display formula may start and end within a line; the parser wants the line to end after \[ or $$.
  #parse(text) {
    let from = 0;
    for (let at = 0; at < text.length; at += 1) {
      if (from === at && this.parser.token === BLOCK_STARTED && text[at] !== "\n") smd.parser_write(this.parser, "\n");
      if (text[at] !== "[" && text[at] !== "$" && text[at] !== "\n") continue;
      smd.parser_write(this.parser, text.slice(from, at + 1));
      from = at + 1;
      if (text[at] === "\n" && this.#noFormula()) this.#abandonFormula();
    }
    smd.parser_write(this.parser, text.slice(from));
    if (this.#tooLong()) this.#abandonFormula();
  }

  // No formula in dollars goes over the end of its line, no display formula over an empty line.
  #noFormula() {
    const { type, opened, length } = this.#top;
    if (type === smd.EQUATION_INLINE) return opened === "$";
    return type === smd.EQUATION_BLOCK && length > 0 && this.parser.pending === "\n" && this.#top.newline;
  }

  #tooLong() {
    const { type, length } = this.#top;
    return (
      length >
      ({ [smd.EQUATION_INLINE]: LONGEST_INLINE_FORMULA, [smd.EQUATION_BLOCK]: LONGEST_FORMULA }[type] ?? Infinity)
    );
  }

  // What was taken for the beginning of a formula was none: its sign is text, and what followed is read again.
  #abandonFormula() {
    const { element, opened, type, runs } = this.open.pop();
    const { parser } = this;
    const again = runs.map(([text]) => text).join("") + parser.pending;
    parser.pending = "";
    parser.len -= 1;
    parser.token = parser.tokens[parser.len];
    element.replaceWith(this.#restored(SIGNS[opened + (type === smd.EQUATION_BLOCK ? 2 : 1)][0]));
    this.attribution.unread(runs);
    smd.parser_write(parser, again);
  }

  get #top() {
    return this.open[this.open.length - 1];
  }

  #start(type) {
    if (this.open.length >= DEPTH) throw new RangeError("Markdown nested too deeply");
    const parent = this.#top;
    const top = { type, element: null };
    if (type === smd.EQUATION_INLINE || type === smd.EQUATION_BLOCK)
      Object.assign(top, { opened: this.parser.pending[0], runs: [], length: 0 });
    if (type === smd.CODE_BLOCK || type === smd.CODE_FENCE) top.element = startCode(parent.element);
    else if (HEADINGS.includes(type)) top.element = parent.element.appendChild(this.#headingElement(type));
    else if (type === smd.TABLE)
      top.element = parent.element
        .appendChild(el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Table" }))
        .appendChild(el("table"));
    else if (type === smd.TABLE_ROW) top.element = this.#rowElement(parent.element);
    else if (type === smd.TABLE_CELL)
      top.element = parent.element.appendChild(el(parent.element.parentElement.tagName === "THEAD" ? "th" : "td"));
    else if (type === smd.EQUATION_BLOCK)
      top.element = parent.element.appendChild(el("span", { class: "formula block" }));
    else if (type === smd.EQUATION_INLINE) top.element = parent.element.appendChild(el("span", { class: "formula" }));
    else top.element = parent.element.appendChild(el(TAGS[type] ?? "span"));
    if (type === smd.CHECKBOX) top.element.textContent = "☐";
    this.open.push(top);
  }

  #headingElement(type) {
    const wanted = HEADINGS.indexOf(type) + 1;
    this.heading = Math.min(wanted + 2, this.heading + 1, 6);
    return el(`h${this.heading}`, { class: `h${wanted}` });
  }

  #rowElement(table) {
    const part = table.children.length === 0 ? el("thead") : (table.children[1] ?? el("tbody"));
    return table.appendChild(part).appendChild(el("tr"));
  }

  #finish({ cut = false } = {}) {
    const top = this.open.pop();
    if (LINKS.has(top.type)) this.#finishLink(top, cut);
    else if (top.runs) this.#finishFormula(top);
    else if (top.type === smd.CODE_FENCE || top.type === smd.CODE_BLOCK) finishCode(top.element);
  }

  #finishLink({ type, element, address }, cut) {
    const url = safeAddress(address ?? (type === smd.RAW_URL ? element.textContent : ""));
    if (url) {
      Object.assign(element, { href: url, target: "_blank", rel: "noopener noreferrer nofollow" });
      if (type === smd.IMAGE) element.classList.add("picture");
      return undefined;
    }
    if (type === smd.RAW_URL) return element.replaceWith(...element.childNodes);
    const back = address !== undefined ? `](${address})` : cut ? "" : "]";
    return element.replaceWith(
      this.#restored(type === smd.IMAGE ? "![" : "["),
      ...element.childNodes,
      this.#restored(back),
    );
  }

  // Characters that were taken for markup and are text after all; given to whoever spoke last.
  #restored(text) {
    const speaker = this.speakerOf(this.attribution.last);
    return speaker ? el("span", { class: speaker.className }, text) : document.createTextNode(text);
  }

  // Dollars around what no formula looks like ("$HOME and $PATH") are dollars.
  #finishFormula({ element, type, opened, runs }) {
    const display = type === smd.EQUATION_BLOCK;
    const [start, end] = SIGNS[opened + (display ? 2 : 1)];
    const tex = element.textContent;
    const money = start === "$" && /\s$/.test(tex);
    if (money || !tex.trim()) element.replaceWith(this.#restored(start), ...element.childNodes, this.#restored(end));
    else drawFormula(element, tex.trim(), display, this.speakerOf(mostSaid(runs))?.className);
  }

  #attribute(type, value) {
    const top = this.#top;
    if (type === smd.HREF || type === smd.SRC) top.address = value;
    else if (type === smd.LANG)
      nameLanguage(
        top.element,
        value
          .trim()
          .split(/[\s{,]/)[0]
          .toLowerCase(),
      );
    else if (type === smd.CHECKED) top.element.textContent = "☑";
    else if (type === smd.START) top.element.setAttribute("start", value);
  }

  #text(text) {
    const { element, runs } = this.#top;
    for (const [part, piece] of this.attribution.split(text)) {
      if (runs) this.#collect(part, piece);
      this.#append(element, part, piece);
    }
  }

  #collect(text, piece) {
    const top = this.#top;
    top.runs.push([text, piece]);
    top.length += text.length;
    top.newline = text.endsWith("\n");
  }

  #append(element, text, piece) {
    const last = element.lastChild;
    const speaker = this.speakerOf(piece);
    if (!speaker) {
      if (last?.nodeType === Node.TEXT_NODE) last.appendData(text);
      else element.append(text);
    } else if (last?.nodeName === "SPAN" && last.dataset.i === String(piece)) {
      last.firstChild.appendData(text);
    } else {
      const name = speaker.name === this.lastName ? null : speaker.name;
      this.lastName = speaker.name;
      element.append(el("span", { class: speaker.className, "data-i": piece, "data-name": name }, text));
    }
  }

  // Whatever the parser could not do: the rest of the answer is shown as it is.
  #giveUp(error) {
    if (!(error instanceof RangeError)) console.warn("the rest of this answer is shown as plain text:", error);
    this.plain = true;
    const [root] = this.open;
    const rest = this.attribution.source;
    this.open = [root, { type: smd.PARAGRAPH, element: root.element.appendChild(el("p", { class: "plain" })) }];
    this.#text(rest);
  }
}

// The piece that a formula as a whole is given to: the one with most of its characters.
function mostSaid(runs) {
  const counts = new Map();
  for (const [text, piece] of runs) counts.set(piece, (counts.get(piece) ?? 0) + text.length);
  return [...counts].reduce((best, entry) => (entry[1] > best[1] ? entry : best), [-1, 0])[0];
}

/** The address if a link may go there, else null. */
export function safeAddress(value) {
  const address = value
    .trim()
    .replace(/\s+["'(].*$/s, "")
    .replace(/^<(.*)>$/s, "$1");
  if (!/^(https?:\/\/|mailto:)/i.test(address)) return null;
  try {
    return new URL(address).href;
  } catch {
    return null;
  }
}
