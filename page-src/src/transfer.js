// Conversations as a file, and back. A file is read with suspicion: what does not fit is refused with the reason, and
// nothing of it is kept.
import { newId } from "./conversation.js";

const FORMAT = "octad-conversations";

/** The text of a file that holds these conversations. */
export const exported = (talks) => JSON.stringify({ format: FORMAT, version: 1, conversations: talks }, null, 1);

/** The conversations of a file's text. Throws an Error that says what is wrong. */
export function imported(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("This file is not JSON.");
  }
  if (file?.format !== FORMAT || !Array.isArray(file.conversations))
    throw new Error("This file holds no conversations of this page.");
  if (file.version !== 1) throw new Error(`This file is of version ${file.version}; this page reads version 1.`);
  return file.conversations.map(checkedTalk);
}

/** Those that are not there yet under their id with the same content; a changed one gets an id of its own. */
export function fresh(talks, present) {
  const known = new Map(present.map((talk, at) => [talk.id, checkedTalk(talk, at)]));
  return talks
    .filter((talk) => JSON.stringify(known.get(talk.id)) !== JSON.stringify(talk))
    .map((talk) => (known.has(talk.id) ? { ...talk, id: newId() } : talk));
}

function must(holds, where, what) {
  if (!holds) throw new Error(`Conversation ${where}: ${what}.`);
}

function checkedTalk(talk, at) {
  const where = at + 1;
  must(talk && typeof talk === "object" && !Array.isArray(talk), where, "is no object");
  must(/^[\w-]{1,64}$/.test(talk.id), where, "has no id");
  must(talk.nodes && typeof talk.nodes === "object", where, "has no messages");
  must(Array.isArray(talk.root?.children), where, "has no beginning");
  const ids = new Set(Object.keys(talk.nodes));
  const nodes = Object.create(null);
  for (const id of ids) nodes[id] = checkedNode(talk.nodes[id], id, ids, where);
  const root = { children: checkedChildren(talk.root, null, nodes, where), chosen: chosen(talk.root) };
  for (const node of Object.values(nodes)) checkedChildren(node, node.id, nodes, where);
  must(reached(root, nodes) === ids.size, where, "has messages that hang in the air");
  return {
    id: talk.id,
    title: String(talk.title ?? "").slice(0, 200),
    named: Boolean(talk.named),
    created: number(talk.created),
    updated: number(talk.updated),
    system: String(talk.system ?? ""),
    only: numbers(talk.only),
    ...(talk.names ? { names: checkedNames(talk.names) } : {}),
    cut: ids.has(talk.cut) ? talk.cut : null,
    root,
    nodes: { ...nodes },
  };
}

function checkedNode(node, id, ids, where) {
  must(/^[\w-]{1,64}$/.test(id) && id !== "__proto__" && node?.id === id, where, "has a message without an id");
  must(node.role === "user" || node.role === "assistant", where, `has a message of role ${JSON.stringify(node.role)}`);
  must(typeof node.content === "string", where, "has a message without text");
  must(node.parent === null || ids.has(node.parent), where, "has a message without a place");
  const pieces = Array.isArray(node.pieces) ? node.pieces.map(checkedPiece) : undefined;
  if (pieces)
    must(
      pieces.every(Boolean) && pieces.map(([text]) => text).join("") === node.content,
      where,
      "has speakers that do not fit their text",
    );
  const kept = {
    id,
    parent: node.parent,
    role: node.role,
    content: node.content,
    children: node.children,
    chosen: chosen(node),
    time: number(node.time),
  };
  const more = {
    pieces,
    reasoning: text(node.reasoning),
    model: text(node.model),
    system: text(node.system),
    finish: text(node.finish),
    only: "only" in node ? numbers(node.only) : undefined,
    routes: text(node.routes),
    weights: text(node.weights),
    seconds: Number.isFinite(node.seconds) ? node.seconds : undefined,
    usage: checkedUsage(node.usage),
    error: checkedError(node.error),
    names: checkedNames(node.names),
  };
  for (const [key, value] of Object.entries(more)) if (value !== undefined) kept[key] = value;
  return kept;
}

function checkedChildren(above, id, nodes, where) {
  must(
    Array.isArray(above.children) && above.children.every((child) => nodes[child]?.parent === id),
    where,
    "is no tree",
  );
  must(
    above.children.length === 0 || above.chosen < above.children.length,
    where,
    "chooses an answer that is not there",
  );
  return above.children;
}

function reached(root, nodes) {
  const seen = new Set();
  const open = [...root.children];
  while (open.length) {
    const id = open.pop();
    if (seen.has(id)) return -1;
    seen.add(id);
    open.push(...nodes[id].children);
  }
  return seen.size;
}

const checkedPiece = (piece) =>
  Array.isArray(piece) && typeof piece[0] === "string" && Number.isInteger(piece[1]) && piece[1] >= -1
    ? [piece[0], piece[1], Number.isFinite(piece[2]) ? piece[2] : null]
    : null;
const checkedUsage = (usage) =>
  usage && typeof usage === "object"
    ? { prompt_tokens: number(usage.prompt_tokens), completion_tokens: number(usage.completion_tokens) }
    : undefined;
const checkedNames = (names) => (Array.isArray(names) && names.length <= 1024 ? names.map(String) : undefined);
const checkedError = (error) =>
  error && typeof error === "object"
    ? { kind: String(error.kind), message: String(error.message), status: number(error.status) }
    : undefined;
const chosen = (above) => (Number.isInteger(above.chosen) && above.chosen >= 0 ? above.chosen : 0);
const number = (value) => (Number.isFinite(value) ? value : 0);
const text = (value) => (typeof value === "string" ? value : undefined);
const numbers = (value) => (Array.isArray(value) && value.every((n) => Number.isInteger(n) && n >= 0) ? value : null);
