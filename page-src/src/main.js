// The page: makes the parts, and is where they meet. Each part shows one thing and calls an action here to change it.
import { askKey } from "./keydialog.js";
import { Composer } from "./composer.js";
import { addColours } from "./colours.js";
import { addNode, choose, forgetOlder, newConversation, path, siblings } from "./conversation.js";
import { byId, copyText, el, fill, icon } from "./dom.js";
import { castOf, sameExperts } from "./experts.js";
import { Frame } from "./frame.js";
import { listen, showShortcuts } from "./keyboard.js";
import { Panel } from "./panel.js";
import { requestOf } from "./request.js";
import { Run } from "./run.js";
import { Server } from "./server.js";
import { MODES, Settings } from "./settings.js";
import { openSettings } from "./settingsdialog.js";
import { Sidebar } from "./sidebar.js";
import { Store } from "./store.js";
import { Thread } from "./thread.js";
import { TokenCard } from "./tokencard.js";
import { drawWelcome } from "./welcome.js";

const SAVE_EVERY = 2000; // ms, while an answer comes

class Page {
  constructor(store) {
    this.store = store;
    this.settings = new Settings();
    this.server = new Server();
    this.server.askKey = askKey;
    this.runs = new Map(); // message id -> its Run
    this.talk = newConversation({ system: this.settings.get("system") });
    this.frame = new Frame({ settings: this.settings, server: this.server, act: this });
    this.composer = new Composer(this);
    this.thread = new Thread({ act: this, server: this.server, runs: this.runs });
    this.sidebar = new Sidebar({ store, act: this });
    this.panel = new Panel({
      server: this.server,
      settings: this.settings,
      act: {
        setMask: (mask) => this.setMask(mask),
        compareMask: () => this.askAgain(this.latestSpoken(), this.talk.only),
        latest: () => this.latestSpoken(),
        talk: () => this.talk,
      },
    });
    this.card = new TokenCard({ nodeOf: (id) => this.talk.nodes[id], server: this.server, settings: this.settings });
    this.#wire();
  }

