// One request, whole: what was said, when, in which bytes, and what a replay changed.

import { asText, charsetOf, essence, field, formFields, fromBase64, hexRows, isImage, jsonLines, multipart, parameter, prettyJson, streamEvents, toBase64, viewsOf } from "./body.js";
import { count, duration, element, fullTime, longText, size, timeOfDay, visible } from "./dom.js";
import { standing } from "./list.js";

/** How many pieces of laid out JSON are coloured: above it they are plain text, which is fast at any size. */
const COLOURED = 20_000;
/** How many rows of a hex view are shown at a time. */
const HEX_ROWS = 512;
/** How many events of a stream, or messages of a WebSocket, are shown: the last ones. */
const LAST = 500;
/** How much text is shown at a time, in characters. */
const TEXT_SHOWN = 300_000;

const VIEW_NAMES = { events: "Events", json: "JSON", form: "Form", parts: "Parts", image: "Image", text: "Text", hex: "Hex" };

// A picture is shown in a frame of its own that may do nothing. Its markup is fixed text and base64 made here.
const preview = window.trustedTypes?.createPolicy("preview", { createHTML: (markup) => markup })
  ?? { createHTML: (markup) => markup };

/** The text of a field's value as people see it. */
export function valueText(value) {
  if (typeof value === "string") return value;
  if (value.masked) return "••••••••";
  return asText(fromBase64(value.base64)).text;
}

/** Shows requests in an element. */
export class Detail {
  /** @param told has replay, edit, copy, har, reveal, open, close. */
  constructor(place, told) {
    this.place = place;
    this.told = told;
    this.request = null;
    this.revealed = false;
    this.views = new Map(); // which view of a body somebody chose, by side and media type
    this.live = { to_upstream: null, to_client: null };
    this.timer = 0;
  }

  /** Shows one, or what is new about the same one. */
  show(request, revealed) {
    const same = this.request?.id === request.id;
    const scroll = same ? this.place.scrollTop : 0;
    this.request = request;
    this.revealed = revealed;
    this.live = {
      to_upstream: grown(request.request.body),
      to_client: request.response ? grown(request.response.body) : null,
    };
    this.draw();
    this.place.scrollTop = scroll;
  }

  /** Shows nothing. */
  clear(...children) {
    this.request = null;
    this.place.replaceChildren(...children);
  }

  /** Takes the newest summary of the request that is shown. */
  update(summary) {
    if (this.request?.id !== summary.id) return;
    Object.assign(this.request, summary);
    this.place.querySelector(".facts")?.replaceWith(this.facts());
  }

  /** Takes a piece of a body that has just passed. */
  piece({ id, direction, offset, base64, size: passed, at_us: at }) {
    const live = this.live[direction];
    if (this.request?.id !== id || !live) return false;
    const bytes = fromBase64(base64);
    // Something between was missed; of a body that is cut the rest is only counted.
    if (offset > live.bytes.length && bytes.length > 0) return false;
    if (bytes.length > 0 && offset + bytes.length > live.bytes.length) {
      const all = new Uint8Array(offset + bytes.length);
      all.set(live.bytes.subarray(0, offset));
      all.set(bytes, offset);
      live.bytes = all;
    }
    live.size = Math.max(live.size, offset + passed);
    live.cut = live.size > live.bytes.length;
    if (direction === "to_client") this.request.pieces.push({ offset, size: passed, at_us: at });
    // As often as one can read.
    this.timer ||= setTimeout(() => {
      this.timer = 0;
      this.redrawBody("request", this.live.to_upstream);
      this.redrawBody("response", this.live.to_client);
    }, 60);
    return true;
  }

  redrawBody(side, live) {
    const old = this.place.querySelector(`.payload[data-side="${side}"]`);
    if (!old || !live || old.dataset.size === `${live.size}/${live.bytes.length}`) return;
    const scroller = old.querySelector(".scroll");
    const atEnd = scroller && scroller.scrollTop + scroller.clientHeight >= scroller.scrollHeight - 8;
    const top = scroller?.scrollTop ?? 0;
    const made = this.body(side, live);
    old.replaceWith(made);
    const now = made.querySelector(".scroll");
    if (now) now.scrollTop = atEnd ? now.scrollHeight : top;
  }

