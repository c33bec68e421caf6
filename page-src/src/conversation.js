// A conversation: a tree of messages as plain data. Editing a question or asking again adds a branch; the path from the
// root along `chosen` is what is seen and sent. Everything here is a function of that data.

export const newId = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, "0")).join("");

/** An empty one. `only` is the mask for the next answers (experts' numbers, null for all), `cut` the first message sent. */
export function newConversation({ system = "" } = {}) {
  const now = Date.now();
  return {
    id: newId(),
    title: "",
    named: false,
    created: now,
    updated: now,
    system,
    only: null,
    cut: null,
    root: { children: [], chosen: 0 },
    nodes: {},
  };
}

const parentOf = (talk, id) => (talk.nodes[id]?.parent ? talk.nodes[talk.nodes[id].parent] : talk.root);

/** Add a message below another (null: at the start), and choose it. */
export function addNode(talk, parent, fields) {
  const node = { id: newId(), parent, children: [], chosen: 0, time: Date.now(), ...fields };
  const above = parent ? talk.nodes[parent] : talk.root;
  talk.nodes[node.id] = node;
  above.chosen = above.children.push(node.id) - 1;
  if (!talk.named && !parent && node.role === "user") talk.title = titleOf(node.content);
  talk.updated = node.time;
  return node;
}

/** The messages that are seen, first to last. */
export function path(talk) {
  const found = [];
  for (let at = talk.root; at.children.length;) {
    at = talk.nodes[at.children[at.chosen]];
    found.push(at);
  }
  return found;
}

/** The ids of the alternatives to a message, itself among them, and its place. */
export function siblings(talk, id) {
  const { children } = parentOf(talk, id);
  return { ids: children, at: children.indexOf(id) };
}

/** See this alternative from now on. */
export function choose(talk, id) {
  const above = parentOf(talk, id);
  above.chosen = above.children.indexOf(id);
}

/** From the first message to this one. */
export function lineTo(talk, id) {
  const line = [];
  for (let at = id; at; at = talk.nodes[at].parent) line.unshift(talk.nodes[at]);
  return line;
}

/** What a request sends for an answer to `id`: the system prompt, then the line from `cut` on. */
export function messages(talk, id) {
  const line = lineTo(talk, id);
  const from = Math.max(
    0,
    line.findIndex((node) => node.id === talk.cut),
  );
  const said = line
    .slice(from)
    .filter((node) => node.role === "user" || node.content)
    .map(({ role, content }) => ({ role, content }));
  return talk.system.trim() ? [{ role: "system", content: talk.system }, ...said] : said;
}

/** Leave out the older half of what is sent before `id`; false where only one question is left. */
export function forgetOlder(talk, id) {
  const line = lineTo(talk, id);
  const from = Math.max(
    0,
    line.findIndex((node) => node.id === talk.cut),
  );
  const questions = line.map((node, at) => (node.role === "user" && at > from ? at : -1)).filter((at) => at > 0);
  if (!questions.length) return false;
  talk.cut = line[questions[Math.floor((questions.length - 1) / 2)]].id;
  return true;
}

/** The first line of a text, cut at a word. */
export function titleOf(text) {
  const line = text.trim().split("\n")[0].replace(/\s+/g, " ");
  return line.length <= 48
    ? line
    : `${line
        .slice(0, 49)
        .replace(/\s\S*$/, "")
        .slice(0, 48)}…`;
}

/** Everything said in it, for searching. */
export const textOf = (talk) =>
  [talk.title, ...Object.values(talk.nodes).map((node) => node.content)].join("\n").toLowerCase();
