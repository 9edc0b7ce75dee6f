// The list of requests: only the rows that are seen exist, so a thousand cost what thirty do.

import { byId, count, duration, element, size, timeOfDay, visible } from "./dom.js";

const narrow = matchMedia("(max-width: 760px)");

/** The height of a row in pixels, as in page.css. */
const rowHeight = () => (narrow.matches ? 56 : 34);

/** Rows beyond the edge of what is seen. */
const MARGIN = 6;

/** How a request stands, in a word and a colour. */
export function standing(request) {
  if (request.state === "open") {
    if (request.status === 101) return { text: "101", kind: "live", title: "open" };
    return { text: request.status === null ? "···" : String(request.status), kind: "live", title: "in flight" };
  }
  if (request.source === "import" && request.status === null && !request.error) {
    return { text: "new", kind: "none", title: "imported, not sent yet" };
  }
  if (request.status === null) {
    const text = request.outcome === "cancelled" ? "gone" : "fail";
    return { text, kind: "bad", title: request.error ?? request.outcome ?? "" };
  }
  const kind = request.outcome === "failed" ? "bad" : ["none", "info", "good", "moved", "client", "bad"][Math.floor(request.status / 100)] ?? "none";
  return { text: String(request.status), kind, title: request.error ?? "" };
}

