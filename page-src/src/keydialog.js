// Asks for the API key. It is kept for this tab alone (sessionStorage) and sent to this server alone.
import { key } from "./api.js";
import { el, showDialog } from "./dom.js";

let asking = null;

/** Resolves to true if the user gave a key. Asked from several places at once, there is one dialog. */
export function askKey(reason) {
  asking ??= new Promise((resolve) => {
    let given = false;
    const field = el("input", {
      type: "password",
      id: "api-key",
      autocomplete: "off",
      spellcheck: "false",
      required: true,
    });
    const form = el(
      "form",
      { class: "settings" },
      el("p", {}, "This server answers only to those who have a key."),
      key.get() && el("p", { class: "trouble-text", role: "alert" }, reason),
      el("label", { class: "block", for: "api-key" }, "API key"),
      field,
      el("small", {}, "Kept in this tab until it is closed, and sent to this server only."),
      el("div", { class: "dialog-foot" }, el("button", { type: "submit", class: "primary" }, "Go on")),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      given = Boolean(field.value.trim());
      if (given) key.set(field.value.trim());
      dialog.close();
    });
    const dialog = showDialog("API key", form, {
      className: "small",
      onclose: () => {
        asking = null;
        resolve(given);
      },
    });
    field.focus();
  });
  return asking;
}
