// Formulas in the text. KaTeX and its styles come when the first formula is whole; until then, and where it cannot be
// read, its source stands there.
import { el } from "./dom.js";

let loading = null;

function katex() {
  loading ??= Promise.all([
    import("./math.js"),
    new Promise((resolve) => {
      document.head.append(el("link", { rel: "stylesheet", href: "page/math.css", onload: resolve, onerror: resolve }));
    }),
  ]).then(([module]) => module);
  return loading;
}

/** Draw TeX in the place of an element's text; `className` says who spoke, as for a token. */
export async function drawFormula(element, tex, display, className) {
  const { draw } = await katex();
  if (!draw(element, tex, display)) element.classList.add("unread");
  else if (className) element.classList.add(...className.split(" ").filter((name) => !name.startsWith("w")));
  element.title = tex;
}
