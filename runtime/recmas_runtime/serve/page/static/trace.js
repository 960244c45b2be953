"use strict";

// The trace of one answer: steps with their times, and by round and agent what was thought, written
// and sent. A trace is what a line of `trace.jsonl` holds: {steps, thoughts, messages}.

const PHASES = ["prefill", "think", "write", "send", "ask", "decode", "tools"];
const OPEN_THOUGHTS = 160; // more are opened one by one

const HEAD = { value: "head", label: "as the next token", unit: "probability" };
const FED_BACK = { value: "fed_back", label: "as it is fed back", unit: "cosine" };

let numTraces = 0; // radio buttons of one trace share a name

/** Return the view of a trace. */
function traceView(trace) {
  numTraces += 1;
  const view = el("div", { class: "trace" });
  const shown = { reading: HEAD.value, cards: [] };
  view.append(timeline(trace.steps));
  if (trace.thoughts.length > 0) {
    view.append(changes(trace.thoughts), choice(shown));
  } else {
    const none = trace.steps.some((step) => step.op === "think")
      ? "This trace has no thoughts in words: none were asked for."
      : "No agent thinks here: this trace has no thoughts.";
    view.append(el("p", { class: "note" }, none));
  }
  const isOpen = trace.thoughts.length + trace.messages.length <= OPEN_THOUGHTS;
  for (const [round, agents] of byRound(trace)) {
    const section = el("section", { class: "round" }, el("h3", {}, `Round ${round}`));
    for (const [name, part] of agents) {
      const card = agentCard(name, part, shown, isOpen);
      shown.cards.push(card);
      section.append(card.element);
    }
    view.append(section);
  }
  return view;
}

/** Return by round and agent: steps, thoughts, messages and texts, in the order of steps. */
function byRound(trace) {
  const rounds = new Map();
  const part = (round, agent) => {
    if (!rounds.has(round)) {
      rounds.set(round, new Map());
    }
    const agents = rounds.get(round);
    if (!agents.has(agent)) {
      agents.set(agent, { steps: [], thoughts: [], messages: new Map(), texts: [], calls: [] });
    }
    return agents.get(agent);
  };
  for (const step of trace.steps) {
    const acting = step.op === "send" ? step.agents.slice(0, 1) : step.agents;
    acting.forEach((agent, place) => {
      const own = part(step.round, agent);
      own.steps.push(step);
      own.texts.push(...(step.texts ?? []).slice(place, place + 1));
      own.calls.push(...(step.tool_calls ?? []));
    });
  }
  trace.thoughts.forEach((thought) => part(thought.round, thought.agent).thoughts.push(thought));
  for (const message of trace.messages) {
    const messages = part(message.round, message.link.split("->")[0]).messages;
    messages.set(message.link, [...(messages.get(message.link) ?? []), message.embedding]);
  }
  return [...rounds].sort(([a], [b]) => a - b);
}

function timeline(steps) {
  const rounds = new Map();
  const totals = new Map();
  for (const step of steps) {
    rounds.set(step.round, [...(rounds.get(step.round) ?? []), step]);
    totals.set(step.op, (totals.get(step.op) ?? 0) + step.ms);
  }
  const sum = (some) => some.reduce((total, step) => total + step.ms, 0);
  const longest = Math.max(...[...rounds.values()].map(sum), 0.001);
  const bars = el("div", { class: "bars", "aria-hidden": "true" });
  for (const [round, own] of rounds) {
    const bar = el("div", { class: "bar" });
    for (const step of own) {
      const title = `${step.op}, ${step.agents.join(", ")}: ${duration(step.ms)}`;
      const piece = el("span", { class: `piece ${phaseClass(step.op)}`, title });
      piece.style.flexGrow = String(step.ms);
      bar.append(piece);
    }
    bar.style.width = `${(100 * sum(own)) / longest}%`;
    const track = el("div", { class: "track" }, bar);
    bars.append(el("span", {}, `Round ${round}`), track, el("span", {}, duration(sum(own))));
  }
  const legend = el("ul", { class: "legend" });
  for (const op of PHASES.filter((phase) => totals.has(phase))) {
    const share = Math.round((100 * totals.get(op)) / Math.max(sum(steps), 0.001));
    const swatch = el("span", { class: `swatch ${phaseClass(op)}`, "aria-hidden": "true" });
    legend.append(el("li", {}, swatch, `${op} ${duration(totals.get(op))} (${share} %)`));
  }
  const summary = el("summary", {}, `All ${counted(steps.length, "step")}`);
  const table = el("details", { class: "steps" }, summary);
  whenOpened(table, () => table.append(stepTable(steps)));
  return el("section", { class: "times" }, el("h3", {}, "Time"), bars, legend, table);
}

