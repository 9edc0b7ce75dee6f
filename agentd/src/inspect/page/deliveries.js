// What the edge keeps for tunnels until it can be delivered: shown, delivered again, given up, held.

import { deliveries as ask } from "./api.js";
import { asText, charsetOf, field, fromBase64 } from "./body.js";
import { fieldTable } from "./detail.js";
import { byId, count, element, fullTime, longText, size, toast, visible } from "./dom.js";

/** How much of a body is shown, in bytes. */
const SHOWN = 64 * 1024;

let tunnels = [];
/** The number of the newest look at the edge: an older one's answer is dropped. */
let looked = 0;

/** The tunnels that have deliveries kept, by name. Without one there is nothing to open. */
export function keep(names) {
  tunnels = names;
  byId("deliveries-button").hidden = names.length === 0;
}

export function open() {
  if (tunnels.length === 0) return;
  const select = byId("delivery-tunnel");
  const chosen = select.value;
  select.replaceChildren(...tunnels.map((name) => element("option", { value: name }, visible(name))));
  if (tunnels.includes(chosen)) select.value = chosen;
  byId("deliveries").showModal();
  look();
}

const tunnel = () => byId("delivery-tunnel").value;

function fail(error) {
  byId("delivery-error").textContent = error?.message ?? "";
  byId("delivery-error").hidden = !error;
}

/** Reads the list anew, or its next page. */
async function look(cursor) {
  const mine = ++looked;
  const rows = byId("delivery-rows");
  const state = byId("delivery-state").value || undefined;
  try {
    const answer = await ask({ op: "list", tunnel: tunnel(), state, cursor });
    if (mine !== looked) return;
    fail(null);
    const made = answer.list.map(row);
    if (cursor) rows.lastElementChild?.remove();
    else rows.replaceChildren();
    rows.append(...made);
    if (answer.cursor) {
      rows.append(element("tr", {}, element("td", { colspan: "5" },
        element("button", { type: "button", class: "link", onclick: () => look(answer.cursor) }, "More"))));
    }
    if (rows.children.length === 0) {
      rows.append(element("tr", {}, element("td", { colspan: "5", class: "quiet" }, "Nothing is kept.")));
    }
  } catch (error) {
    if (mine === looked) fail(error);
  }
}

function row(delivery) {
  const { id, state, attempt, method, target, received_ms: at, body_bytes: bytes, last } = delivery;
  const act = (op, label) => element("button", {
    type: "button",
    onclick: async () => {
      await does({ op, tunnel: delivery.tunnel, id }, op === "retry" ? "It is tried again" : "Cancelled");
    },
  }, label);
  const ended = state === "dead" || state === "delivered" || state === "cancelled";
  // Its body went when it was delivered or cancelled.
  const gone = ended && state !== "dead" && bytes > 0;
  const reason = last?.reason ? visible(last.reason) : "";
  return element("tr", {},
    element("td", { title: id }, fullTime(at * 1000)),
    element("td", {}, `${state}${attempt > 0 ? `, ${attempt} ${attempt === 1 ? "try" : "tries"}` : ""}`),
    element("td", { class: "mono" }, element("button", { type: "button", class: "link", onclick: () => show(delivery) }, visible(`${method} ${target.slice(0, 200)}`))),
    element("td", {}, element("div", { class: "reason", title: reason }, reason)),
    element("td", {}, gone ? "" : act(ended ? "retry" : "cancel", ended ? "Retry" : "Cancel")));
}

async function does(question, said) {
  try {
    await ask(question);
    toast(said);
    fail(null);
    await look();
  } catch (error) {
    fail(error);
  }
}

/** All that are dead, page by page. */
async function retryDead() {
  let cursor;
  let done = 0;
  try {
    do {
      const page = await ask({ op: "retry_dead", tunnel: tunnel(), cursor });
      done += page.count;
      ({ cursor } = page);
    } while (cursor);
    toast(`Tried again: ${count(done)}`);
  } catch (error) {
    fail(error);
  }
  await look();
}

/** The beginning of a body, which is text or bytes in base64. */
function textOf(body, type) {
  const bytes = body?.text === undefined ? fromBase64(body?.base64 ?? "") : new TextEncoder().encode(body.text);
  return asText(bytes.subarray(0, SHOWN), charsetOf(bytes, type)).text;
}

async function show(delivery, reveal = false) {
  const place = byId("delivery-detail");
  try {
    const answer = await ask({ op: "show", tunnel: delivery.tunnel, id: delivery.id, body_from: 0 }, reveal);
    const masked = answer.headers.some(([, value]) => value.masked);
    const text = textOf(answer.body, field(answer.headers, "content-type"));
    place.replaceChildren(
      element("h3", {}, visible(`${delivery.method} ${delivery.target}`.slice(0, 500))),
      element("p", { class: "quiet mono" }, delivery.id),
      masked || reveal ? element("button", { type: "button", class: "link", onclick: () => show(delivery, !reveal) }, reveal ? "Mask" : "Reveal") : "",
      fieldTable(answer.headers),
      element("p", { class: "quiet" }, size(delivery.body_bytes) + (text.length === 0 && delivery.body_bytes > 0 ? ", not kept any more" : "")),
      text.length > 0 ? longText("pre", text, { class: "scroll" }, true) : "");
    place.hidden = false;
  } catch (error) {
    fail(error);
  }
}

byId("deliveries-button").addEventListener("click", open);
byId("delivery-tunnel").addEventListener("change", () => look());
byId("delivery-state").addEventListener("change", () => look());
byId("delivery-refresh").addEventListener("click", () => look());
byId("delivery-dead").addEventListener("click", retryDead);
byId("delivery-pause").addEventListener("click", () => does({ op: "pause", tunnel: tunnel() }, "Paused"));
byId("delivery-resume").addEventListener("click", () => does({ op: "resume", tunnel: tunnel() }, "Resumed"));
byId("deliveries").addEventListener("close", () => {
  looked++;
  byId("delivery-detail").hidden = true;
});
