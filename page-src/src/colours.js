// Colours for as many experts as there are, and the fading of the others while one is pointed at. Rules are added to the
// page's own style sheet; style.css has the colours themselves.
import { COLOURS } from "./experts.js";

let added = 0;

/** Make sure that every expert has a rule. */
export function addColours({ list }) {
  const sheet = [...document.styleSheets].find(({ href }) => href?.endsWith("style.css"));
  for (const { index } of list) {
    if (index < added) continue;
    added = index + 1;
    sheet.insertRule(`.e${index} { --s: var(--c${index % COLOURS}); }`);
    sheet.insertRule(
      `[data-focus="${index}"] .tok:not(.e${index}) { opacity: .35; background: none; }`,
      sheet.cssRules.length,
    );
  }
}