function phaseClass(op) {
  return PHASES.includes(op) ? `phase-${op}` : "phase-other";
}

function stepTable(steps) {
  const head = ["Step", "Round", "What", "Agents", "Time", "Tokens"];
  const rows = steps.map((step, place) => {
    const [source, ...targets] = step.agents;
    const agents = step.op === "send" ? `${source} \u2192 ${targets.join(", ")}` : step.agents.join(", ");
    return [place + 1, step.round, step.op, agents, duration(step.ms), tokenCounts(step)];
  });
  return scrolled(
    "All steps",
    el(
      "table",
      {},
      el("thead", {}, el("tr", {}, head.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell) => el("td", {}, String(cell))))))
    )
  );
}

/** Return a wide table in a frame that scrolls by itself, also by the keyboard. */
function scrolled(label, table) {
  return el("div", { class: "scrolled", tabindex: "0", role: "region", "aria-label": label }, table);
}

function tokenCounts(step) {
  const parts = [
    [step.prefilled_tokens, "read"],
    [step.reused_tokens, "kept"],
    [step.written_tokens, "written"],
    [step.handed_rows, "rows handed over"],
    [(step.remote ?? []).reduce((sum, call) => sum + (call.prompt_tokens ?? 0), 0), "read elsewhere"],
    [(step.remote ?? []).reduce((sum, call) => sum + (call.completion_tokens ?? 0), 0), "written elsewhere"],
  ];
  return parts.filter(([count]) => count > 0).map(([n, what]) => `${n} ${what}`).join(", ");
}

/** Return a table of how near each agent's thoughts are to those of the round before. */
function changes(thoughts) {
  const cells = new Map();
  const rounds = new Set();
  for (const { agent, round, cosine_before: cosine } of thoughts) {
    if (cosine !== null) {
      rounds.add(round);
      const own = cells.get(agent) ?? cells.set(agent, new Map()).get(agent);
      own.set(round, [...(own.get(round) ?? []), cosine]);
    }
  }
  if (rounds.size === 0) {
    return el("p", { class: "note" }, "One round: there are no thoughts to compare with.");
  }
  const columns = [...rounds].sort((a, b) => a - b);
  const head = columns.map((round) => el("th", { scope: "col" }, `Round ${round}`));
  const body = [...cells].map(([agent, own]) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, el("bdi", {}, agent)),
      columns.map((round) => cosineCell(mean(own.get(round) ?? [])))
    )
  );
  return el(
    "section",
    {},
    el("h3", {}, "Change from round to round"),
    el("p", { class: "note" }, "Mean cosine of an agent's thoughts to those of the round before; 1 is no change."),
    scrolled(
      "Change from round to round",
      el(
        "table",
        { class: "changes" },
        el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Agent"), head)),
        el("tbody", {}, body)
      )
    )
  );
}

function mean(numbers) {
  return numbers.length ? numbers.reduce((sum, n) => sum + n, 0) / numbers.length : null;
}

function cosineCell(cosine) {
  return el("td", { class: "number" }, cosine === null ? "" : cosine.toFixed(3));
}

/** Return the choice between what a thought says next and what it is fed back as. */
function choice(shown) {
  const group = el("fieldset", { class: "choice" }, el("legend", {}, "Show thoughts"));
  for (const { value, label, unit } of [HEAD, FED_BACK]) {
    const input = el("input", { type: "radio", name: `reading-${numTraces}`, value });
    input.checked = value === shown.reading;
    input.addEventListener("change", () => {
      shown.reading = value;
      shown.cards.forEach((card) => card.refresh());
    });
    group.append(el("label", {}, input, ` ${label} (${unit})`));
  }
  return group;
}

