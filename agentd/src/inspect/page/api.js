// The inspector's API, as docs/inspector-api.yaml describes it.

let token = document.querySelector('meta[name="token"]').content;

/** What was asked is not done; the message is for people. */
export class Refused extends Error {}

async function call(method, path, { query = {}, body, type, secret = false } = {}) {
  const parameters = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== "" && value !== false));
  const headers = {};
  if (type) headers["content-type"] = type;
  if (secret || method !== "GET") headers["x-inspector-token"] = token;
  const target = parameters.size > 0 ? `${path}?${parameters}` : path;
  let answer;
  try {
    answer = await fetch(target, { method, headers, body, cache: "no-store" });
  } catch {
    throw new Refused("agentd does not answer");
  }
  if (answer.ok) return answer;
  let reason = `agentd answered ${answer.status}`;
  try {
    reason = (await answer.json()).error ?? reason;
  } catch {
    // No sentence came along.
  }
  throw new Refused(reason);
}

const json = async (answer) => (await answer).json();

/** What is inspected. */
export const state = () => json(call("GET", "/api/state"));

/** Captured requests that pass the filters, newest first. */
export const list = (query) => json(call("GET", "/api/requests", { query }));

/** Everything about one request. */
export const request = (id, reveal) =>
  json(call("GET", `/api/requests/${id}`, { query: { reveal }, secret: reveal }));

/** A command line for one request. */
export const curl = async (id, reveal) =>
  (await call("GET", `/api/requests/${id}/curl`, { query: { reveal }, secret: reveal })).text();

/** Captured requests as a HAR file. */
export const har = async (query, reveal) =>
  (await call("GET", "/api/har", { query: { ...query, reveal }, secret: reveal })).blob();

/** Sends a request to its upstream again; `edits` as the schema Replay has them. */
export const replay = (id, edits = {}) =>
  json(call("POST", `/api/requests/${id}/replay`, { type: "application/json", body: JSON.stringify(edits) }));

/** Asks the edge about deliveries that it keeps; `question` as the schema DeliveryQuestion has it. */
export const deliveries = (question, reveal = false) =>
  json(call("POST", "/api/deliveries", { query: { reveal }, type: "application/json", body: JSON.stringify(question) }));

/** Forgets all captured requests. */
export const clear = () => call("DELETE", "/api/requests");

/** Puts a HAR or a curl command line into the list. */
export const importFrom = (text, type, tunnel) =>
  json(call("POST", "/api/import", { query: { tunnel }, type, body: text }));

/** What happens, as it happens. */
export function events(query) {
  const parameters = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== "" && value !== false));
  return new EventSource(`/api/events?${parameters}`);
}

/** Fetches the token again; whether it is another, as that of a process that was started anew is. */
export async function renewToken() {
  const old = token;
  try {
    const text = await (await fetch("/", { cache: "no-store" })).text();
    token = /<meta name="token" content="([\w-]+)">/.exec(text)?.[1] ?? token;
  } catch {
    // It does not answer yet.
  }
  return token !== old;
}
