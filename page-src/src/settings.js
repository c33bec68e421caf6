// What the user has chosen, kept in this browser: sampling, presets, looks. A value that is null is not sent: the server's
// own default holds.
const KEY = "octad.settings";

/** name in the request, label, limits of the field, and what it does. */
export const SAMPLING = [
  {
    name: "temperature",
    label: "Temperature",
    min: 0,
    max: 2,
    step: 0.05,
    help: "0 always takes the likeliest word; higher is more varied",
  },
  {
    name: "top_p",
    label: "Top-p",
    min: 0,
    max: 1,
    step: 0.01,
    help: "only the likeliest words that make up this share",
  },
  {
    name: "min_p",
    label: "Min-p",
    min: 0,
    max: 1,
    step: 0.01,
    help: "only words at least this likely, as a share of the likeliest",
  },
  {
    name: "repetition_penalty",
    label: "Repetition penalty",
    min: 0.5,
    max: 2,
    step: 0.01,
    help: "above 1, words that were said are less likely",
  },
  {
    name: "max_tokens",
    label: "Longest answer",
    min: 1,
    max: 1_000_000,
    step: 1,
    help: "in tokens; empty: as far as the context reaches",
  },
  { name: "seed", label: "Seed", min: 0, max: 2 ** 53 - 1, step: 1, help: "the same seed gives the same answer" },
];

const NOTHING = Object.fromEntries(SAMPLING.map(({ name }) => [name, null]));

export const PRESETS = [
  { name: "The model’s own", values: { ...NOTHING } },
  { name: "Exact", values: { ...NOTHING, temperature: 0 } },
  { name: "Balanced", values: { ...NOTHING, temperature: 0.7, top_p: 0.95 } },
  { name: "Inventive", values: { ...NOTHING, temperature: 1.1, min_p: 0.05 } },
];

export const MODES = [
  { name: "colour", label: "Colour" },
  { name: "underline", label: "Underline" },
  { name: "names", label: "Names" },
  { name: "off", label: "Off" },
];

const DEFAULTS = {
  sampling: { ...NOTHING },
  system: "",
  presets: [],
  mode: "colour",
  theme: "auto",
  layers: false,
  model: null,
  sidebar: true,
  panel: true,
};

export class Settings extends EventTarget {
  constructor() {
    super();
    this.values = { ...structuredClone(DEFAULTS), ...read() };
    this.values.sampling = { ...NOTHING, ...this.values.sampling };
  }

  get(name) {
    return this.values[name];
  }

  set(name, value) {
    this.values[name] = value;
    try {
      localStorage.setItem(KEY, JSON.stringify(this.values));
    } catch {
      // a browser that keeps nothing: the choice holds for this tab
    }
    this.dispatchEvent(new Event("change"));
  }

  /** The part of a request that the sampling settings make up. */
  request() {
    return Object.fromEntries(Object.entries(this.values.sampling).filter(([, value]) => value !== null));
  }

  /** The presets that come with the page, then the user's own. */
  presets() {
    return [...PRESETS, ...this.values.presets.map((preset) => ({ ...preset, own: true }))];
  }

  /** The name of the preset that the sampling settings are those of, or "". */
  presetName() {
    const same = ({ values }) => SAMPLING.every(({ name }) => (values[name] ?? null) === this.values.sampling[name]);
    return this.presets().find(same)?.name ?? "";
  }
}

function read() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEY) ?? "{}");
    return kept && typeof kept === "object" ? kept : {};
  } catch {
    return {};
  }
}

/** Light, dark, or as the system has it: a mark on the root element that the styles go by. */
export function applyTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}
