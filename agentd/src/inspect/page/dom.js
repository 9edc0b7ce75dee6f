// Elements. Everything that came over the wire goes through here as text: nothing is ever parsed as markup.

/**
 * Makes an element. In `attributes`, `on…` are listeners, `class` and everything else are attributes, and what is
 * null, undefined or false is left out. Children are nodes or text.
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  append(made, children);
  return made;
}

function append(parent, children) {
  for (const child of children) {
    if (child === null || child === undefined || child === false) continue;
    if (Array.isArray(child)) append(parent, child);
    else parent.append(child);
  }
}

/** The element of the document with an id. */
export function byId(id) {
  return document.getElementById(id);
}

/**
 * Text with what one cannot see made visible: control characters as their pictures, and what would turn the direction
 * of the text around it or hide in it as its number. `lines` keeps line ends and tabs.
 */
export function visible(text, lines = false) {
  const hidden = lines
    ? /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g
    : /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
  return text.replace(lines ? /\r\n/g : /(?!)/g, "\n").replace(hidden, (char) => {
    const code = char.charCodeAt(0);
    if (code < 32) return String.fromCharCode(0x2400 + code);
    if (code === 127) return "␡";
    return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

/** How much of a long text is shown before somebody asks for the rest, in characters. */
const SHOWN = 600;

/** Text in an element; a long one is shown in part, with a button for the rest. */
export function longText(tag, text, attributes = {}, lines = false) {
  const made = element(tag, { dir: "auto", ...attributes }, visible(text.slice(0, SHOWN), lines));
  if (text.length > SHOWN) {
    made.append("… ", element("button", {
      type: "button", class: "link",
      onclick: () => made.replaceChildren(visible(text, lines)),
    }, `show all ${count(text.length)} characters`));
  }
  return made;
}

const numbers = new Intl.NumberFormat("en");

/** A number for people. */
export function count(number) {
  return numbers.format(number);
}

/** A size for people. */
export function size(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  const units = ["kB", "MB", "GB", "TB"];
  let value = bytes;
  let unit = -1;
  do {
    value /= 1000;
    unit++;
  } while (value >= 999.5 && unit < units.length - 1);
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

/** A duration for people, from microseconds. */
export function duration(micros) {
  if (micros < 1000) return `${micros} µs`;
  const ms = micros / 1000;
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  if (ms < 1000) return `${Math.round(ms)} ms`;
  const seconds = ms / 1000;
  if (seconds < 100) return `${seconds < 10 ? seconds.toFixed(2) : seconds.toFixed(1)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 120) return withRest(minutes, "min", Math.floor(seconds % 60), "s");
  return withRest(Math.floor(minutes / 60), "h", minutes % 60, "min");
}

const withRest = (many, unit, rest, smaller) => `${many} ${unit}${rest > 0 ? ` ${rest} ${smaller}` : ""}`;

const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });

/** The time of day, from microseconds since 1970. */
export function timeOfDay(micros) {
  return clock.format(new Date(micros / 1000));
}

/** Date and time to the millisecond, from microseconds since 1970. */
export function fullTime(micros) {
  const at = new Date(micros / 1000);
  const zone = new Date(at.getTime() - at.getTimezoneOffset() * 60000);
  return zone.toISOString().replace("T", " ").replace("Z", "");
}

let toastTimer = 0;

/** Says something for a moment; `bad` stays longer. */
export function toast(text, bad = false) {
  const place = byId("toast");
  place.textContent = visible(text.slice(0, 500));
  place.classList.toggle("bad", bad);
  place.hidden = false;
  // Shown anew it stands above a dialog that was opened since.
  if (place.matches(":popover-open")) place.hidePopover();
  place.showPopover();
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { place.hidePopover(); place.hidden = true; }, bad ? 8000 : 3000);
}
