// What is sent for an answer. Fields of octad's own go only to a server that has experts.
import { lineTo, messages } from "./conversation.js";

/** The body of POST /v1/chat/completions for the answer `node`; its model is noted in it. */
export function requestOf({ talk, node, server, settings }) {
  const { experts, models } = server;
  node.model = (models.find(({ id }) => id === settings.get("model")) ?? models[0])?.id;
  const body = {
    model: node.model,
    messages: messages(talk, node.parent),
    stream: true,
    stream_options: { include_usage: true },
    ...settings.request(),
  };
  if (!experts.known) return body;
  body.speakers = true;
  const only = experts.only(node.only);
  if (only) body.only_experts = only;
  if (settings.get("layers")) {
    body.return_routed_experts = true;
    if (experts.masks) body.return_routed_weights = true; // octad's own
    const start = knownPrompt(talk, node);
    if (start > 0) body.routed_experts_prompt_start = start;
  }
  return body;
}

// How much of the prompt need not be traced: what the last answer's prompt was is the beginning of this one's.
function knownPrompt(talk, node) {
  const before = lineTo(talk, node.parent)
    .filter(({ role, usage }) => role === "assistant" && usage)
    .pop();
  return before && before.system === talk.system && !talk.cut ? before.usage.prompt_tokens - 1 : 0;
}
