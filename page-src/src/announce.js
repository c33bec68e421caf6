// For screen readers: whole sentences of the answer at most every two seconds, politely, instead of every token.
import { byId } from "./dom.js";

const EVERY = 2000;
let waiting = "";
let timer = 0;

/** Say something as soon as it is polite to. */
export function announce(text) {
  waiting += `${waiting ? " " : ""}${text}`;
  timer ||= setTimeout(speak, 100);
}

function speak() {
  byId("announcer").textContent = waiting;
  waiting = "";
  timer = 0;
}

/** Reads an answer out as it grows: hear(text) with all there is, then done(). */
export class Reader {
  constructor() {
    this.said = 0;
    this.last = 0;
  }

  hear(text) {
    if (performance.now() - this.last < EVERY) return;
    const end = lastSentence(text, this.said);
    if (end <= this.said) return;
    this.last = performance.now();
    announce(text.slice(this.said, end));
    this.said = end;
  }

  done(text, how) {
    announce(`${text.slice(this.said)} ${how}`.trim());
  }
}

function lastSentence(text, from) {
  const found = [...text.slice(from).matchAll(/[.!?:\n]\s/g)].pop();
  return found ? from + found.index + found[0].length : from;
}
