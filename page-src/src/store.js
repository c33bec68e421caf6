// Where conversations are kept: this browser's IndexedDB, nowhere else. Where the browser forbids that (some private
// windows), they live as long as the tab, and `lasting` is false.
import { textOf } from "./conversation.js";

const NAME = "octad";

const settled = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

function opened() {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => {
    request.result.createObjectStore("list", { keyPath: "id" });
    request.result.createObjectStore("talks", { keyPath: "id" });
  };
  return settled(request);
}

const entry = ({ id, title, updated }) => ({ id, title, updated });

export class Store {
  constructor(db) {
    this.db = db;
    this.memory = new Map();
    this.channel = "BroadcastChannel" in globalThis ? new BroadcastChannel(NAME) : null;
  }

  static async open() {
    try {
      return new Store(await opened());
    } catch {
      return new Store(null);
    }
  }

  get lasting() {
    return this.db !== null;
  }

  /** Call when another tab has changed a conversation, with its id. */
  onChange(heard) {
    this.channel?.addEventListener("message", ({ data }) => heard(data));
  }

  /** {id, title, updated} of all, the newest first. */
  async list() {
    const rows = this.db
      ? await settled(this.db.transaction("list").objectStore("list").getAll())
      : [...this.memory.values()].map(entry);
    return rows.sort((a, b) => b.updated - a.updated);
  }

  async get(id) {
    if (!this.db) return structuredClone(this.memory.get(id));
    return settled(this.db.transaction("talks").objectStore("talks").get(id));
  }

  async all() {
    if (!this.db) return [...this.memory.values()];
    return settled(this.db.transaction("talks").objectStore("talks").getAll());
  }

  async put(talk) {
    if (this.db) {
      await this.#write((list, talks) => {
        list.put(entry(talk));
        talks.put(talk);
      });
    } else this.memory.set(talk.id, structuredClone(talk));
    this.channel?.postMessage(talk.id);
  }

  async remove(id) {
    if (this.db) {
      await this.#write((list, talks) => {
        list.delete(id);
        talks.delete(id);
      });
    } else this.memory.delete(id);
    this.channel?.postMessage(id);
  }

  /** The ids of the conversations in which every word of the text occurs. */
  async search(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const found = new Set();
    const look = (talk) => {
      const all = textOf(talk);
      if (words.every((word) => all.includes(word))) found.add(talk.id);
    };
    if (!this.db) this.memory.forEach(look);
    else await this.#eachTalk(look);
    return found;
  }

  #eachTalk(look) {
    return new Promise((resolve, reject) => {
      const request = this.db.transaction("talks").objectStore("talks").openCursor();
      request.onerror = () => reject(request.error);
      request.onsuccess = () => {
        if (!request.result) return resolve();
        look(request.result.value);
        return request.result.continue();
      };
    });
  }

  #write(change) {
    return new Promise((resolve, reject) => {
      const transaction = this.db.transaction(["list", "talks"], "readwrite");
      transaction.oncomplete = () => resolve();
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
      change(transaction.objectStore("list"), transaction.objectStore("talks"));
    });
  }
}
