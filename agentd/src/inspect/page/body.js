// Bodies: from the bytes that passed to something a person reads. Pure: no document, no network. What comes in was
// written by anybody; what goes out is text and numbers, never markup.

/** Bytes of base64 text. */
export function fromBase64(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let at = 0; at < binary.length; at++) bytes[at] = binary.charCodeAt(at);
  return bytes;
}

/** Base64 text of bytes. */
export function toBase64(bytes) {
  let binary = "";
  for (let at = 0; at < bytes.length; at += 0x8000) {
    binary += String.fromCharCode(...bytes.subarray(at, at + 0x8000));
  }
  return btoa(binary);
}

/** The text of bytes, and whether all of them were valid. What is not becomes U+FFFD. */
export function asText(bytes, charset = "utf-8") {
  try {
    return { text: new TextDecoder(charset, { fatal: true, ignoreBOM: true }).decode(bytes), valid: true };
  } catch {
    return { text: new TextDecoder(charset, { ignoreBOM: true }).decode(bytes), valid: false };
  }
}

const BYTE_ORDER_MARKS = [["utf-8", [0xef, 0xbb, 0xbf]], ["utf-16le", [0xff, 0xfe]], ["utf-16be", [0xfe, 0xff]]];

/**
 * The charset of a body with a media type, as the browser calls it: what its first bytes say, what the type says, or UTF-8.
 */
export function charsetOf(bytes, type) {
  const named = parameter(type, "charset");
  const isText = named !== "" || essence(type).startsWith("text/") || /[/+](json|xml)$/.test(essence(type));
  const marked = isText && BYTE_ORDER_MARKS.find(([, mark]) => mark.every((byte, at) => bytes[at] === byte));
  if (marked) return marked[0];
  try {
    return new TextDecoder(named || "utf-8").encoding;
  } catch {
    return "utf-8"; // Nobody knows such a one.
  }
}

/** The first value of a field that is text, or "". `fields` are [name, value] in the order in which they came. */
export function field(fields, name) {
  const found = fields.find(([own, value]) => own.toLowerCase() === name && typeof value === "string");
  return found ? found[1] : "";
}

/** A media type without its parameters, in lower case. */
export function essence(type) {
  return type.split(";", 1)[0].trim().toLowerCase();
}

/** A parameter of a media type or of a disposition, or "". */
export function parameter(value, name) {
  const pattern = /;\s*([^\s=;]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;]*))/g;
  for (const [, own, quoted, plain] of value.matchAll(pattern)) {
    if (own.toLowerCase() === name) {
      return quoted === undefined ? plain.trim() : quoted.replace(/\\(.)/g, "$1");
    }
  }
  return "";
}

const JSON_TOKEN = /"(?:[^"\\\u0000-\u001f]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null|[[\]{},:]/g;

/**
 * JSON laid out over lines, as [kind, text] pieces. Numbers, escapes and the order of names stay as they were
 * written, repeated names too: nothing is parsed and written again.
 * @returns {Array<[string, string]> | null} null where the text is not JSON.
 */
export function prettyJson(text) {
  try {
    JSON.parse(text);
  } catch {
    return null;
  }
  const pieces = [];
  const tokens = text.match(JSON_TOKEN) ?? [];
  let depth = 0;
  const line = () => pieces.push(["", "\n" + "  ".repeat(Math.min(depth, 60))]);
  tokens.forEach((token, at) => {
    const next = tokens[at + 1];
    if (token === "{" || token === "[") {
      pieces.push(["punctuation", token]);
      depth++;
      if (next !== "}" && next !== "]") line();
    } else if (token === "}" || token === "]") {
      depth--;
      const before = tokens[at - 1];
      if (before !== "{" && before !== "[") line();
      pieces.push(["punctuation", token]);
    } else if (token === ",") {
      pieces.push(["punctuation", ","]);
      line();
    } else if (token === ":") {
      pieces.push(["punctuation", ": "]);
    } else if (token.startsWith('"')) {
      pieces.push([next === ":" ? "name" : "string", token]);
    } else {
      pieces.push([/^[tfn]/.test(token) ? "word" : "number", token]);
    }
  });
  return pieces;
}