  /** Takes a message of a WebSocket that has just passed. */
  frame(frame) {
    if (!this.request) return;
    this.request.frames_kept.push(frame);
    const rows = this.place.querySelector(".frames");
    if (!rows) return;
    const atEnd = rows.scrollTop + rows.clientHeight >= rows.scrollHeight - 8;
    rows.append(frameRow(frame));
    while (rows.children.length > LAST) rows.firstElementChild.remove();
    if (atEnd) rows.scrollTop = rows.scrollHeight;
  }

  draw() {
    const { request } = this;
    this.place.replaceChildren(
      this.head(),
      ...this.notices(),
      timing(request),
      request.diff ? diff(request) : "",
      request.kind === "websocket" && (request.frames_kept.length > 0 || request.status === 101) ? frames(request) : "",
      element("div", { class: "sides" }, this.side("request", "Request", request.request),
        request.response ? this.side("response", "Response", request.response) : this.noResponse()),
    );
    const rows = this.place.querySelector(".frames");
    if (rows) rows.scrollTop = rows.scrollHeight;
  }

  head() {
    const { request } = this;
    const masked = [request.request, request.response].some((message) => message?.fields.some(([, value]) => value.masked));
    const button = (text, key, act, more = {}) => element("button", { type: "button", title: `${text} (${key})`, onclick: act, ...more }, text, element("kbd", { "aria-hidden": "true" }, key));
    return element("header", { class: "head" },
      element("div", { class: "bar" },
        element("button", { type: "button", class: "back", onclick: this.told.close, "aria-label": "Back to the list" }, "‹ Requests"),
        button("Replay", "r", this.told.replay, { class: "primary", disabled: request.replayable !== null && request.replayable !== undefined }),
        button("Edit", "e", this.told.edit, { disabled: request.kind === "websocket" }),
        button("Copy as curl", "c", this.told.copy),
        button("HAR", "d", this.told.har),
        masked || this.revealed ? button(this.revealed ? "Mask" : "Reveal", "v", this.told.reveal, { "aria-pressed": String(this.revealed) }) : ""),
      element("h2", {}, element("span", { class: "method" }, visible(request.method.slice(0, 40))), " ",
        longText("bdi", request.target, { class: "target" })),
      this.facts());
  }

  facts() {
    const { request } = this;
    const { text, kind, title } = standing(request);
    const fact = (...children) => element("span", {}, ...children);
    const link = (id) => element("button", { type: "button", class: "link", onclick: () => this.told.open(id) }, `#${id}`);
    return element("p", { class: "facts" },
      element("span", { class: `status ${kind}` }, text),
      title ? fact(element("b", {}, visible(title))) : "",
      fact(`#${request.id}`),
      fact(visible(request.tunnel), " → ", request.answered_by === "agent" ? "answered by the agent" : visible(request.upstream)),
      element("time", { title: fullTime(request.received_at) }, fullTime(request.received_at)),
      request.request_id ? element("span", { class: "code", title: "The edge's id of this request" }, visible(request.request_id)) : "",
      request.replay_of ? fact("replay of ", link(request.replay_of)) : "",
      request.replays?.length > 0 ? fact("replayed as ", request.replays.slice(-8).flatMap((id, at) => at ? [", ", link(id)] : [link(id)])) : "");
  }

  notices() {
    const { request } = this;
    const notices = [];
    const note = (kind, text) => notices.push(element("p", { class: `note ${kind}`, role: "note" }, visible(text)));
    if (request.outcome === "failed") {
      note("bad", request.response
        ? `The answer broke off: ${request.error ?? "failed"}.`
        : `There was no answer of the upstream: ${request.error ?? "failed"}.`);
    }
    if (request.outcome === "cancelled") note("warn", "The public client left before the answer was complete.");
    const signature = signatureNote(request.signature);
    if (signature) note("warn", signature);
    if (request.replayable) note("info", `It can't be replayed as it is: ${request.replayable}`);
    return notices;
  }

