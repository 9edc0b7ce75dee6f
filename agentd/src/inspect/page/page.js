// The page: keeps the list up to date, shows what is chosen, and does what keys and buttons say.

import * as api from "./api.js";
import * as deliveries from "./deliveries.js";
import { Detail, download } from "./detail.js";
import { byId, count, element, size, toast, visible } from "./dom.js";
import { edit } from "./edit.js";
import { List } from "./list.js";

/** How many requests are asked for at a time. */
const PAGE = 500;

const wide = matchMedia("(min-width: 1001px)");

const list = new List({
  moved: (id, open) => {
    if (open || wide.matches || document.body.classList.contains("reading")) openSoon(id, open);
  },
  chosen: showChosen,
  wantsMore: loadMore,
});
const detail = new Detail(byId("detail"), {
  replay: () => replayThese([detail.request.id]),
  edit: editCurrent,
  copy: copyAsCurl,
  har: () => saveHar({ ids: String(detail.request.id) }, `request-${detail.request.id}.har`),
  reveal: () => open(detail.request.id, !detail.revealed),
  open: (id) => {
    list.go(id, true);
  },
  close: closeDetail,
});

let inspected = { tunnels: [] };
let source = null; // of the list
let watched = null; // of the request that is open
let loading = null; // what is on its way of the older ones
let unseen = 0;
let away = false; // what happened was not heard for a while
let resting = false; // nobody looks, and nothing is listened to
let query = {};

// ── The list ─────────────────────────────────────────────────────────────────────────────────────────────────────

function filters() {
  const value = (name) => byId(name).value.trim();
  return {
    text: value("text"), path: value("path"), method: value("method"), status: value("status"),
    tunnel: value("tunnel"), errors: byId("errors").checked,
  };
}

/** Listens to what happens, and reads the list once it is heard: so nothing falls between the two. */
function connect() {
  if (resting) return;
  source?.close();
  query = filters();
  const mine = source = api.events(query);
  mine.addEventListener("open", async () => {
    if (away && await api.renewToken()) forget(); // another process, with other requests under the same numbers
    away = false;
    if (mine === source) await reload();
  });
  mine.addEventListener("error", () => {
    away = true;
    if (mine !== source) return;
    live(false);
    // A refusal ends the stream for good: most often a filter that is not understood, and then the list says why.
    if (mine.readyState === EventSource.CLOSED) reload().then((done) => { if (done) setTimeout(connect, 1000); });
  });
  mine.addEventListener("request", (event) => heard(JSON.parse(event.data)));
  mine.addEventListener("cleared", () => {
    forget();
    showEmpty();
    showState();
  });
  mine.addEventListener("lagged", reload);
}

/** Lets go of everything that a number of a request stands for. */
function forget() {
  list.reset([], false);
  list.current = null;
  list.chooseNone();
  closeDetail();
  byId("edit").close();
}

function live(is) {
  byId("live").textContent = is ? "live" : "not connected";
  byId("live").classList.toggle("on", is);
  byId("offline").hidden = is;
}

async function reload() {
  const asked = query;
  let answer;
  try {
    answer = await api.list({ ...asked, limit: PAGE });
  } catch (error) {
    const away = error.message === "agentd does not answer";
    byId("filter-error").hidden = away;
    byId("filter-error").textContent = error.message;
    byId("offline").hidden = !away;
    return away;
  }
  if (asked !== query) return false;
  live(true);
  byId("filter-error").hidden = true;
  list.reset(answer.requests, answer.more ?? false);
  await showState();
  showEmpty();
  if (detail.request && !list.byId.has(detail.request.id) && Object.values(query).every((value) => !value)) closeDetail();
  else if (detail.request) open(detail.request.id, detail.revealed);
  return true;
}

/** Reads on behind the last one. */
function loadMore() {
  loading ??= more().finally(() => { loading = null; });
  return loading;
}

async function more() {
  const asked = query;
  const before = list.items.at(-1)?.id;
  if (before === undefined) {
    list.hasMore = false;
    return;
  }
  try {
    const answer = await api.list({ ...asked, limit: PAGE, before });
    if (asked === query) list.extend(answer.requests, (answer.more ?? false) && answer.requests.length > 0);
  } catch (error) {
    list.hasMore = false;
    toast(error.message, true);
  }
}

/** Goes to the oldest, also where not all have been read. */
async function goOldest() {
  while (list.hasMore) await loadMore();
  if (list.items.length > 0) list.go(list.items.at(-1).id, false);
}