/** One JSON text a line, or null. */
export function jsonLines(text) {
  const lines = text.split("\n").filter((line) => line.trim() !== "");
  if (lines.length < 2) return null;
  const all = lines.map(prettyJson);
  return all.every((pieces) => pieces !== null) ? all.flatMap((pieces) => [...pieces, ["", "\n"]]) : null;
}

/** The fields of a form, names and values decoded; what cannot be decoded stays as it is. */
export function formFields(text, charset = "utf-8") {
  const decode = (part) => {
    const spaced = part.replace(/\+/g, " ");
    if (charset === "utf-8" || !/^[\x20-\x7e]*$/.test(spaced)) {
      try {
        return decodeURIComponent(spaced);
      } catch {
        return spaced;
      }
    }
    const bytes = spaced.replace(/%([0-9a-f]{2})/gi, (_, hex) => String.fromCharCode(parseInt(hex, 16)));
    const { text: decoded, valid } = asText(Uint8Array.from(bytes, (char) => char.charCodeAt(0)), charset);
    return valid ? decoded : spaced;
  };
  return text.split("&").filter((pair) => pair !== "").map((pair) => {
    const at = pair.indexOf("=");
    return at < 0 ? [decode(pair), ""] : [decode(pair.slice(0, at)), decode(pair.slice(at + 1))];
  });
}

function find(bytes, wanted, from) {
  outer: for (let at = from; at <= bytes.length - wanted.length; at++) {
    for (let offset = 0; offset < wanted.length; offset++) {
      if (bytes[at + offset] !== wanted[offset]) continue outer;
    }
    return at;
  }
  return -1;
}

/** How many parts of a multipart body are shown. */
const PARTS_LIMIT = 100;

/**
 * The parts of a multipart body.
 * @returns {Array<{fields: Array<[string, string]>, name: string, file: string, bytes: Uint8Array, cut: boolean}>}
 */
export function multipart(bytes, boundary) {
  if (boundary === "") return [];
  const delimiter = new TextEncoder().encode("--" + boundary);
  const parts = [];
  let at = find(bytes, delimiter, 0);
  while (at >= 0 && parts.length < PARTS_LIMIT) {
    let begin = at + delimiter.length;
    if (bytes[begin] === 45 && bytes[begin + 1] === 45) break; // "--": the last one
    while (bytes[begin] === 32 || bytes[begin] === 9) begin++;
    begin += bytes[begin] === 13 ? 2 : 1;
    const next = find(bytes, delimiter, begin);
    let end = next < 0 ? bytes.length : next;
    if (next >= 0 && bytes[end - 1] === 10) end -= bytes[end - 2] === 13 ? 2 : 1;
    const part = bytes.subarray(begin, Math.max(begin, end));
    let head = find(part, [13, 10, 13, 10], 0);
    let skip = 4;
    if (part[0] === 13 && part[1] === 10) [head, skip] = [0, 2];
    const fields = head <= 0 ? [] : asText(part.subarray(0, head)).text.split(/\r\n(?![ \t])/).map((line) => {
      const colon = line.indexOf(":");
      return colon < 0 ? [line, ""] : [line.slice(0, colon), line.slice(colon + 1).trim()];
    });
    const disposition = field(fields, "content-disposition");
    parts.push({
      fields,
      name: parameter(disposition, "name"),
      file: parameter(disposition, "filename"),
      bytes: head < 0 ? new Uint8Array() : part.subarray(head + skip),
      cut: next < 0,
    });
    at = next;
  }
  return parts;
}

/**
 * The events of an event stream, also of one that has not ended yet.
 * @returns {Array<{name: string, id: string, data: string, end: number, whole: boolean}>} `end` is the offset in bytes
 * behind it, `whole` is false for one that the stream is still in.
 */
export function streamEvents(bytes) {
  const events = [];
  const begin = () => ({ name: "", id: "", data: [], any: false });
  let open = begin();
  let at = 0;
  const close = (whole) => {
    if (open.any) events.push({ name: open.name, id: open.id, data: open.data.join("\n"), end: at, whole });
    open = begin();
  };
  while (at < bytes.length) {
    let end = at;
    while (end < bytes.length && bytes[end] !== 10 && bytes[end] !== 13) end++;
    const { text: line } = asText(bytes.subarray(at, end));
    at = Math.min(bytes.length, end + (bytes[end] === 13 && bytes[end + 1] === 10 ? 2 : 1));
    if (line === "") {
      close(true);
      continue;
    }
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (colon === 0) continue; // a comment, which keeps the connection alive
    open.any = true;
    if (name === "data") open.data.push(value);
    else if (name === "event") open.name = value;
    else if (name === "id") open.id = value;
  }
  close(false);
  return events;
}