/** The rows and which of them is current or chosen. */
export class List {
  /** @param {{moved: function, chosen: function, wantsMore: function}} told is called when something happens. */
  constructor(told) {
    this.told = told;
    this.scroller = byId("list");
    this.space = byId("space");
    this.items = []; // newest first
    this.byId = new Map();
    this.rows = new Map(); // id to its element
    this.current = null;
    this.chosen = new Set();
    this.showTunnel = false;
    this.hasMore = false;
    this.scheduled = false;
    this.fresh = new Set();
    this.scroller.addEventListener("scroll", () => this.schedule(), { passive: true });
    new ResizeObserver(() => this.schedule()).observe(this.scroller);
    narrow.addEventListener("change", () => this.redraw());
    this.space.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (!row) return;
      const id = Number(row.dataset.id);
      if (event.target.closest(".choose") || event.shiftKey) this.choose(id);
      else this.go(id, true);
    });
  }

  /** Begins anew with these. */
  reset(requests, hasMore) {
    this.items = [...requests].sort((a, b) => b.id - a.id);
    this.byId = new Map(this.items.map((item) => [item.id, item]));
    this.hasMore = hasMore;
    this.fresh.clear();
    for (const id of this.chosen) if (!this.byId.has(id)) this.chosen.delete(id);
    this.redraw();
  }

  /** Adds older ones behind the last. */
  extend(requests, hasMore) {
    this.hasMore = hasMore;
    for (const item of requests) if (!this.byId.has(item.id)) this.insert(item);
    this.redraw();
  }

  /** Where an id stands, or would. */
  place(id) {
    let [low, high] = [0, this.items.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.items[middle].id > id) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  insert(item) {
    this.byId.set(item.id, item);
    const at = this.place(item.id);
    this.items.splice(at, 0, item);
    return at;
  }

  /** Takes one in, or what is new about it. */
  put(item) {
    if (this.byId.has(item.id)) {
      this.items[this.place(item.id)] = item;
      this.byId.set(item.id, item);
      const row = this.rows.get(item.id);
      if (row) this.fill(row, item);
      return;
    }
    const at = this.insert(item);
    this.fresh.add(item.id);
    // What somebody reads does not move away under them.
    const { scrollTop } = this.scroller;
    if (scrollTop > 0 && at * rowHeight() <= scrollTop) {
      this.space.style.height = `${this.items.length * rowHeight()}px`;
      this.scroller.scrollTop = scrollTop + rowHeight();
    }
    this.schedule();
  }

  /** Takes one out. */
  remove(id) {
    if (!this.byId.delete(id)) return;
    this.items.splice(this.place(id), 1);
    this.chosen.delete(id);
    this.schedule();
  }

  /** Makes one the current one; `open` says that somebody wants to read it. */
  go(id, open) {
    this.current = id;
    this.reveal(id);
    this.mark();
    this.told.moved(id, open);
  }

  /** Moves by so many rows. */
  step(by) {
    if (this.items.length === 0) return;
    const to = !this.byId.has(this.current) ? 0 : Math.max(0, Math.min(this.items.length - 1, this.place(this.current) + by));
    this.go(this.items[to].id, false);
  }

  /** Puts one among the chosen, or takes it away. */
  choose(id) {
    if (!this.chosen.delete(id)) this.chosen.add(id);
    this.mark();
    this.told.chosen();
  }

  /** Chooses none. */
  chooseNone() {
    this.chosen.clear();
    this.mark();
    this.told.chosen();
  }

  /** The ids of the chosen, oldest first: the order in which they came. */
  get chosenInOrder() {
    return [...this.chosen].sort((a, b) => a - b);
  }

  reveal(id) {
    if (!this.byId.has(id)) return;
    const at = this.place(id);
    const [top, height] = [at * rowHeight(), this.scroller.clientHeight];
    if (top < this.scroller.scrollTop) this.scroller.scrollTop = top;
    else if (top + rowHeight() > this.scroller.scrollTop + height) {
      this.scroller.scrollTop = top + rowHeight() - height;
    }
    this.draw();
  }

  redraw() {
    this.space.replaceChildren();
    this.rows.clear();
    this.draw();
  }

  schedule() {
    if (this.scheduled) return;
    this.scheduled = true;
    requestAnimationFrame(() => {
      this.scheduled = false;
      this.draw();
    });
  }

  draw() {
    const height = rowHeight();
    const first = Math.max(0, Math.floor(this.scroller.scrollTop / height) - MARGIN);
    const last = Math.min(this.items.length, Math.ceil((this.scroller.scrollTop + this.scroller.clientHeight) / height) + MARGIN);
    this.space.style.height = `${this.items.length * height}px`;
    this.scroller.setAttribute("aria-rowcount", this.items.length);
    const seen = new Set();
    for (let at = first; at < last; at++) {
      const item = this.items[at];
      seen.add(item.id);
      let row = this.rows.get(item.id);
      if (!row) {
        row = this.make(item);
        this.rows.set(item.id, row);
        this.space.append(row);
      }
      row.style.transform = `translateY(${at * height}px)`;
      row.setAttribute("aria-rowindex", at + 1);
    }
    for (const [id, row] of this.rows) {
      if (!seen.has(id)) {
        row.remove();
        this.rows.delete(id);
      }
    }
    this.mark();
    byId("count").textContent = `${count(this.items.length)}${this.hasMore ? "+" : ""}`;
    if (this.hasMore && last > this.items.length - 20) this.told.wantsMore();
  }

  mark() {
    for (const [id, row] of this.rows) {
      row.setAttribute("aria-selected", id === this.current);
      row.classList.toggle("chosen", this.chosen.has(id));
    }
    if (this.rows.has(this.current)) this.scroller.setAttribute("aria-activedescendant", `row-${this.current}`);
    else this.scroller.removeAttribute("aria-activedescendant");
  }

  make(item) {
    const cell = (name) => element("span", { class: name, role: "gridcell" });
    const row = element("div", { class: "row", role: "row", id: `row-${item.id}`, "data-id": item.id },
      element("span", { class: "choose", role: "gridcell", title: "Choose (x)" }),
      cell("status"), cell("method"), cell("target"), cell("tunnel"), cell("took"), cell("size"), cell("time"));
    if (this.fresh.delete(item.id)) row.classList.add("fresh");
    this.fill(row, item);
    return row;
  }

  fill(row, item) {
    const { text, kind, title } = standing(item);
    const [, status, method, target, tunnel, took, bytes, time] = row.children;
    status.className = `status ${kind}`;
    status.textContent = text;
    status.title = title;
    method.textContent = visible(item.kind === "websocket" ? "WS" : item.method.slice(0, 24));
    const path = element("bdi", {}, visible(item.target.slice(0, 400)));
    const mark = item.replay_of ? [element("span", { class: "mark", title: `replay of #${item.replay_of}` }, `↻ ${item.replay_of}`)]
      : item.source === "import" ? [element("span", { class: "mark" }, "import")] : [];
    target.replaceChildren(...mark, path);
    target.title = item.target.slice(0, 400);
    tunnel.textContent = this.showTunnel ? item.tunnel : "";
    took.textContent = item.ended_us === null || item.ended_us === undefined ? "" : duration(item.ended_us);
    bytes.textContent = item.kind === "websocket" ? `${count(item.frames)} msg` : item.response_bytes > 0 ? size(item.response_bytes) : "";
    time.textContent = timeOfDay(item.received_at);
  }
}
