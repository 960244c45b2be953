"use strict";

// A report: records of a trace in a list that can be searched, and the trace of the one chosen.
// Each record lies in an element of its own and is parsed when it is looked at.

const index = JSON.parse(document.getElementById("index").textContent);
const list = document.getElementById("records");
const found = document.getElementById("found");
const detail = document.getElementById("record");

const entries = index.map((record, place) => {
  const link = el(
    "a",
    { href: `#${place + 1}` },
    el("bdi", { class: "record-id" }, String(record.id)),
    record.question ? el("bdi", { class: "record-text" }, record.question) : null
  );
  const text = [record.id, record.question, record.answer, record.error].join("\n").toLowerCase();
  return { item: el("li", {}, link), link, text };
});

function search(words) {
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const { item, text } of entries) {
    item.hidden = !wanted.every((word) => text.includes(word));
    count += item.hidden ? 0 : 1;
  }
  found.textContent = `${count} of ${counted(entries.length, "record")}`;
}

function open() {
  const place = Math.min(Math.max(Number(location.hash.slice(1)) || 1, 1), entries.length) - 1;
  entries.forEach(({ link }, number) => {
    if (number === place) {
      link.setAttribute("aria-current", "true");
    } else {
      link.removeAttribute("aria-current");
    }
  });
  const record = index[place];
  const trace = JSON.parse(document.getElementById(`trace-${place + 1}`).textContent);
  const frame = el("div", { class: "graph-frame" });
  detail.replaceChildren(
    el("h2", { id: "record-title", tabindex: "-1" }, "Record ", el("bdi", {}, String(record.id))),
    ...shown("Question", record.question),
    ...shown("Answer", record.answer),
    ...shown("Error", record.error),
    el("p", { class: "note" }, record.note),
    frame,
    traceView(trace)
  );
  const graph = drawGraph(frame, systemOfTrace(trace), "Agents of this record");
  trace.steps.forEach((step) => graph.step(step));
  graph.rest(false);
}

function shown(label, text) {
  return text ? [el("h3", {}, label), el("div", { class: "text", dir: "auto" }, text)] : [];
}

list.append(...entries.map(({ item }) => item));
document.getElementById("search").addEventListener("input", (event) => search(event.target.value));
window.addEventListener("hashchange", () => {
  open();
  document.getElementById("record-title").focus();
});
search("");
open();
