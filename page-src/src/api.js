// The server, as the page sees it: addresses relative to the page, errors in one form, the key kept for this tab only.
import { events } from "./sse.js";

const KEY = "octad.key";

/** What went wrong: `status` is 0 where there was no answer at all; `retryAfter` is in seconds, or null. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null, body = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter, body });
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

async function request(path, { method = "GET", json, signal } = {}) {
  const headers = {};
  if (json !== undefined) headers["Content-Type"] = "application/json";
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, {
      method,
      headers,
      signal,
      body: json === undefined ? undefined : JSON.stringify(json),
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer.", {});
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  const text = await response.text().catch(() => "");
  let body = null;
  try {
    body = JSON.parse(text);
  } catch {
    body = null;
  }
  const error = body?.error ?? body ?? {};
  const said = typeof error === "string" ? error : (error.message ?? error.detail);
  const after = Number.parseFloat(response.headers.get("Retry-After"));
  return new ApiError(typeof said === "string" && said ? said : `The server answered ${response.status}.`, {
    status: response.status,
    code: error.code ?? null,
    retryAfter: Number.isFinite(after) ? after : null,
    body,
  });
}

export const getJson = async (path, options) => (await request(path, options)).json();

/** Ask for an answer; yields {content, speakers, reasoning}, {cast}, {finish}, {usage} and {routes} as they come. */
export async function* chat(body, signal) {
  const response = await request("v1/chat/completions", { method: "POST", json: body, signal });
  let finished = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) {
        throw new ApiError(chunk.error.message ?? String(chunk.error), { status: 500, code: chunk.error.code });
      }
      yield* parts(chunk);
      finished ||= Boolean(chunk.choices?.[0]?.finish_reason);
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection broke while the answer came.", {});
  }
  if (!finished) throw new ApiError("The connection broke while the answer came.", {});
}

function* parts(chunk) {
  const choice = chunk.choices?.[0];
  const delta = choice?.delta;
  const reasoning = delta?.reasoning_content ?? delta?.reasoning;
  if (delta?.content || reasoning || choice?.speakers?.length) {
    yield { content: delta?.content ?? "", speakers: choice.speakers ?? [], reasoning: reasoning ?? "" };
  }
  if (choice?.speakers_of_answer) yield { cast: choice.speakers_of_answer };
  if (choice?.routed_experts) yield { routes: choice.routed_experts, weights: choice.routed_weights };
  if (choice?.finish_reason) yield { finish: choice.finish_reason };
  if (chunk.usage) yield { usage: chunk.usage };
}