  #wire() {
    this.server.addEventListener("change", () => this.#serverChanged());
    byId("settings").addEventListener("click", () => this.openSettings());
    byId("shortcuts").addEventListener("click", showShortcuts);
    addEventListener("hashchange", () => this.#fromAddress());
    addEventListener("pagehide", () => this.runs.size && this.#save(this.talk));
    this.store.onChange((id) => this.#changedElsewhere(id));
    listen(
      {
        create: () => this.create(),
        search: () => this.frame.search(),
        sidebar: () => this.frame.toggle("sidebar"),
        panel: () => this.frame.toggle("panel"),
        mode: () => this.#nextMode(),
        settings: () => this.openSettings(),
        again: () => this.latest() && !this.running && this.askAgain(this.latest()),
        help: showShortcuts,
        copy: () => this.latest() && copyText(this.latest().content).then(() => this.tell("Copied.")),
      },
      () => this.#escape(),
    );
  }

  async start() {
    if (!this.store.lasting) this.tell("This browser keeps nothing: conversations are gone when the tab closes.");
    await this.#fromAddress();
    this.composer.focus();
    await this.server.ready();
  }

  #serverChanged() {
    const { experts, state } = this.server;
    if (state === "ready" && experts !== this.experts) {
      this.experts = experts;
      addColours(experts);
      this.panel.build();
      this.thread.recast();
      this.#draw();
    }
    drawWelcome(this.server);
    this.frame.banner();
    this.frame.title(this.talk);
  }

  // The conversation

  /** The run of the conversation on the screen, or undefined. */
  get running() {
    return [...this.runs.values()].find((run) => run.talk === this.talk);
  }

  /** The newest answer that is seen, or null. */
  latest() {
    if (this.thread.pair) return this.talk.nodes[this.thread.pair[1]] ?? null;
    return (
      path(this.talk)
        .reverse()
        .find(({ role }) => role === "assistant") ?? null
    );
  }

  /** The newest message that says who spoke, or null. */
  latestSpoken() {
    const latest = this.latest();
    return latest?.pieces?.length || this.thread.pair
      ? latest
      : (path(this.talk)
          .reverse()
          .find(({ pieces }) => pieces?.length) ?? latest);
  }

  send(text) {
    if (this.running) return false;
    this.closePair();
    const last = path(this.talk).pop();
    const question = addNode(this.talk, last?.id ?? null, { role: "user", content: text });
    this.#answer(question);
    return true;
  }

  editQuestion(node, text) {
    if (this.running) this.stop();
    const question = addNode(this.talk, node.parent, { role: "user", content: text });
    this.#answer(question);
    this.composer.focus();
  }

  editLast() {
    const view = [...this.thread.views.values()].reverse().find((one) => one.edit);
    view?.edit();
  }

  /** Another answer to the same question; with a mask, beside the one that is there. */
  askAgain(node, mask) {
    if (this.running) return this.tell("One answer at a time: stop this one first.");
    const question = this.talk.nodes[node.parent];
    const added = this.#answer(
      question,
      mask === undefined ? { only: this.talk.only ?? this.#maskOf(node) } : { only: mask, quiet: true },
    );
    if (mask !== undefined) this.thread.compare(node.id, added.id);
    return added;
  }

  #maskOf(node) {
    const { experts } = this.server;
    return sameExperts(castOf(node, experts), experts) ? (node.only ?? null) : null;
  }

  /** The same message again, in its own place. */
  retry(node) {
    if (this.running) return;
    this.#run(node);
  }

  /** Send less of what was said before, and try again. */
  forget(node) {
    if (forgetOlder(this.talk, node.parent)) this.retry(node);
    else this.tell("There is nothing older to leave out: shorten the question, or begin a new conversation.");
  }

  compareWith(node) {
    const { ids, at } = siblings(this.talk, node.id);
    this.thread.compare(ids[at > 0 ? at - 1 : at + 1], node.id);
    this.panel.update();
  }

  keep(node) {
    choose(this.talk, node.id);
    this.closePair();
    this.#save(this.talk);
    this.composer.focus();
  }

  closePair() {
    if (!this.thread.pair) return;
    this.thread.pair = null;
    this.#draw();
  }

  choose(id) {
    choose(this.talk, id);
    this.#draw();
    this.#save(this.talk);
  }

  siblings(node) {
    return siblings(this.talk, node.id);
  }

  setMask(mask) {
    this.talk.only = mask;
    this.talk.names = mask ? this.server.experts.list.map(({ name }) => name) : undefined;
    if (path(this.talk).length) this.#save(this.talk);
    this.panel.update();
    this.frame.mask(this.talk);
  }

  stop() {
    this.running?.stop();
  }

  inspect(view) {
    this.card.inspect(view);
  }

  // Answers

  #answer(question, { only = this.talk.only, quiet = false } = {}) {
    const node = addNode(this.talk, question.id, { role: "assistant", content: "", only, system: this.talk.system });
    this.#run(node, { quiet });
    return node;
  }

