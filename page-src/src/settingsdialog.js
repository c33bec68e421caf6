// The dialog of system prompt, sampling and presets.
import { el, fill, showDialog } from "./dom.js";
import { SAMPLING } from "./settings.js";

/** Open it; `changed(system)` is called with the conversation's new system prompt. */
export function openSettings({ settings, talk, models, changed }) {
  const system = el("textarea", {
    id: "system",
    rows: "4",
    placeholder: "How the model should behave, in this conversation",
  });
  system.value = talk.system;
  system.addEventListener("input", () => changed(system.value));
  const always = el("input", {
    type: "checkbox",
    onchange: () => settings.set("system", always.checked ? system.value : ""),
  });
  always.checked = Boolean(settings.get("system")) && settings.get("system") === talk.system;
  const presets = el("div", { class: "presets", role: "group", "aria-label": "Presets" });
  const fields = el("div", { class: "fields" });
  const draw = () => {
    fill(presets, presetButtons(settings, system, changed, draw));
    fill(
      fields,
      SAMPLING.map((field) =>
        samplingField(settings, field, () => fill(presets, presetButtons(settings, system, changed, draw))),
      ),
    );
  };
  draw();
  showDialog(
    "Settings",
    el(
      "form",
      { method: "dialog", class: "settings" },
      modelField(settings, models),
      el("label", { class: "block", for: "system" }, "System prompt"),
      system,
      el("label", { class: "check" }, always, el("span", {}, "Also for new conversations")),
      el("h3", {}, "Sampling"),
      presets,
      fields,
    ),
  );
}

function modelField(settings, models) {
  if (models.length < 2) return null;
  const select = el(
    "select",
    { id: "model", onchange: () => settings.set("model", select.value) },
    models.map(({ id }) => el("option", { value: id }, id)),
  );
  if (models.some(({ id }) => id === settings.get("model"))) select.value = settings.get("model");
  return el("div", { class: "field-row" }, el("label", { class: "block", for: "model" }, "Model"), select);
}

function presetButtons(settings, system, changed, redraw) {
  const now = settings.presetName();
  const buttons = settings.presets().map((preset) =>
    el(
      "span",
      { class: "preset" },
      el(
        "button",
        {
          type: "button",
          class: "toggle",
          "aria-pressed": preset.name === now,
          onclick: () => {
            settings.set("sampling", { ...settings.get("sampling"), ...preset.values });
            if (preset.own && preset.system !== undefined) {
              system.value = preset.system;
              changed(preset.system);
            }
            redraw();
          },
        },
        preset.name,
      ),
      preset.own &&
        el(
          "button",
          {
            type: "button",
            class: "toggle drop",
            "aria-label": `Delete preset ${preset.name}`,
            onclick: () => {
              settings.set(
                "presets",
                settings.get("presets").filter(({ name }) => name !== preset.name),
              );
              redraw();
            },
          },
          "×",
        ),
    ),
  );
  return [
    ...buttons,
    el(
      "button",
      { type: "button", class: "link", onclick: (event) => askName(event.target, settings, system, redraw) },
      "Save as preset",
    ),
  ];
}

function askName(button, settings, system, redraw) {
  const field = el("input", {
    type: "text",
    class: "preset-name",
    "aria-label": "Name of the preset",
    placeholder: "Name",
    maxlength: "40",
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") event.stopPropagation();
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.preventDefault();
    const name = field.value.trim();
    if (event.key === "Enter" && name) {
      const others = settings.get("presets").filter((preset) => preset.name !== name);
      settings.set("presets", [...others, { name, values: { ...settings.get("sampling") }, system: system.value }]);
    }
    redraw();
  });
  button.replaceWith(field);
  field.focus();
}

function samplingField(settings, { name, label, min, max, step, help }, changed) {
  const value = settings.get("sampling")[name];
  const id = `sampling-${name}`;
  const field = el("input", {
    id,
    type: "number",
    min,
    max,
    step: step < 1 ? "any" : "1",
    placeholder: "server’s own",
    "aria-describedby": `${id}-help`,
    inputmode: "decimal",
  });
  if (value !== null) field.value = value;
  const note = el("small", { id: `${id}-help` }, help);
  field.addEventListener("input", () => {
    const typed = field.value === "" ? null : Number(field.value);
    const fits = field.validity.valid && (typed === null || (typed >= min && typed <= max));
    field.setAttribute("aria-invalid", !fits);
    note.textContent = fits
      ? help
      : `between ${min} and ${max.toLocaleString("en")}${step === 1 ? ", whole" : ""}; not used`;
    settings.set("sampling", { ...settings.get("sampling"), [name]: fits ? typed : null });
    changed();
  });
  return el("div", { class: "field" }, el("label", { for: id }, label), field, note);
}
