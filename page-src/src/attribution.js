// Which piece of the source does rendered text come from? The Markdown parser lags behind by the few characters it is not
// yet sure of, and drops those that are markup; what it renders is otherwise the source's characters in their order. So
// one pointer into the source, moved to each rendered character in turn, tells whose it is, at constant cost.

export class Attribution {
  constructor() {
    this.source = ""; // what has been fed and not been rendered yet
    this.ends = []; // [{end, piece}]: where in `source` each piece ends
    this.last = -1;
  }

  /** Text that the parser gets next, and the number of the piece that it belongs to. */
  feed(text, piece) {
    if (!text) return;
    this.source += text;
    this.ends.push({ end: this.source.length, piece });
  }

  /** Rendered text as [[text, piece]]: neighbours of one piece together. */
  split(rendered) {
    const runs = [];
    let at = 0; // in source
    let run = 0; // in ends
    for (const char of rendered) {
      const found = this.source.startsWith(char, at) ? at : this.#seek(char, at);
      if (found >= 0) {
        at = found + char.length;
        while (run < this.ends.length - 1 && this.ends[run].end < at) run += 1;
        this.last = this.ends[run].piece;
      }
      const before = runs[runs.length - 1];
      if (before?.[1] === this.last) before[0] += char;
      else runs.push([char, this.last]);
    }
    this.#drop(at);
    return runs;
  }

  /** Take runs that `split` gave back in front of what has not been rendered yet: they will come again. */
  unread(runs) {
    let end = 0;
    const again = runs.map(([text, piece]) => ({ end: (end += text.length), piece }));
    this.ends = [...again, ...this.ends.map((later) => ({ ...later, end: later.end + end }))];
    this.source = runs.map(([text]) => text).join("") + this.source;
  }

  // The parser writes the spaces of an indent for a tab; they must not pull the pointer to a later space.
  #seek(char, at) {
    return char === " " && this.source[at] === "\t" ? -1 : this.source.indexOf(char, at);
  }

  #drop(count) {
    this.source = this.source.slice(count);
    this.ends = this.ends.map(({ end, piece }) => ({ end: end - count, piece })).filter(({ end }) => end > 0);
  }
}
