// The conversations of this browser: found, opened, renamed, deleted, taken away as a file and brought back.
import { byId, confirmDialog, el, fill, iconButton } from "./dom.js";
import { openMenu } from "./menu.js";
import { exported, fresh, imported } from "./transfer.js";

const LARGEST_FILE = 200e6;
const DAY = 86_400_000;

export class Sidebar {
  /** act: open(id), create(), changed(id), removed(id), tell(text) */
  constructor({ store, act }) {
    Object.assign(this, { store, act });
    this.list = byId("talks");
    this.search = byId("search");
    this.current = null;
    this.search.addEventListener("input", () => this.refresh());
    byId("new-talk").addEventListener("click", () => act.create());
    byId("more").addEventListener("click", () => this.#more());
    byId("import-file").addEventListener("change", (event) => this.#import(event.target));
  }

  /** Show what the store holds now. */
  async refresh(current = this.current) {
    this.current = current;
    const text = this.search.value.trim();
    const found = text ? await this.store.search(text) : null;
    if (text !== this.search.value.trim() || this.list.querySelector("input")) return; // typed on, or renaming
    const focused = this.list.contains(document.activeElement) ? document.activeElement : null;
    const rows = (await this.store.list()).filter(({ id }) => !found || found.has(id));
    const groups = Map.groupBy ? Map.groupBy(rows, ageOf) : grouped(rows);
    fill(
      this.list,
      rows.length
        ? [...groups].map(([age, some]) =>
            el(
              "section",
              {},
              el("h3", {}, age),
              el(
                "ul",
                { role: "list" },
                some.map((row) => this.#row(row)),
              ),
            ),
          )
        : el("p", { class: "note" }, text ? "Nothing found." : "Conversations are kept in this browser only."),
    );
    if (focused) this.#focusAgain(focused);
  }

  // The list is made anew; whoever was in it with the keyboard stays at the same place.
  #focusAgain(gone) {
    const item = this.list.querySelector(`[data-talk="${gone.closest("[data-talk]")?.dataset.talk}"]`);
    item?.children[gone.classList.contains("talk") ? 0 : 1]?.focus();
  }

  #row({ id, title }) {
    const open = el(
      "button",
      {
        type: "button",
        class: "talk",
        "aria-current": id === this.current ? "page" : null,
        title,
        onclick: () => this.act.open(id),
      },
      title || "New conversation",
    );
    const more = iconButton(
      "more",
      `More for ${title || "this conversation"}`,
      () =>
        openMenu(more, [
          { label: "Rename", action: () => this.#rename(id, item) },
          { label: "Export", action: async () => this.#download([await this.store.get(id)]) },
          { label: "Delete", action: () => this.remove(id), danger: true },
        ]),
      { "aria-haspopup": "menu", "aria-expanded": "false" },
    );
    const item = el("li", { "data-talk": id }, open, more);
    return item;
  }

  async #rename(id, item) {
    const talk = await this.store.get(id);
    const field = el("input", { type: "text", "aria-label": "Name", maxlength: "120" });
    field.value = talk.title;
    let done = false;
    const finish = async (keep) => {
      if (done) return;
      done = true;
      field.remove();
      if (keep && field.value.trim()) await this.act.changed(id, { title: field.value.trim(), named: true });
      this.refresh();
    };
    field.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter") finish(true);
      if (event.key === "Escape") {
        event.stopPropagation();
        finish(false);
      }
    });
    field.addEventListener("blur", () => finish(true));
    fill(item, field);
    field.focus();
    field.select();
  }

  /** Delete a conversation, after a question. */
  async remove(id) {
    const talk = await this.store.get(id);
    if (
      !talk ||
      !(await confirmDialog(`“${talk.title || "New conversation"}” is deleted from this browser for good.`, {
        title: "Delete conversation?",
        yes: "Delete",
      }))
    )
      return;
    await this.act.removed(id);
    this.refresh();
  }

  #more() {
    openMenu(byId("more"), [
      { label: "Export all conversations", action: async () => this.#download(await this.store.all()) },
      { label: "Import conversations", action: () => byId("import-file").click() },
      { label: "Delete all conversations", action: () => this.#removeAll(), danger: true },
    ]);
  }

  async #removeAll() {
    const all = await this.store.list();
    if (
      !all.length ||
      !(await confirmDialog(
        `All ${all.length} conversations are deleted from this browser for good. Export them first to keep a copy.`,
        { title: "Delete everything?", yes: "Delete all" },
      ))
    )
      return;
    for (const { id } of all) await this.act.removed(id);
    this.refresh();
  }

  #download(talks) {
    const address = URL.createObjectURL(new Blob([exported(talks)], { type: "application/json" }));
    const name =
      talks.length === 1
        ? talks[0].title
            .replace(/[^\p{L}\p{N}]+/gu, "-")
            .slice(0, 40)
            .replace(/^-|-$/g, "") || "conversation"
        : "conversations";
    el("a", { href: address, download: `octad-${name}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10_000);
  }

  async #import(input) {
    const [file] = input.files;
    input.value = "";
    if (!file) return;
    try {
      if (file.size > LARGEST_FILE) throw new Error("This file is larger than 200 MB.");
      const talks = imported(await file.text());
      const added = fresh(talks, await this.store.all());
      for (const talk of added) await this.store.put(talk);
      const known = talks.length - added.length;
      this.act.tell(
        `${added.length} conversation${added.length === 1 ? "" : "s"} imported${known ? `, ${known} known already` : ""}.`,
      );
      this.refresh();
    } catch (error) {
      this.act.tell(`Nothing was imported. ${error.message}`, "trouble");
    }
  }
}

function ageOf({ updated }) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (updated >= midnight) return "Today";
  if (updated >= midnight - DAY) return "Yesterday";
  if (updated >= midnight - 7 * DAY) return "Last seven days";
  return "Earlier";
}

function grouped(rows) {
  const groups = new Map();
  for (const row of rows) groups.set(ageOf(row), [...(groups.get(ageOf(row)) ?? []), row]);
  return groups;
}
