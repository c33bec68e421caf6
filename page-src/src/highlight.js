// Colours of code, loaded when the first block of code ends. Gives ranges instead of markup, so that the spans that say
// who spoke stay as they are.
import hljs from "@highlightjs/cdn-assets/es/core.min.js";
import bash from "@highlightjs/cdn-assets/es/languages/bash.min.js";
import c from "@highlightjs/cdn-assets/es/languages/c.min.js";
import cpp from "@highlightjs/cdn-assets/es/languages/cpp.min.js";
import css from "@highlightjs/cdn-assets/es/languages/css.min.js";
import diff from "@highlightjs/cdn-assets/es/languages/diff.min.js";
import go from "@highlightjs/cdn-assets/es/languages/go.min.js";
import java from "@highlightjs/cdn-assets/es/languages/java.min.js";
import javascript from "@highlightjs/cdn-assets/es/languages/javascript.min.js";
import json from "@highlightjs/cdn-assets/es/languages/json.min.js";
import markdown from "@highlightjs/cdn-assets/es/languages/markdown.min.js";
import python from "@highlightjs/cdn-assets/es/languages/python.min.js";
import rust from "@highlightjs/cdn-assets/es/languages/rust.min.js";
import sql from "@highlightjs/cdn-assets/es/languages/sql.min.js";
import typescript from "@highlightjs/cdn-assets/es/languages/typescript.min.js";
import xml from "@highlightjs/cdn-assets/es/languages/xml.min.js";
import yaml from "@highlightjs/cdn-assets/es/languages/yaml.min.js";

const LANGUAGES = {
  bash,
  c,
  cpp,
  css,
  diff,
  go,
  java,
  javascript,
  json,
  markdown,
  python,
  rust,
  sql,
  typescript,
  xml,
  yaml,
};
for (const [name, language] of Object.entries(LANGUAGES)) hljs.registerLanguage(name, language);

/** [{start, end, kind}] over the text, in order and without overlap; empty for a language that is not known. */
export function ranges(text, language) {
  if (!hljs.getLanguage(language)) return [];
  const found = [];
  let at = 0;
  const walk = (node, kind) => {
    if (typeof node === "string") {
      if (kind) found.push({ start: at, end: at + node.length, kind });
      at += node.length;
    } else {
      const own = node.scope ? node.scope.split(".")[0] : kind;
      for (const child of node.children) walk(child, own);
    }
  };
  walk(hljs.highlight(text, { language, ignoreIllegals: true })._emitter.rootNode, null);
  return found;
}
