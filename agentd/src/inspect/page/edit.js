// The dialog that edits a request before it is replayed. What nobody touched is not sent along, so that it stays as it
// was, to the byte.

import { asText, fromBase64, toBase64, withLineEnds } from "./body.js";
import { byId, count, element, size, visible } from "./dom.js";

/**
 * Opens the dialog for a request. `send` gets the edits, as the schema Replay has them, and may throw what people are
 * told.
 */
export function edit(request, send) {
  const dialog = byId("edit");
  const method = element("input", { value: request.method, "aria-label": "Method", class: "method", required: true, spellcheck: "false", maxlength: "64" });
  const target = element("input", { value: request.target, "aria-label": "Target", class: "target", required: true, spellcheck: "false" });
  const table = element("div", { class: "rows" });
  const addRow = (name, value, original) => table.append(fieldRow(name, value, original));
  // A mask says for which field it stands: rows before it may go.
  request.request.fields.forEach(([name, value], at) => addRow(name, value, value.masked ? { ...value, at } : value));
  const initial = JSON.stringify(readFields(table));
  const body = bodyEditor(request.request);
  const times = element("input", { type: "number", min: "1", max: "100", value: "1", class: "times", "aria-label": "How many times" });
  const error = element("p", { class: "note bad", role: "alert", hidden: true });
  const form = element("form", { method: "dialog" },
    element("h2", { id: "edit-title" }, `Edit and replay #${request.id}`),
    element("div", { class: "line" }, method, target),
    element("h3", {}, "Fields"), table,
    element("button", { type: "button", class: "link", onclick: () => {
      addRow("", "", undefined);
      table.lastElementChild.querySelector("input").focus();
    } }, "+ field"),
    element("h3", {}, "Body"), body.element,
    error,
    element("p", { class: "actions" },
      element("label", {}, "times ", times), element("span", { class: "gap" }),
      element("button", { type: "button", onclick: () => dialog.close() }, "Cancel"),
      element("button", { type: "submit", class: "primary" }, "Send to the upstream")));
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.metaKey || event.ctrlKey)) form.requestSubmit();
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    error.hidden = true;
    try {
      const edits = {};
      if (method.value !== request.method) edits.method = method.value.trim();
      if (target.value !== request.target) edits.target = target.value.trim();
      const changed = body.read();
      if (changed) edits.body = changed.body;
      let fields = readFields(table);
      if (changed?.unpacked) fields = fields.filter(([name]) => name.toLowerCase() !== "content-encoding");
      if (JSON.stringify(fields) !== initial) edits.fields = fields;
      if (times.valueAsNumber > 1) edits.times = times.valueAsNumber;
      await send(edits);
      dialog.close();
    } catch (failure) {
      error.textContent = failure.message;
      error.hidden = false;
    }
  });
  dialog.replaceChildren(form);
  dialog.showModal();
  method.focus();
}

function fieldRow(name, value, original) {
  const label = element("input", { value: name, "aria-label": "Name", class: "name", spellcheck: "false" });
  const text = element("input", { "aria-label": "Value", class: "value", spellcheck: "false" });
  const row = element("div", { class: "row" }, label, text,
    element("button", { type: "button", class: "link", "aria-label": "Remove this field", onclick: () => row.remove() }, "✕"));
  if (typeof value === "string") {
    text.value = value;
    // An input knows no line ends: a value that it changes stays what it was unless somebody types.
    row.kept = text.value === value ? undefined : value;
  } else {
    row.kept = original;
    text.placeholder = value.masked ? "masked: stays as it was captured" : "not UTF-8: stays as it was captured";
  }
  text.addEventListener("input", () => { row.kept = undefined; });
  return row;
}

function readFields(table) {
  return [...table.children].map((row) => [row.querySelector(".name").value.trim(), row.kept ?? row.querySelector(".value").value])
    .filter(([name]) => name !== "");
}

function bodyEditor(message) {
  const { body } = message;
  const unpacked = Boolean(body.decoded && !body.decoded.cut && !body.decoded.error);
  const bytes = fromBase64(unpacked ? body.decoded.base64 : body.base64);
  const { text, valid } = asText(bytes);
  const whole = !body.cut && !body.dropped;
  const editable = whole && valid && !text.includes("\0") && (unpacked || !body.decoded);
  const area = element("textarea", { rows: "10", spellcheck: "false", "aria-label": "Body" });
  const remark = element("p", { class: "quiet" });
  let picked = null;
  const file = element("input", { type: "file", "aria-label": "A file for the body", onchange: async () => {
    picked = file.files[0] ? new Uint8Array(await file.files[0].arrayBuffer()) : null;
    area.disabled = picked !== null;
    if (picked) remark.textContent = `${size(picked.length)} of the file are sent.`;
  } });
  if (editable) area.value = text;
  else area.placeholder = whole
    ? `${size(body.size)} that are not text: sent as they were captured, unless you write something here or take a file`
    : `Only ${count(body.kept)} of ${count(body.size)} bytes were kept: write another body here, or take a file`;
  if (editable && unpacked) remark.textContent = `It came as ${visible(body.decoded.coding)}. Edited, it is sent unpacked, without content-encoding.`;
  // A text area has line ends of its own: those of what nobody touched stay what they were.
  const initial = area.value;
  let [edited, seen] = [editable ? text : "", initial];
  const follow = () => {
    edited = withLineEnds(edited, seen, area.value, area.selectionEnd);
    seen = area.value;
  };
  area.addEventListener("input", follow);
  return {
    element: element("div", {}, area, element("p", {}, element("label", {}, "or a file ", file)), remark),
    read() {
      if (picked) return { body: { base64: toBase64(picked) }, unpacked: false };
      if (area.value === initial) return null;
      follow();
      return { body: { text: edited }, unpacked: editable && unpacked };
    },
  };
}