function heard({ change, id, request }) {
  if (change === "removed") {
    list.remove(id);
    return;
  }
  const isNew = !list.byId.has(request.id);
  list.put(request);
  if (isNew) {
    byId("empty").hidden = true;
    stateSoon();
    if (document.hidden) document.title = `(${++unseen}) Requests · agentd`;
  }
  if (detail.request?.id === request.id) {
    const hadHead = detail.request.response !== null;
    detail.update(request);
    // Its head, its end, its diff: there is more to see than a summary says.
    if (request.state === "ended" || (!hadHead && request.status !== null)) open(request.id, detail.revealed);
  }
}

let stateTimer = 0;
function stateSoon() {
  stateTimer ||= setTimeout(() => {
    stateTimer = 0;
    showState();
  }, 500);
}

async function showState() {
  try {
    inspected = await api.state();
  } catch {
    return; // The stream says so, too.
  }
  deliveries.keep(inspected.tunnels.filter((tunnel) => tunnel.delivery).map((tunnel) => tunnel.name));
  const tunnels = inspected.tunnels.filter((tunnel) => tunnel.inspect);
  byId("tunnels").replaceChildren(...tunnels.slice(0, 3).map((tunnel) => element("span", { title: visible(`${tunnel.url ?? tunnel.name} → ${tunnel.upstream}`) },
    element("b", {}, visible(tunnel.url ?? tunnel.name)), ` → ${visible(tunnel.upstream)}`)), tunnels.length > 3 ? `and ${tunnels.length - 3} more` : "");
  const select = byId("tunnel");
  const names = tunnels.map((tunnel) => tunnel.name);
  if (names.join() !== [...select.options].slice(1).map((option) => option.value).join()) {
    const chosen = select.value;
    select.replaceChildren(element("option", { value: "" }, "All tunnels"), ...names.map((name) => element("option", { value: name }, visible(name))));
    select.value = names.includes(chosen) ? chosen : "";
    byId("import-tunnel").replaceChildren(...names.map((name) => element("option", { value: name }, visible(name))));
  }
  select.hidden = names.length < 2;
  byId("import-tunnel-label").hidden = names.length < 2;
  if (list.showTunnel !== names.length > 1) {
    list.showTunnel = names.length > 1;
    byId("list").classList.toggle("several", list.showTunnel);
    list.redraw();
  }
  const gone = inspected.evicted > 0 ? `, ${count(inspected.evicted)} older ones made room` : "";
  byId("memory").textContent = `${size(inspected.memory_bytes)} of ${size(inspected.memory_limit_bytes)}${gone}`;
}

function showEmpty() {
  const place = byId("empty");
  place.hidden = list.items.length > 0;
  if (!place.hidden) {
    const filtered = Object.values(query).some(Boolean);
    const tunnel = inspected.tunnels.find((tunnel) => tunnel.inspect && tunnel.url) ?? inspected.tunnels.find((tunnel) => tunnel.inspect);
    place.replaceChildren(...filtered
      ? [element("h2", {}, "Nothing passes the filters"), element("p", {}, element("button", { type: "button", onclick: clearFilters }, "Show all requests"))]
      : [element("h2", {}, "Waiting for the first request"),
        tunnel?.url ? element("p", {}, "Open ", element("b", {}, visible(tunnel.url)), " or send something:") : "",
        tunnel?.url ? element("pre", {}, `curl ${visible(tunnel.url)}`) : "",
        element("p", { class: "quiet" }, "What passes shows up here by itself. It stays in the memory of agentd on this machine.")]);
  }
  if (!detail.request) showNothing();
}

function showNothing() {
  detail.clear(element("p", { class: "nothing" }, list.items.length > 0 ? "Choose a request to read it: click, or " : "", ...list.items.length > 0 ? [element("kbd", {}, "j"), " ", element("kbd", {}, "k")] : []));
}

function clearFilters() {
  byId("filters").reset();
  connect();
}

// ── One request ──────────────────────────────────────────────────────────────────────────────────────────────────

let openTimer = 0;
function openSoon(id, now) {
  clearTimeout(openTimer);
  // Whoever runs through the list with a key held down reads none of what passes by.
  openTimer = setTimeout(() => open(id, false), now ? 0 : 60);
}

