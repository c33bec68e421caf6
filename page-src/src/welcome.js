// What an empty conversation shows: what this is, who may speak.
import { byId, el, fill } from "./dom.js";
import { swatch } from "./sharebar.js";

/** Draw it for what is known of the server. */
export function drawWelcome({ experts, state }) {
  const known = experts.known;
  const many = experts.list.length;
  const said = known
    ? `${words(many)} experts, ${experts.topK === 1 ? "one of them" : `${words(experts.topK).toLowerCase()} of them`} at work on each token. Every word of an answer wears the colour of the expert that had most say in it.`
    : state === "ready"
      ? "This server does not tell which expert speaks, so this is a plain chat."
      : "";
  byId("prompt").placeholder = known ? "Ask the mixture" : "Ask anything";
  fill(
    byId("welcome"),
    el("h2", {}, known ? "What shall they work on?" : "What shall it work on?"),
    el("p", {}, said),
    known && many <= 24
      ? el(
          "ul",
          { class: "who", role: "list" },
          experts.list.map(({ index, name }) => el("li", {}, swatch(index), name)),
        )
      : null,
  );
}

const WORDS = ["No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve"];
const words = (count) => WORDS[count] ?? String(count);
