// What state the server is in. While it loads, drains or is gone it is asked once a second, and "change" tells of news.
import { ApiError, getJson } from "./api.js";
import { Experts } from "./experts.js";

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

export class Server extends EventTarget {
  constructor() {
    super();
    this.state = "asking"; // asking, ready, loading, draining, away (the server behind it), gone
    this.progress = null; // 0 to 1, or null
    this.message = "";
    this.models = [];
    this.experts = new Experts();
    this.askKey = async () => false; // asks the user for the API key; true if there is one now
    this.watching = null;
  }

  /** Whether models and experts are known, from this or an earlier meeting. */
  get met() {
    return this.models.length > 0;
  }

  /** Learn models and experts; waits until the server can answer. */
  async meet() {
    for (;;) {
      try {
        await this.#health();
        const [models, experts] = await Promise.all([getJson("v1/models"), Experts.load()]);
        this.models = Array.isArray(models.data) ? models.data : [];
        this.experts = experts;
        return this.#become("ready");
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        if (error.status === 401 && (await this.askKey(error.message))) continue;
        this.#fail(error);
        if (error.status === 401) return undefined; // until the user enters a key
        await pause(1000);
      }
    }
  }

  /** Resolves once the server is ready again; at once if it is. One that came back may hold another model. */
  ready() {
    this.watching ??= this.meet().finally(() => {
      this.watching = null;
    });
    return this.watching;
  }

  async #health() {
    try {
      await getJson("health");
    } catch (error) {
      const empty = error instanceof SyntaxError; // a plain 200 is an answer, too
      if (!empty && !(error instanceof ApiError && [404, 405].includes(error.status))) throw error;
    }
  }

  #fail(error) {
    const { status, body } = error;
    const said = body?.status ?? body?.error?.code ?? "";
    const progress = body?.progress ?? body?.error?.progress;
    this.progress = Number.isFinite(progress)
      ? Math.max(0, Math.min(1, progress > 1 ? progress / 100 : progress))
      : null;
    const word = body?.stage ?? body?.message ?? body?.error?.message;
    this.message = typeof word === "string" ? word : "";
    if (status === 503 && said === "unreachable") this.#become("away");
    else if (status === 503) this.#become(/drain|shut|stop/i.test(String(said)) ? "draining" : "loading");
    else if (status === 401) this.#become("locked");
    else {
      this.message = status ? error.message : "";
      this.#become("gone");
    }
  }

  #become(state) {
    this.state = state;
    this.dispatchEvent(new Event("change"));
  }
}