let asked = 0;
async function open(id, reveal) {
  const mine = ++asked;
  try {
    const request = await api.request(id, reveal);
    if (mine !== asked) return;
    detail.show(request, reveal);
    document.body.classList.add("reading");
    watch(request);
  } catch (error) {
    if (mine !== asked) return;
    if (detail.request?.id === id) return; // It has made room for others: what is shown stays.
    toast(error.message, true);
  }
}

/** Follows a request while it is open: pieces of its bodies, messages of its WebSocket. */
function watch(request) {
  if (watched?.id === request.id && request.state !== "ended") return;
  unwatch();
  if (request.state === "ended" || document.hidden) return;
  const { id } = request;
  const mine = watched = { id, source: api.events({ watch: String(id), text: "", path: request.target.includes("*") ? "" : request.target.slice(0, 1000) }) };
  // What came before it was heard is read again.
  mine.source.addEventListener("open", () => { if (watched === mine && detail.request?.id === id) open(id, detail.revealed); });
  mine.source.addEventListener("body", (event) => {
    if (watched === mine && !detail.piece(JSON.parse(event.data)) && detail.request?.id === id) open(id, detail.revealed);
  });
  mine.source.addEventListener("frame", (event) => {
    const { id: of, frame } = JSON.parse(event.data);
    if (watched === mine && of === detail.request?.id) detail.frame(frame);
  });
  mine.source.addEventListener("lagged", () => open(id, detail.revealed));
}

function unwatch() {
  watched?.source.close();
  watched = null;
}

function closeDetail() {
  asked++;
  unwatch();
  document.body.classList.remove("reading");
  showNothing();
  byId("list").focus();
}

/** Does something that may be refused, and says so then. */
async function attempt(act) {
  try {
    return await act();
  } catch (error) {
    toast(error.message, true);
    return undefined;
  }
}

async function replayThese(ids, edits) {
  const made = [];
  const refused = [];
  for (const id of ids) {
    try {
      made.push(...(await api.replay(id, edits)).ids);
    } catch (error) {
      refused.push(ids.length > 1 ? `#${id}: ${error.message}` : error.message);
      if (edits) throw error;
    }
  }
  if (refused.length > 0) toast(refused.join("\n"), true);
  else toast(made.length === 1 ? `Replayed as #${made[0]}` : `Replayed as #${made[0]} to #${made.at(-1)}`);
  if (made.length > 0) list.go(made.at(-1), true);
}

function editCurrent() {
  const { request } = detail;
  if (request && request.kind !== "websocket") edit(request, (edits) => replayThese([request.id], edits));
}

function replayCurrent() {
  if (list.chosen.size > 0) replayThese(list.chosenInOrder);
  else if (detail.request) replayThese([detail.request.id]);
  else if (list.byId.has(list.current)) replayThese([list.current]);
}

async function copyAsCurl() {
  const id = detail.request?.id ?? list.current;
  if (id === null) return;
  const text = await attempt(() => api.curl(id, detail.revealed));
  if (text === undefined) return;
  try {
    await navigator.clipboard.writeText(text);
    toast(text.includes("***") && !detail.revealed ? "Copied. Masked values are ***: reveal them first to copy them" : "Copied");
  } catch {
    toast("The browser does not let the page write the clipboard", true);
  }
}

async function saveHar(which, name) {
  const blob = await attempt(() => api.har(which, detail.revealed && which.ids === String(detail.request?.id)));
  if (blob) download(blob, name, "application/json");
}

// ── Choosing, importing, looks ───────────────────────────────────────────────────────────────────────────────────

function showChosen() {
  byId("chosen").hidden = list.chosen.size === 0;
  byId("chosen-count").textContent = `${count(list.chosen.size)} chosen`;
}

function startImport(text = "") {
  const dialog = byId("importing");
  byId("import-error").hidden = true;
  byId("import-text").value = text;
  byId("import-file").value = "";
  dialog.showModal();
  byId("import-text").focus();
}

async function importText(text) {
  const isHar = text.trimStart().startsWith("{");
  const tunnel = byId("import-tunnel-label").hidden ? "" : byId("import-tunnel").value;
  const { ids } = await api.importFrom(text, isHar ? "application/json" : "text/plain", tunnel);
  byId("importing").close();
  toast(ids.length === 1 ? `Imported as #${ids[0]}: r sends it` : `Imported ${ids.length} requests`);
  if (ids.length > 0) list.go(ids.at(-1), true);
}

const THEMES = ["", "light", "dark"];
function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  byId("theme").title = `${theme || "As the system"} (t)`;
}

function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "") + 1) % THEMES.length];
  setTheme(theme);
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // It is only for this visit then.
  }
}