  async #run(node, { quiet = false } = {}) {
    const { talk } = this;
    const run = new Run({
      node,
      server: this.server,
      body: () => requestOf({ talk, node, server: this.server, settings: this.settings }),
    });
    run.talk = talk;
    this.runs.set(node.id, run);
    const stopSaving = this.#keepSaving(talk);
    if (!quiet) {
      this.thread.forget(node.id);
      this.#draw();
      this.thread.toEnd();
    }
    this.#busy();
    if (document.activeElement === document.body) this.composer.focus(); // the button that was pressed is gone
    await run.finish();
    stopSaving();
    this.runs.delete(node.id);
    if (["gone", "broke"].includes(node.error?.kind)) this.server.ready(); // says so above, and when it is back
    talk.updated = Date.now();
    this.#save(talk);
    this.#busy();
  }

  // Saving a long conversation takes longer; it may take a fiftieth of the time.
  #keepSaving(talk) {
    let timer = 0;
    const save = () => {
      const start = performance.now();
      this.#save(talk, { listed: timer !== 0 });
      timer = setTimeout(save, Math.max(SAVE_EVERY, 50 * (performance.now() - start)));
    };
    save();
    return () => clearTimeout(timer);
  }

  /** A view has drawn what is new. */
  drawn() {
    this.panel.update();
  }

  #busy() {
    this.composer.setBusy(Boolean(this.running));
    this.frame.mask(this.talk);
    this.panel.update();
  }

  // Which conversation

  create() {
    this.#open(newConversation({ system: this.settings.get("system") }));
    this.frame.closeOverlays();
    this.composer.focus();
  }

  async open(id) {
    const running = [...this.runs.values()].find((run) => run.talk.id === id);
    const talk = running?.talk ?? (await this.store.get(id));
    if (talk) this.#open(talk);
    this.frame.closeOverlays();
  }

  #open(talk) {
    this.card.hide();
    this.talk = talk;
    history.replaceState(null, "", path(talk).length ? `#${talk.id}` : location.pathname + location.search);
    this.#draw({ fresh: true });
    this.thread.toEnd();
    this.#busy();
    this.sidebar.refresh(talk.id);
  }

  async #fromAddress() {
    const id = location.hash.slice(1);
    const talk = id ? await this.store.get(id) : null;
    if (!id || id !== this.talk.id) this.#open(talk ?? newConversation({ system: this.settings.get("system") }));
  }

  async changed(id, fields) {
    const talk = id === this.talk.id ? this.talk : await this.store.get(id);
    await this.#save(Object.assign(talk, fields));
    this.frame.title(this.talk);
  }

  async removed(id) {
    for (const run of this.runs.values()) if (run.talk.id === id) run.stop();
    this.gone = (this.gone ?? new Set()).add(id);
    await this.store.remove(id);
    if (id === this.talk.id) this.create();
  }

  async #changedElsewhere(id) {
    this.sidebar.refresh();
    if (id !== this.talk.id || this.running) return;
    const talk = await this.store.get(id);
    if (talk && talk.updated > this.talk.updated) this.#open(talk);
    else if (talk) this.frame.title(Object.assign(this.talk, { title: talk.title, named: talk.named }));
  }

  async #save(talk, { listed = false } = {}) {
    if (this.gone?.has(talk.id)) return;
    try {
      await this.store.put(talk);
    } catch (error) {
      this.tell(`This conversation could not be kept: ${error.message}`, "trouble");
    }
    if (talk === this.talk && path(talk).length && location.hash !== `#${talk.id}`)
      history.replaceState(null, "", `#${talk.id}`);
    if (!listed) this.sidebar.refresh(this.talk.id);
  }

  // A mask is for the mixture that it was made for.
  #checkMask() {
    const { experts, met } = this.server;
    if (!met || !this.talk.only || sameExperts(castOf(this.talk, experts), experts)) return;
    this.setMask(null);
    this.tell("The mask of this conversation was for another mixture; all may speak.");
  }

  #draw(options) {
    this.#checkMask();
    this.thread.show(this.talk, options);
    this.panel.update();
    this.frame.title(this.talk);
    this.frame.mask(this.talk);
  }

  // Around it

  async enterKey() {
    if (await askKey("")) this.server.ready();
  }

  openSettings() {
    openSettings({
      settings: this.settings,
      talk: this.talk,
      models: this.server.models,
      changed: (system) => {
        this.talk.system = system;
        if (path(this.talk).length) this.#save(this.talk);
      },
    });
  }

  #nextMode() {
    const names = MODES.map(({ name }) => name);
    const next = names[(names.indexOf(this.settings.get("mode")) + 1) % names.length];
    this.settings.set("mode", next);
    this.tell(`Speakers: ${MODES.find(({ name }) => name === next).label.toLowerCase()}`);
  }

  #escape() {
    if (this.card.visible) this.card.hide();
    else if (this.frame.closeOverlays()) return true;
    else if (this.running) this.stop();
    else if (this.thread.pair) this.closePair();
    else return false;
    return true;
  }

  /** A line at the bottom for a few seconds. */
  tell(text, kind = "") {
    const line = el("p", { class: kind }, kind ? icon("alert") : null, text);
    fill(byId("toast"), line);
    setTimeout(() => line.remove(), kind ? 9000 : 3500);
  }
}

new Page(await Store.open()).start();
