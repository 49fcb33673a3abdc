"use strict";
/* Numbers and times as people read them, small DOM helpers, and what numbers mean on hover. */

const DASH = "–";
const known = (value) => value !== null && value !== undefined && !Number.isNaN(value);

function short(value, digits = 3) {
  if (!known(value)) return DASH;
  const size = Math.abs(value);
  if (size === 0) return "0";
  for (const [factor, letter] of [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]])
    if (size >= factor) return trimmed((value / (letter === "k" ? 1e3 : factor)).toPrecision(digits)) + letter;
  if (size < 1e-3) return value.toExponential(1);
  return size >= 1000 ? Math.round(value).toLocaleString("en") : trimmed(value.toPrecision(digits));
}
const trimmed = (text) => (text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text);
const percent = (value) => (known(value) ? `${trimmed((100 * value).toPrecision(3))}%` : DASH);
const count = (value) => (known(value) ? Math.round(value).toLocaleString("en") : DASH);

function bytes(value) {
  if (!known(value)) return DASH;
  for (const unit of ["B", "KiB", "MiB", "GiB", "TiB"]) {
    if (Math.abs(value) < 1024 || unit === "TiB") return `${trimmed(value.toPrecision(3))} ${unit}`;
    value /= 1024;
  }
}

function span(seconds) {
  if (!known(seconds)) return DASH;
  if (seconds < 1) return `${Math.round(1000 * seconds)} ms`;
  if (seconds < 90) return `${trimmed(seconds.toPrecision(2))} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return `${hours} h ${minutes % 60} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}
const clock = (time) => (known(time) ? new Date(1000 * time).toLocaleString("sv").slice(0, 19) : DASH);

function inUnit(value, unit) {
  if (unit === "share") return percent(value);
  if (unit === "bytes") return bytes(value);
  if (unit === "s") return known(value) ? (value < 1 ? `${trimmed((1000 * value).toPrecision(3))} ms` : `${trimmed(value.toPrecision(3))} s`) : DASH;
  return short(value, 4);
}

/* element("td", {class: "n"}, "text", child) */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (known(value) && value !== false) made.setAttribute(key, value);
  }
  made.append(...children.filter(known));
  return made;
}
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

(function tips() {
  const tip = document.getElementById("tip");
  const move = (event) => {
    const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    const below = event.clientY + 18;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${below + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : below}px`;
  };
  document.addEventListener("mousemove", (event) => {
    const owner = event.target.closest ? event.target.closest("[data-tip]") : null;
    const text = owner && owner.getAttribute("data-tip");
    if (!text) { tip.hidden = true; return; }
    if (tip.textContent !== text) tip.textContent = text;
    tip.hidden = false;
    move(event);
  });
})();
