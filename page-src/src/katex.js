// Formulas, loaded when the first one appears. Nothing in a formula may load, link or style anything outside itself.
import katex from "katex";

const OPTIONS = {
  throwOnError: true,
  strict: "ignore",
  trust: false,
  maxSize: 20,
  maxExpand: 500,
  output: "htmlAndMathml",
};

// KaTeX gives a few MathML elements a style attribute, which the page's CSP forbids; what is seen is not MathML's.
function unstyle(node) {
  if (node.attributes) delete node.attributes.style;
  node.children?.forEach(unstyle);
}

/** Draw TeX into an element; false where it cannot be read, and the element is left as it was. */
export function draw(element, tex, display) {
  let tree;
  try {
    tree = katex.__renderToDomTree(tex, { ...OPTIONS, displayMode: display });
  } catch {
    return false;
  }
  unstyle(tree);
  element.replaceChildren(tree.toNode());
  return true;
}