  noResponse() {
    const { request } = this;
    const text = request.source === "import" && request.status === null && !request.error ? "Imported. Nothing was sent yet: press r to send it to the upstream."
      : request.state === "open" ? "Waiting for the upstream…" : "None.";
    return element("section", { class: "side" }, element("h3", {}, "Response"), element("p", { class: "quiet" }, text));
  }

  side(name, title, message) {
    const live = this.live[name === "request" ? "to_upstream" : "to_client"];
    const sides = [element("h3", {}, title)];
    if (name === "response" || live.size > 0) sides.push(this.body(name, live));
    else sides.push(element("p", { class: "quiet" }, "No body."));
    sides.push(fieldTable(message.fields));
    return element("section", { class: "side" }, ...sides);
  }

  body(side, live) {
    const { request } = this;
    const message = side === "request" ? request.request : request.response;
    const type = field(message.fields, "content-type");
    const { decoded } = message.body;
    // What came after the answer we have is not decoded: the raw bytes are shown until it is.
    const packed = decoded && live.bytes.length === live.kept;
    const bytes = packed ? fromBase64(decoded.base64) : live.bytes;
    const made = element("div", { class: "payload", "data-side": side, "data-size": `${live.size}/${live.bytes.length}` });
    if (live.size === 0) {
      made.append(element("p", { class: "quiet" }, request.state === "open" && side === "response" ? "Nothing of the body has come yet." : "No body."));
      return made;
    }
    const remarks = [element("span", {}, size(live.size))];
    if (type) remarks.push(element("span", {}, visible(essence(type).slice(0, 80))));
  const charset = charsetOf(bytes, type);
  if (charset !== "utf-8") remarks.push(element("span", { title: "The charset that the text is read in" }, charset));
    if (packed) remarks.push(element("span", { title: "For display only: a replay sends the bytes as they came" }, `${decoded.coding}, unpacked to ${size(bytes.length)}`));
    if (live.dropped) remarks.push(element("span", { class: "warn" }, "not kept"));
    else if (live.cut) remarks.push(element("span", { class: "warn", title: "inspect_body says how much is kept" }, `cut: the first ${size(live.bytes.length)} are kept`));
    if (packed && decoded.error) remarks.push(element("span", { class: "warn" }, visible(decoded.error)));
    else if (packed && decoded.cut) remarks.push(element("span", { class: "warn" }, "unpacked in part"));
    if (bytes.length === 0) {
      made.append(element("div", { class: "views" }, element("span", { class: "remarks" }, remarks)));
      return made;
    }
    const views = viewsOf(bytes, type);
    const key = `${side} ${essence(type)}`;
    const chosen = views.includes(this.views.get(key)) ? this.views.get(key) : views[0];
    const tabs = views.map((view) => element("button", {
      type: "button", role: "tab", "aria-selected": String(view === chosen),
      onclick: () => {
        this.views.set(key, view);
        made.replaceWith(this.body(side, live));
      },
    }, VIEW_NAMES[view]));
    const save = element("button", { type: "button", class: "link", onclick: () => download(live.bytes, `request-${request.id}-${side}`), title: "Saves the kept bytes as they passed" }, "save");
    made.append(element("div", { class: "views" },
      element("span", { role: "tablist", "aria-label": "Views of the body" }, tabs),
      element("span", { class: "remarks" }, remarks, save)));
    made.append(view(chosen, bytes, type, request.pieces ?? [], side));
    return made;
  }
}

function grown(body) {
  return { bytes: fromBase64(body.base64), size: body.size, cut: body.cut, dropped: body.dropped, kept: body.kept };
}

