// Keyboard shortcuts. All have a modifier or are Escape, so that none is typed by accident or by a voice.
import { el, showDialog } from "./dom.js";

const MAC = /Mac|iPhone|iPad/.test(navigator.platform);
const CTRL = MAC ? "⌘" : "Ctrl";

/** [keys as shown, what it does, name of the action, test of the event] */
export const SHORTCUTS = [
  [["Enter"], "Send"],
  [["Shift", "Enter"], "New line"],
  [["↑"], "Edit the last question, in an empty field"],
  [["Esc"], "Stop the answer, close what is open"],
  [[CTRL, "Shift", "O"], "New conversation", "create", (e) => e.shiftKey && e.code === "KeyO"],
  [[CTRL, "K"], "Search conversations", "search", (e) => !e.shiftKey && e.code === "KeyK"],
  [[CTRL, "Shift", "S"], "Show or hide the conversations", "sidebar", (e) => e.shiftKey && e.code === "KeyS"],
  [[CTRL, "Shift", "E"], "Show or hide who speaks", "panel", (e) => e.shiftKey && e.code === "KeyE"],
  [[CTRL, "."], "Speakers by colour, underline, names, or not at all", "mode", (e) => e.key === "."],
  [[CTRL, "Shift", "Y"], "Answer again", "again", (e) => e.shiftKey && e.code === "KeyY"],
  [[CTRL, "Shift", "C"], "Copy the last answer", "copy", (e) => e.shiftKey && e.code === "KeyC"],
  [[CTRL, ","], "Settings", "settings", (e) => e.key === ","],
  [[CTRL, "/"], "These shortcuts", "help", (e) => e.key === "/"],
];

/** Call the actions by name; `escape()` says whether it had something to stop or close. */
export function listen(actions, escape) {
  document.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Escape") {
      if (!document.querySelector("dialog[open]") && escape()) event.preventDefault();
      return;
    }
    if (!(MAC ? event.metaKey : event.ctrlKey) || event.altKey) return;
    const found = SHORTCUTS.find(([, , name, test]) => name && test(event));
    if (!found || (document.querySelector("dialog[open]") && found[2] !== "mode")) return;
    event.preventDefault();
    actions[found[2]]();
  });
}

/** The list, as a dialog. */
export function showShortcuts() {
  const rows = SHORTCUTS.map(([keys, what]) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, what),
      el(
        "td",
        {},
        keys.map((name) => el("kbd", {}, name)),
      ),
    ),
  );
  showDialog("Keyboard", el("table", { class: "shortcuts" }, el("tbody", {}, rows)));
}