/** Rows of a hex view: offset, sixteen bytes, and their text. */
export function hexRows(bytes, from, count) {
  const rows = [];
  for (let at = from; at < Math.min(bytes.length, from + count * 16); at += 16) {
    const row = bytes.subarray(at, at + 16);
    const hex = Array.from(row, (byte, column) => byte.toString(16).padStart(2, "0") + (column === 7 ? " " : ""));
    const text = Array.from(row, (byte) => byte >= 32 && byte < 127 ? String.fromCharCode(byte) : "·");
    rows.push([at.toString(16).padStart(8, "0"), hex.join(" ").padEnd(48), text.join("")]);
  }
  return rows;
}

const IMAGES = new Set([
  "image/png", "image/jpeg", "image/gif", "image/webp", "image/avif", "image/bmp", "image/x-icon",
  "image/vnd.microsoft.icon", "image/svg+xml",
]);

/** Whether a media type is a picture that every browser shows. */
export function isImage(kind) {
  return IMAGES.has(kind);
}

/** Whether bytes look like something that is not text in a charset. */
export function looksBinary(bytes, charset = "utf-8") {
  const sample = bytes.subarray(0, 4096);
  // The sample may end within a character.
  const valid = asText(sample.subarray(0, Math.max(0, sample.length - 4)), charset).valid;
  const codes = charset.startsWith("utf-16") ? asText(sample, charset).text.split("").map((char) => char.charCodeAt(0)) : sample;
  let odd = 0;
  for (const code of codes) {
    if (code === 0) return true;
    if (code < 9 || (code > 13 && code < 32 && code !== 27)) odd++;
  }
  return odd * 10 > codes.length || (!valid && odd > 0);
}

/**
 * The views that fit a body, the best first.
 * @returns {string[]} of "events", "json", "form", "parts", "image", "text", "hex".
 */
export function viewsOf(bytes, type) {
  const kind = essence(type);
  const views = [];
  if (kind === "text/event-stream") views.push("events");
  if (kind.startsWith("multipart/") && multipart(bytes, parameter(type, "boundary")).length > 0) views.push("parts");
  if (isImage(kind)) views.push("image");
  if (kind === "application/x-www-form-urlencoded") views.push("form");
  const charset = charsetOf(bytes, type);
  const binary = looksBinary(bytes, charset);
  if (!binary) {
    const { text } = asText(bytes, charset);
    const first = text.trimStart()[0];
    const said = kind.endsWith("json") || kind.endsWith("ndjson");
    if ((said || first === "{" || first === "[") && (prettyJson(text) || jsonLines(text))) views.push("json");
  }
  return binary ? [...views, "hex", "text"] : [...views, "text", "hex"];
}

/** Where a place in a text area's value is in its text, whose line ends may be two characters. */
function placeIn(text, place) {
  let at = 0;
  for (let passed = 0; passed < place; passed++) at += text.startsWith("\r\n", at) ? 2 : 1;
  return at;
}

/**
 * A text after one edit in a text area, which turned its value from `before` into `after` and writes all line ends as
 * LF. Those outside the edit stay; new ones are as the one of the line that the edit is in. `caret` is where it has
 * left the caret: it tells one of several equal characters from the others.
 */
export function withLineEnds(text, before, after, caret = after.length) {
  const shorter = Math.min(before.length, after.length);
  const same = (end) => before.at(-1 - end) === after.at(-1 - end);
  let [begin, end] = [0, 0];
  while (begin < shorter && before[begin] === after[begin]) begin++;
  while (end < shorter - begin && same(end)) end++;
  while (begin > 0 && after.length - end > caret && same(end)) [begin, end] = [begin - 1, end + 1];
  const from = placeIn(text, begin);
  const to = from + placeIn(text.slice(from), before.length - end - begin);
  const lineEnd = /\r\n?|\n/;
  const own = lineEnd.exec(text.slice(from))?.[0] ?? lineEnd.exec(text)?.[0] ?? "\n";
  return text.slice(0, from) + after.slice(begin, after.length - end).replaceAll("\n", own) + text.slice(to);
}
