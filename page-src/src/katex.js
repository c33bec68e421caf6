// Formulas, loaded when the first one appears. Nothing in a formula may load, link or style anything outside itself.
import katex from "katex";

const OPTIONS = { throwOnError: true, strict: "ignore", trust: false, maxSize: 20, maxExpand: 500, output: "htmlAndMathml" };

/** Draw TeX into an element; false where it cannot be read, and the element is left as it was. */
export function draw(element, tex, display) {
  const drawn = document.createElement("span");
  try {
    katex.render(tex, drawn, { ...OPTIONS, displayMode: display });
  } catch {
    return false;
  }
  element.replaceChildren(...drawn.childNodes);
  return true;
}
