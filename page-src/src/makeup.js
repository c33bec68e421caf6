// What the mixture is made of, from /v1/experts' make_up: the members and how far each is from the base, how they were
// combined, and the verdict. Fields that are not there are left out; octad.json's own form and octad inspect's are read, too.
import { el } from "./dom.js";
import { swatch } from "./sharebar.js";

/** The part of the panel, or null where the server tells nothing. */
export function makeUpView(experts) {
  const made = experts.makeUp;
  if (!made || typeof made !== "object") return null;
  const parts = [
    verdictView(made.verdict),
    factsView(made, experts),
    membersView(made, experts),
    lacksView(made),
    editsView(made),
  ].filter(Boolean);
  return parts.length ? el("section", { class: "make-up" }, el("h3", {}, "What it is made of"), parts) : null;
}

function verdictView(verdict) {
  const said = typeof verdict === "string" ? verdict : (verdict?.headline ?? verdict?.sentence);
  if (!said) return null;
  const report = verdict?.report;
  const link = typeof report === "string" && safe(report);
  return el(
    "p",
    { class: "verdict" },
    said,
    link ? [" ", el("a", { href: link, target: "_blank", rel: "noopener" }, "The report")] : null,
  );
}

// An address on this server, or on the web.
function safe(address) {
  try {
    const url = new URL(address, document.baseURI);
    return ["http:", "https:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function factsView(made, experts) {
  const provenance = made.provenance ?? made;
  const method = (value) => (typeof value === "string" ? value : value?.method);
  const named = [provenance.base, provenance.base?.model, provenance.recipe?.base, provenance.base?.label];
  const base = named.find((value) => typeof value === "string");
  const active = made.active_parameters ? ` (${count(made.active_parameters)} a token)` : "";
  const rows = [
    ["Base", base],
    ["Family", made.family],
    ["Experts", `${experts.list.length}, ${experts.topK} a token${experts.layers ? `, ${experts.layers} layers` : ""}`],
    ["Parameters", made.parameters ? `${count(made.parameters)}${active}` : null],
    ["Router", method(provenance.router ?? provenance.recipe?.router)],
    ["Shared part", method(provenance.shared ?? provenance.recipe?.shared)],
  ].filter(([, value]) => value);
  return el(
    "dl",
    {},
    rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))]),
  );
}

function membersView(made, experts) {
  const rows = Array.isArray(made.experts) ? made.experts : [];
  const compared = made.comparison?.experts ?? [];
  const members = experts.list.map(({ index, name }) => {
    const row = rows.find((entry) => entry?.name === name) ?? (rows[index]?.name ? {} : (rows[index] ?? {}));
    const distance = [row.distance, compared[index]?.mean].find(Number.isFinite);
    return { index, name, model: typeof row.model === "string" && row.model !== name ? row.model : "", distance };
  });
  const most = Math.max(...members.map(({ distance }) => distance ?? 0));
  if (!members.some(({ distance, model }) => distance !== undefined || model)) return null;
  const body = members.map(({ index, name, model, distance }) => {
    const bar = el("span", { class: `e${index}` });
    bar.style.width = most ? `${((distance ?? 0) / most) * 100}%` : "0";
    return el(
      "tr",
      {},
      el("th", { scope: "row" }, swatch(index), name, model ? el("small", {}, model) : null),
      el(
        "td",
        {},
        distance === undefined ? "–" : el("span", {}, distance.toFixed(4), el("span", { class: "meter" }, bar)),
      ),
    );
  });
  return el(
    "table",
    {},
    el(
      "thead",
      {},
      el(
        "tr",
        {},
        el("th", { scope: "col" }, "Member"),
        el("th", { scope: "col" }, `Distance from ${made.distance_from ?? "the base"}`),
      ),
    ),
    el("tbody", {}, body),
  );
}

// What the mixture could not take over from a member.
function lacksView(made) {
  const rows = (Array.isArray(made.experts) ? made.experts : []).filter((row) => typeof row?.lacks === "string");
  if (!rows.length) return null;
  return el(
    "ul",
    { class: "edits" },
    rows.map(({ name, lacks }) => el("li", {}, `${name}: ${lacks}`)),
  );
}

function editsView(made) {
  const edits = made.provenance?.edits ?? made.edits;
  return Array.isArray(edits) && edits.length
    ? el(
        "ul",
        { class: "edits" },
        edits.map((edit) => el("li", {}, String(edit))),
      )
    : null;
}

const count = (value) =>
  value >= 1e9
    ? `${(value / 1e9).toFixed(1)} B`
    : value >= 1e6
      ? `${(value / 1e6).toFixed(0)} M`
      : value.toLocaleString("en");
