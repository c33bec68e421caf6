// One answer in the making: asks, waits where it must, and fills the message's node. Views look at the node whenever
// "change" comes; nothing is taken back, so they only draw what is new.
//
// Before the first word every trouble that passes by itself is waited out (429 for as long as the server says, 503 while
// it loads) or asked about (401); after it, what came stays and the trouble is told.
import { ApiError, chat } from "./api.js";

const LONGEST_WAIT = 60; // seconds that a 429 may ask for before the user has to decide
const TRIES = 10;

export class Run extends EventTarget {
  /** `body()` makes the request; it is called once models and experts are known. */
  constructor({ node, body, server }) {
    super();
    Object.assign(this, { node, body, server });
    this.abort = new AbortController();
    this.note = ""; // what is being waited for, in words
    this.started = 0;
    Object.assign(node, { content: "", pieces: [] });
    for (const old of ["error", "finish", "usage", "routes", "weights", "reasoning", "seconds", "names"])
      delete node[old];
  }

  stop() {
    this.abort.abort();
  }

  /** Resolves when the answer is whole, stopped, or failed; `node.finish` or `node.error` says which. */
  async finish() {
    for (let tries = 1; ; tries += 1) {
      try {
        await this.#listen();
        break;
      } catch (error) {
        if (this.abort.signal.aborted) {
          this.node.finish = "stopped";
          break;
        }
        if (tries < TRIES && !this.node.content && (await this.#waited(error).catch(() => false))) continue;
        if (this.abort.signal.aborted) this.node.finish = "stopped";
        else this.node.error = told(error, this.node);
        break;
      }
    }
    this.#tell("");
    this.dispatchEvent(new Event("end"));
  }

  async #listen() {
    const { node } = this;
    if (!this.server.met) await this.#serverReady();
    this.#tell("");
    for await (const part of chat(this.body(), this.abort.signal)) {
      if (part.content !== undefined) this.#add(part);
      if (part.cast) this.#cast(part.cast);
      if (part.finish) node.finish = part.finish;
      if (part.usage)
        node.usage = { prompt_tokens: part.usage.prompt_tokens, completion_tokens: part.usage.completion_tokens };
      if (part.routes) node.routes = part.routes;
      if (part.weights) node.weights = part.weights;
      this.dispatchEvent(new Event("change"));
    }
  }

  #add({ content, speakers, reasoning }) {
    const { node } = this;
    const now = performance.now();
    this.started ||= now;
    node.seconds = Math.round(now - this.started) / 1000;
    node.content += content;
    if (this.server.experts.known) node.names ??= this.server.experts.list.map(({ name }) => name);
    node.pieces.push(...this.server.experts.pieces(content, speakers));
    if (reasoning) node.reasoning = (node.reasoning ?? "") + reasoning;
  }

  // Who spoke, known only now that all was said: the pieces are cut anew, and views draw them again.
  #cast(speakers) {
    const { node } = this;
    const pieces = this.server.experts.pieces(node.content, speakers);
    if (pieces.some(([, expert]) => expert >= 0)) node.pieces = pieces;
  }

  // True where it is worth asking again.
  async #waited(error) {
    if (!(error instanceof ApiError)) return false;
    if (error.status === 401) return this.server.askKey(error.message);
    if (error.status === 429 && (error.retryAfter ?? 1) <= LONGEST_WAIT) return this.#queued(error.retryAfter ?? 2);
    if (error.status === 503) {
      await this.#serverReady();
      return !this.abort.signal.aborted;
    }
    return false;
  }

  async #serverReady() {
    this.#tell("The server is not ready yet; the question is sent as soon as it is.");
    await Promise.race([this.server.ready(), aborted(this.abort.signal)]);
    this.abort.signal.throwIfAborted();
  }

  async #queued(seconds) {
    for (let left = Math.ceil(seconds); left > 0 && !this.abort.signal.aborted; left -= 1) {
      this.#tell(`The server is busy; asking again in ${left} s.`);
      await Promise.race([new Promise((resolve) => setTimeout(resolve, 1000)), aborted(this.abort.signal)]);
    }
    return !this.abort.signal.aborted;
  }

  #tell(note) {
    this.note = note;
    this.dispatchEvent(new Event("change"));
  }
}

const aborted = (signal) =>
  new Promise((resolve) => {
    if (signal.aborted) resolve();
    else signal.addEventListener("abort", resolve, { once: true });
  });

/** What failed, as the message keeps it. */
function told(error, node) {
  if (!(error instanceof ApiError)) console.error(error);
  const { status = 0, code = null } = error;
  const kind =
    code === "context_length_exceeded"
      ? "long"
      : ({ 0: "gone", 401: "key", 429: "busy", 503: "loading" }[status] ?? "refused");
  return { kind: node.content ? "broke" : kind, message: error.message, status };
}
