// The experts of the mixture: names, and who spoke how much. A piece is [text, expert, weight]; expert is -1 if unknown.
import { ApiError, getJson } from "./api.js";

export const COLOURS = 8; // as many colours and as many kinds of underline as style.css has

/** What /v1/experts says. `list` is empty for a model, or in front of a server, that does not tell who speaks. */
export class Experts {
  constructor(answer = {}) {
    const rows = Array.isArray(answer.data) ? answer.data : [];
    this.list = rows.map((row, at) => ({
      index: Number.isInteger(row.index) && row.index >= 0 ? row.index : at,
      name: String(row.name ?? at),
      domain: row.domain ?? "",
    }));
    this.layers = answer.layers ?? 0;
    this.topK = answer.top_k ?? 0;
    this.makeUp = answer.make_up ?? null;
    this.masks = answer.masks !== false; // false in front of another engine than octad's
    this.live = answer.live !== false; // false where speakers are known only once all was said
    this.share = this.masks ? "weight" : "places"; // what a speaker's figure is a part of
    this.numbers = new Map(
      this.list.flatMap(({ index, name }) => [
        [name, index],
        [String(index), index],
      ]),
    );
    for (const { index, name } of this.list) this.numbers.set(name, index);
  }

  /** Ask the server; one that has no such address gives no experts. */
  static async load() {
    try {
      return new Experts(await getJson("v1/experts"));
    } catch (error) {
      if (error instanceof ApiError && [404, 405, 501].includes(error.status)) return new Experts();
      throw error;
    }
  }

  get known() {
    return this.list.length > 0;
  }

  /** The number of an expert that the server names by number or by name; -1 if there is none such. */
  indexOf(value) {
    return this.numbers.get(String(value)) ?? -1;
  }

  name(index) {
    return this.list.find((expert) => expert.index === index)?.name ?? (index < 0 ? "unknown" : `expert ${index}`);
  }

  /** One chunk's text as pieces. Where the speakers' texts are not the chunk's, the text counts and nobody is named. */
  pieces(content, speakers) {
    const said = speakers.map(({ token, expert, weight }) => [
      String(token ?? ""),
      this.indexOf(expert),
      round(weight),
    ]);
    if (said.map(([text]) => text).join("") === content) return said;
    return content ? [[content, -1, null]] : [];
  }

  /** A request's `only_experts` for a mask, by name; undefined where all may speak. */
  only(mask) {
    return this.masks && mask?.length && mask.length < this.list.length
      ? mask.map((index) => this.name(index))
      : undefined;
  }

  /** A mask in words: "only python", "without french", "all experts". */
  describe(mask) {
    if (!this.only(mask)) return "all experts";
    const out = this.list.filter(({ index }) => !mask.includes(index));
    const names = (indices) => indices.map((index) => this.name(index)).join(", ");
    if (out.length < mask.length) return `without ${names(out.map(({ index }) => index))}`;
    return `only ${names(mask)}`;
  }
}

const casts = new Map(); // names, joined -> Experts

/** The experts of the mixture that gave an answer, which need not be the one that is served now. */
export function castOf(node, served) {
  if (!node.names) return served;
  const key = node.names.join("\n");
  if (!casts.has(key)) casts.set(key, new Experts({ data: node.names.map((name, index) => ({ index, name })) }));
  return sameExperts(casts.get(key), served) ? served : casts.get(key);
}

/** Whether two are the same experts in the same order. */
export const sameExperts = (a, b) =>
  a.list.length === b.list.length && a.list.every(({ name }, at) => b.list[at].name === name);

const round = (weight) => (Number.isFinite(weight) ? Math.round(weight * 1000) / 1000 : null);

const counted = new WeakMap(); // pieces -> {counts, upto}: pieces are only ever added, and counted once

/** [{index, count, share}] of those who spoke, the most first. */
export function shares(pieces) {
  if (!counted.has(pieces)) counted.set(pieces, { counts: new Map(), upto: 0 });
  const state = counted.get(pieces);
  for (; state.upto < pieces.length; state.upto += 1) {
    const expert = pieces[state.upto][1];
    if (expert >= 0) state.counts.set(expert, (state.counts.get(expert) ?? 0) + 1);
  }
  const total = [...state.counts.values()].reduce((sum, count) => sum + count, 0);
  return [...state.counts]
    .map(([index, count]) => ({ index, count, share: count / total }))
    .sort((a, b) => b.count - a.count || a.index - b.index);
}

/** The classes that give a token its colour, its underline and its strength. */
export function tokenClass(expert, weight) {
  const strength =
    weight === null || weight === undefined ? 3 : Math.max(0, Math.min(3, Math.floor((weight - 0.25) * 5.4)));
  return `tok e${expert} s${expert % COLOURS} w${strength}`;
}