function agentCard(name, part, shown, isOpen) {
  const facts = [
    part.thoughts.length ? counted(part.thoughts.length, "thought") : null,
    ...part.steps.filter((s) => s.op !== "send" || s.ms >= 1).map((s) => `${s.op} ${duration(s.ms)}`),
  ].filter(Boolean);
  const body = el("div", { class: "body" });
  const summary = el(
    "summary",
    {},
    el("bdi", { class: "agent-name" }, name),
    el("span", { class: "facts" }, facts.join(" \u00b7 "))
  );
  const rows = part.steps.filter((step) => step.handed_rows > 0);
  if (![part.thoughts, [...part.messages], part.texts, part.calls, rows].some((some) => some.length)) {
    return { element: el("div", { class: "card flat" }, [...summary.childNodes]), refresh() {} };
  }
  const element = el("details", { class: "card" }, summary, body);
  let isFilled = false;
  const fill = () => {
    isFilled = true;
    body.replaceChildren(...cardParts(name, part, shown.reading));
  };
  whenOpened(element, fill);
  element.open = isOpen;
  return {
    element,
    refresh() {
      if (isFilled) {
        fill();
      }
    },
  };
}

function cardParts(name, part, reading) {
  const parts = [];
  if (part.thoughts.length) {
    const vectors = part.thoughts.map((thought) => ({
      ...thought[reading],
      before: thought.cosine_before,
    }));
    parts.push(vectorTable(`Thoughts of ${name}`, vectors, true));
  }
  for (const text of part.texts) {
    parts.push(el("h4", {}, "Wrote"), el("blockquote", { dir: "auto" }, text || "(nothing)"));
  }
  const fedBack = JSON.stringify(part.thoughts.map((thought) => thought.fed_back));
  for (const [link, vectors] of part.messages) {
    const target = link.slice(link.indexOf("->") + 2);
    const isSame = JSON.stringify(vectors) === fedBack;
    const told = isSame ? "the thoughts as they were fed back" : counted(vectors.length, "vector");
    parts.push(el("h4", {}, "Sent to ", el("bdi", {}, target), `: ${told}`));
    if (!isSame) {
      parts.push(vectorTable(`Sent to ${target}`, vectors, false));
    }
  }
  for (const { agents, handed_rows: rows, handed_bytes: bytes } of part.steps) {
    if (rows > 0) {
      const targets = agents.slice(1).flatMap((name, i) => [i ? ", " : "", el("bdi", {}, name)]);
      const size = bytes ? ` (${byteSize(bytes)})` : "";
      parts.push(el("h4", {}, "Sent to ", ...targets, `: ${counted(rows, "cache row")}${size}`));
    }
  }
  for (const call of part.calls) {
    parts.push(
      el("h4", {}, "Called ", el("bdi", {}, String(call.name)), ` (${call.status})`),
      el("pre", { dir: "auto" }, String(call.argument)),
      el("pre", { dir: "auto" }, String(call.result))
    );
  }
  return parts;
}

/** Return a table with a row for each vector: norm, cosine to the round before, nearest tokens. */
function vectorTable(label, vectors, isThought) {
  const hasBefore = vectors.some((vector) => typeof vector.before === "number");
  const head = [
    el("th", { scope: "col" }, isThought ? "Step" : "Place"),
    el("th", { scope: "col" }, "Norm"),
    hasBefore ? el("th", { scope: "col", title: "cosine to the round before" }, "Before") : null,
    el("th", { scope: "col" }, "Nearest tokens"),
    el("th", { scope: "col", class: "wide", title: "mass of all other tokens" }, "Rest"),
  ];
  const rows = vectors.map((vector, place) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, String(place + 1)),
      el("td", { class: "number" }, short(vector.norm)),
      hasBefore ? cosineCell(vector.before ?? null) : null,
      el("td", {}, el("ol", { class: "tokens" }, vector.tokens.map(tokenItem))),
      el("td", { class: "number wide" }, vector.rest.toFixed(3))
    )
  );
  return scrolled(
    label,
    el(
      "table",
      { class: "vectors" },
      el("caption", { class: "unseen" }, label),
      el("thead", {}, el("tr", {}, head)),
      el("tbody", {}, rows)
    )
  );
}

function tokenItem(token) {
  const value = token.cosine ?? token.mass;
  const item = el(
    "li",
    { title: `token ${token.id}` },
    el("bdi", {}, tokenText(token)),
    el("span", { class: "value" }, value.toFixed(3))
  );
  item.style.setProperty("--part", `${Math.round(55 * Math.max(0, Math.min(1, value)))}%`);
  return item;
}

/** Call a function when a details element is opened for the first time. */
function whenOpened(details, fill) {
  let isFilled = false;
  details.addEventListener("toggle", () => {
    if (details.open && !isFilled) {
      isFilled = true;
      fill();
    }
  });
}
