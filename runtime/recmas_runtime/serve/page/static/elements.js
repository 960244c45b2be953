"use strict";

// What models and files say becomes text nodes here and nowhere markup.

const SVG = "http://www.w3.org/2000/svg";

/** Return an element; children are elements or texts, null ones are left out. */
function el(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** Return an element of a drawing. */
function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(...children.flat().filter((child) => child !== null));
  return element;
}

function counted(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

function duration(ms) {
  if (ms >= 60000) {
    const seconds = Math.round(ms / 1000);
    return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  }
  if (ms >= 1000) {
    return `${(ms / 1000).toFixed(ms >= 10000 ? 1 : 2)} s`;
  }
  return `${ms >= 10 ? Math.round(ms) : ms.toFixed(1)} ms`;
}

/** Return a size with about three digits and a decimal unit. */
function byteSize(number) {
  const units = ["B", "kB", "MB", "GB"];
  let place = 0;
  for (; number >= 999.5 && place < units.length - 1; place += 1) {
    number /= 1000;
  }
  return `${place === 0 ? number : short(number)} ${units[place]}`;
}

/** Return a number with about as many digits as one can compare at a glance. */
function short(number) {
  return Math.abs(number) >= 1000 ? number.toFixed(0) : number.toPrecision(3);
}

const MARKS = { "\n": "\u21b5", "\r": "\u240d", "\t": "\u21e5", " ": "\u2423" };

/** Return a token as it can be seen: spaces at its ends, line ends and what steers text as marks. */
function tokenText(token) {
  if (!token.text) {
    return `#${token.id}`;
  }
  return token.text
    .replace(/^ +| +$/g, (spaces) => MARKS[" "].repeat(spaces.length))
    .replace(/[\n\r\t]/g, (character) => MARKS[character])
    .replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (character) =>
      `\\u{${character.codePointAt(0).toString(16)}}`
    );
}