/** Hands bytes to the browser's downloads. */
export function download(content, name, type = "application/octet-stream") {
  const address = URL.createObjectURL(new Blob([content], { type }));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** What to say about a webhook's signature that its scheme no longer accepts, or "". */
function signatureNote(signature) {
  if (!signature?.too_old) return "";
  const scheme = { stripe: "Stripe", slack: "Slack", svix: "Svix", "standard-webhooks": "Standard Webhooks" }[signature.scheme] ?? signature.scheme;
  const age = Date.now() / 1000 - signature.signed_at / 1e6;
  const allowed = duration(signature.tolerance_s * 1e6);
  return age < 0
    ? `The timestamp of this ${scheme} signature is ${duration(-age * 1e6)} ahead: one of the two clocks is wrong.`
    : `The timestamp of this ${scheme} signature is ${duration(age * 1e6)} old, and its libraries accept ${allowed}: they will refuse a replay, although its bytes are the original's.`;
}

export function fieldTable(fields) {
  const rows = fields.map(([name, value]) => {
    const shown = typeof value === "string" ? longText("td", value)
      : value.masked ? element("td", {}, element("span", { class: "masked", title: "Masked: Reveal shows it" }, "••••••••"), ` ${count(value.length)} B`)
        : element("td", {}, longText("span", valueText(value)), " ", element("span", { class: "tag" }, "not UTF-8"));
    return element("tr", {}, longText("th", name, { scope: "row" }), shown);
  });
  return element("details", { open: true }, element("summary", {}, "Fields ", element("span", { class: "quiet" }, count(fields.length))),
    element("table", { class: "fields" }, element("tbody", {}, rows)));
}

function view(name, bytes, type, pieces, side) {
  switch (name) {
    case "json": return json(bytes, charsetOf(bytes, type));
    case "form": return pairs(formFields(asText(bytes, charsetOf(bytes, type)).text, charsetOf(bytes, type)));
    case "parts": return parts(bytes, type);
    case "image": return image(bytes, type);
    case "events": return events(bytes, side === "response" ? pieces : []);
    case "hex": return hex(bytes);
    default: return plain(bytes, charsetOf(bytes, type));
  }
}

function plain(bytes, charset) {
  const { text, valid } = asText(bytes, charset);
  const shown = element("pre", { dir: "auto", class: "scroll", tabindex: "0" }, visible(text.slice(0, TEXT_SHOWN), true));
  if (text.length > TEXT_SHOWN) shown.append(element("span", { class: "warn" }, `\n… ${count(text.length - TEXT_SHOWN)} more characters: save the body to read them`));
  return element("div", {}, valid ? "" : element("p", { class: "quiet" }, `Not all of it is ${charset.toUpperCase()}: “\ufffd” stands for what is not.`), shown);
}

function coloured(pieces) {
  if (pieces.length > COLOURED) return [visible(pieces.map(([, text]) => text).join("").slice(0, TEXT_SHOWN), true)];
  return pieces.map(([kind, text]) => kind && kind !== "punctuation" ? element("span", { class: `json-${kind}` }, visible(text, true)) : visible(text, true));
}

function json(bytes, charset) {
  const { text } = asText(bytes, charset);
  const pieces = prettyJson(text) ?? jsonLines(text) ?? [["", text]];
  return element("pre", { class: "scroll json", tabindex: "0" }, coloured(pieces));
}

function pairs(fields) {
  return element("div", { class: "scroll" }, element("table", { class: "fields" },
    element("tbody", {}, fields.slice(0, 2000).map(([name, value]) => element("tr", {}, longText("th", name, { scope: "row" }), longText("td", value))))));
}

function parts(bytes, type) {
  return element("div", { class: "scroll parts" }, multipart(bytes, parameter(type, "boundary")).map((part) => {
    const own = field(part.fields, "content-type");
    const best = part.bytes.length === 0 ? "" : viewsOf(part.bytes, own).find((name) => name !== "parts" && name !== "events");
    return element("details", { open: part.bytes.length < 4096 || best === "image" },
      element("summary", {}, element("b", {}, visible(part.name || "(no name)")), part.file ? ` ${visible(part.file)}` : "",
        element("span", { class: "quiet" }, ` ${size(part.bytes.length)} ${visible(essence(own))}`), part.cut ? element("span", { class: "warn" }, " cut") : "",
        part.file ? element("button", { type: "button", class: "link", onclick: (event) => { event.preventDefault(); download(part.bytes, "part"); } }, "save") : ""),
      best ? view(best, part.bytes, own, [], "request") : "");
  }));
}

/** How high a picture is shown, in pixels. */
const IMAGE_HEIGHT = 290;

function image(bytes, type) {
  const kind = essence(type);
  if (!isImage(kind)) return hex(bytes);
  const frame = element("iframe", { class: "image", sandbox: "", title: "Picture", referrerpolicy: "no-referrer" });
  const show = (bounds) => {
    frame.srcdoc = preview.createHTML(`<!doctype html><body><img src="data:${kind};base64,${toBase64(bytes)}" alt="It cannot be shown" ${bounds}></body>`);
  };
  // Only what is too large gets a size of its own. A drawing has none that could be asked for.
  createImageBitmap(new Blob([bytes], { type: kind })).then((bitmap) => {
    const { width, height } = bitmap;
    bitmap.close();
    const scale = Math.min(1, IMAGE_HEIGHT / height, Math.max(100, frame.clientWidth - 20) / width);
    show(scale < 1 ? `width="${Math.round(width * scale)}" height="${Math.round(height * scale)}"` : "");
  }, () => show(kind === "image/svg+xml" ? `height="${IMAGE_HEIGHT}"` : ""));
  return frame;
}

function hex(bytes) {
  const shown = element("pre", { class: "scroll hex", tabindex: "0" });
  let at = 0;
  const more = element("button", { type: "button", class: "link" }, "show more");
  const add = () => {
    const rows = hexRows(bytes, at, HEX_ROWS);
    at += HEX_ROWS * 16;
    more.remove();
    shown.append(...rows.flatMap(([offset, values, text]) => [element("span", { class: "quiet" }, offset), `  ${values}  ${text}\n`]));
    if (at < bytes.length) shown.append(more);
  };
  more.addEventListener("click", add);
  add();
  return shown;
}

function events(bytes, pieces) {
  const all = streamEvents(bytes);
  const shown = all.slice(-LAST);
  const when = (end) => pieces.find((piece) => piece.offset + piece.size >= end)?.at_us;
  return element("div", { class: "scroll stream", tabindex: "0" },
    all.length > shown.length ? element("p", { class: "quiet" }, `The last ${count(LAST)} of ${count(all.length)} events.`) : "",
    shown.map((event) => {
      const at = when(event.end);
      const pretty = prettyJson(event.data);
      return element("div", { class: "event" },
        element("span", { class: "when" }, at === undefined ? "" : `+${duration(at)}`),
        element("span", { class: "name" }, visible(event.name || "message"), event.id ? element("span", { class: "quiet" }, ` ${visible(event.id)}`) : ""),
        pretty && event.data.length < 4000 ? element("pre", { class: "json" }, event.data.length < 120 ? coloured(prettyJson(event.data).map(([kind, text]) => [kind, kind === "" ? " " : text])) : coloured(pretty))
          : longText("pre", event.data, {}, true),
        event.whole ? "" : element("span", { class: "quiet" }, "…"));
    }));
}

function frames(request) {
  const kept = request.frames_kept.slice(-LAST);
  const missing = request.frames_dropped + request.frames_kept.length - kept.length;
  return element("section", { class: "side" },
    element("h3", {}, "Messages ", element("span", { class: "quiet" }, request.state === "open" ? "live" : "")),
    missing > 0 ? element("p", { class: "quiet" }, `${count(missing)} before these are not shown.`) : "",
    element("div", { class: "frames scroll", tabindex: "0" }, kept.map(frameRow)));
}

function frameRow(frame) {
  const out = frame.direction === "to_client";
  const bytes = fromBase64(frame.base64);
  const { text, valid } = asText(bytes);
  const isText = frame.kind === "text" || (frame.kind === "close" && valid);
  const short = isText ? visible(text.slice(0, 300)) : Array.from(bytes.subarray(0, 24), (byte) => byte.toString(16).padStart(2, "0")).join(" ");
  return element("details", { class: `frame ${out ? "out" : "in"}` },
    element("summary", {},
      element("span", { class: "arrow", title: out ? "to the client" : "to the upstream" }, out ? "←" : "→"),
      element("span", { class: "when" }, `+${duration(frame.at_us)}`),
      element("span", { class: "tag" }, frame.kind === "close" ? `close ${frame.code ?? ""}` : frame.kind),
      element("bdi", { class: "preview" }, short),
      element("span", { class: "quiet" }, size(frame.size), frame.cut ? ", cut" : "")),
    bytes.length === 0 ? "" : isText ? view(prettyJson(text) && !frame.cut ? "json" : "text", bytes, "", [], "") : hex(bytes));
}

/** Where the time went, as a bar and in numbers. */
function timing(request) {
  const { times } = request;
  const known = (value) => value !== null && value !== undefined;
  const marks = [
    ["connect", "connecting", times.connected_us],
    ["wait", "waiting for the head", times.head_us],
    ["first", "to the first byte", times.first_byte_us],
    ["body", "body", times.last_byte_us],
    ["edge", "handing on", times.ended_us],
  ].filter(([, , at]) => known(at));
  if (marks.length === 0) return "";
  const total = Math.max(1, ...marks.map(([, , at]) => at));
  let before = 0;
  const bar = element("div", { class: "timing", role: "img", "aria-label": "Where the time went" });
  const legend = element("p", { class: "legend" }, element("b", {}, known(times.ended_us) ? duration(times.ended_us) : "still open"));
  for (const [name, text, at] of marks) {
    const took = Math.max(0, at - before);
    before = Math.max(before, at);
    if (took === 0) continue;
    const part = element("span", { class: name, title: `${text}: ${duration(took)}` });
    part.style.flexGrow = String(Math.max(0.004, took / total));
    bar.append(part);
    legend.append(element("span", { class: name }, `${text} ${duration(took)}`));
  }
  return element("div", {}, bar, legend);
}

function diff(request) {
  const { diff: found, replay_of: original } = request;
  const rows = [];
  const change = (name, before, after) => rows.push(element("tr", {}, element("th", { scope: "row" }, visible(name)),
    element("td", { class: "before" }, before), element("td", { class: "after" }, after)));
  const text = (value) => value === null || value === undefined ? element("span", { class: "quiet" }, "–") : longText("span", value, {}, true);
  const values = (list) => list.length === 0 ? text(null) : list.map((value) => longText("div", valueText(value)));
  if (found.error) change("error", text(found.error.before ?? "none"), text(found.error.after ?? "none"));
  if (found.status) change("status", text(String(found.status.before ?? "none")), text(String(found.status.after ?? "none")));
  for (const { name, before, after } of found.fields) change(name, values(before), values(after));
  for (const { pointer, before, after } of found.body.json ?? []) change(pointer || "(the whole body)", text(before), text(after));
  const remarks = [];
  if (found.body.kind === "bytes") remarks.push("The bodies differ, and not both are JSON.");
  if (found.body.kind === "unknown") remarks.push("The bodies are not compared: not all of both is kept.");
  if (found.body.json_more > 0) remarks.push(`${count(found.body.json_more)} more differences are not listed.`);
  return element("section", { class: `diff ${found.same ? "same" : ""}` },
    element("h3", {}, found.same ? `The answer is the same as #${original}'s` : `What is different from #${original}`),
    rows.length > 0 ? element("div", { class: "table" }, element("table", {}, element("thead", {}, element("tr", {}, element("td"), element("th", { scope: "col" }, `#${original}`), element("th", { scope: "col" }, `#${request.id}`))), element("tbody", {}, rows))) : "",
    remarks.map((remark) => element("p", { class: "quiet" }, remark)));
}