let sure = 0;
byId("clear").addEventListener("click", async () => {
  const button = byId("clear");
  const back = () => {
    clearTimeout(sure);
    sure = 0;
    button.textContent = "Clear";
    button.classList.remove("danger");
  };
  if (sure) {
    back();
    await attempt(api.clear);
    return;
  }
  button.textContent = "Forget all?";
  button.classList.add("danger");
  sure = setTimeout(back, 3000);
});
byId("har").addEventListener("click", () => saveHar(filters(), "requests.har"));
byId("import").addEventListener("click", () => startImport());
byId("help-button").addEventListener("click", () => byId("help").showModal());
byId("theme").addEventListener("click", nextTheme);
byId("chosen-replay").addEventListener("click", () => replayThese(list.chosenInOrder));
byId("chosen-har").addEventListener("click", () => saveHar({ ids: list.chosenInOrder.join(",") }, "requests.har"));
byId("chosen-none").addEventListener("click", () => list.chooseNone());

let filterTimer = 0;
byId("filters").addEventListener("input", () => {
  clearTimeout(filterTimer);
  filterTimer = setTimeout(connect, 200);
});
byId("filters").addEventListener("submit", (event) => {
  event.preventDefault();
  connect();
});

byId("importing").querySelector(".cancel").addEventListener("click", () => byId("importing").close());
byId("importing").querySelector("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    const file = byId("import-file").files[0];
    await importText(file ? await file.text() : byId("import-text").value);
  } catch (error) {
    byId("import-error").textContent = error.message;
    byId("import-error").hidden = false;
  }
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", async (event) => {
  event.preventDefault();
  const file = event.dataTransfer?.files[0];
  if (file) startImport(await file.text());
});

const KEYS = {
  j: () => list.step(1), k: () => list.step(-1), ArrowDown: () => list.step(1), ArrowUp: () => list.step(-1),
  g: () => list.items.length > 0 && list.go(list.items[0].id, false),
  G: goOldest,
  Enter: () => list.byId.has(list.current) && list.go(list.current, true),
  Escape: closeDetail,
  r: replayCurrent, e: editCurrent, c: copyAsCurl,
  d: () => detail.request && saveHar({ ids: String(detail.request.id) }, `request-${detail.request.id}.har`),
  v: () => detail.request && open(detail.request.id, !detail.revealed),
  x: () => list.byId.has(list.current) && list.choose(list.current),
  "/": () => byId("text").focus(),
  f: () => byId("errors").click(),
  i: () => startImport(),
  q: deliveries.open,
  t: nextTheme,
  "?": () => byId("help").showModal(),
};

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const at = event.target;
  if (at.matches("input, textarea, select") && at.type !== "checkbox") {
    if (event.key !== "Escape") return;
    // A browser would empty the field, and say so to nobody.
    event.preventDefault();
    byId("list").focus();
    return;
  }
  // A button that has the focus takes what presses it, a text what scrolls it.
  if (event.key === "Enter" && at.matches("button, summary, a")) return;
  if (event.key.startsWith("Arrow") && at.closest(".scroll")) return;
  const act = KEYS[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

/**
 * All tabs of a browser share six connections to an address, and a stream holds one. So whoever is not seen follows no
 * request, and of the tabs that are not seen only the one that was hidden last listens: its title counts what comes.
 */
const hidden = "BroadcastChannel" in window ? new BroadcastChannel("hidden") : null;
hidden?.addEventListener("message", () => {
  if (!document.hidden || resting) return;
  resting = true;
  away = true;
  source?.close();
  source = null;
});

function hide() {
  unwatch();
  hidden?.postMessage("");
}

function appear() {
  unseen = 0;
  document.title = "Requests · agentd";
  if (resting) {
    resting = false;
    connect();
  } else if (detail.request) {
    open(detail.request.id, detail.revealed);
  }
}

document.addEventListener("visibilitychange", () => document.hidden ? hide() : appear());

try {
  const theme = localStorage.getItem("theme");
  if (THEMES.includes(theme)) setTheme(theme);
} catch {
  // There is no memory of it.
}
/** What the address names is opened: the terminal leads here. */
function openNamed() {
  const id = Number(/^#(\d+)$/.exec(location.hash)?.[1] ?? 0);
  if (id > 0) list.go(id, true);
}
addEventListener("hashchange", openNamed);

showNothing();
if (document.hidden) hide();
connect();
openNamed();
