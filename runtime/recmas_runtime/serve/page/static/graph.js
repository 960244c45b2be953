"use strict";

// The graph of a system: agents in layers by the order of steps, links with what they carry.
// Positions are along the way of the data (u) and across it (v); a drawing runs to the right, or
// down where that leaves more room.

const NODE_HEIGHT = 62;
const [NODE_WIDTH, NARROW_NODE_WIDTH, NARROW] = [152, 118, 420]; // in frames narrower than that
const BETWEEN = 18; // agents of a layer
const LANE = 26; // links that pass agents by
const LANE_TURNS = 4; // of neighbouring lanes, at different distances from agents
const [TURN, TURN_STEP] = [12, 5];
const MARGIN = 8;
const CORNER = 9;
const FEW_ROUNDS = 10;

const CARRIED = {
  thoughts: "thoughts",
  context: "context",
  written: "states",
  text: "text",
  cache: "cache rows",
};

/**
 * Draw a system into a container, again whenever its width changes.
 *
 * system: {agents: [{name, latent_steps, backbone}], links: [{source, target, carries, feedback}],
 * rounds, answer_agent}. Returns what shows a run on it.
 */
function drawGraph(container, system, label) {
  const run = { round: 0, op: "", active: new Set(), sent: new Set(), seen: new Map() };
  const layers = layersOf(system);
  const frame = el("div");
  let drawn = null;
  let width = 0;

  function draw() {
    if (frame.clientWidth === 0 || frame.clientWidth === width) {
      return;
    }
    width = frame.clientWidth;
    const node = { width: width < NARROW ? NARROW_NODE_WIDTH : NODE_WIDTH, height: NODE_HEIGHT };
    const [right, down] = [false, true].map((isDown) => placed(system, layers, node, isDown));
    const scale = (layout) => Math.min(1, width / layout.width);
    const layout = scale(right) >= Math.min(0.9, scale(down)) ? right : down;
    drawn = picture(system, layout, label);
    frame.replaceChildren(drawn.element);
    mark();
  }

  function mark() {
    if (drawn === null) {
      return;
    }
    for (const [name, node] of drawn.nodes) {
      node.box.classList.toggle("running", run.active.has(name));
      const rounds = run.seen.get(name) ?? new Set();
      node.pips.forEach((pip, place) => pip.classList.toggle("past", rounds.has(place + 1)));
    }
    for (const [link, group] of drawn.links) {
      group.classList.toggle("sending", run.sent.has(link));
    }
  }

  container.replaceChildren(frame);
  // In a frame of its own: drawing changes the height that is observed.
  new ResizeObserver(() => requestAnimationFrame(draw)).observe(frame);
  draw();
  return {
    /** Show a step that begins. */
    step({ op, round, agents }) {
      run.active = new Set(op === "send" ? agents.slice(0, 1) : agents);
      run.sent = new Set();
      if (op === "send") {
        agents.slice(1).forEach((target) => run.sent.add(linkId(agents[0], target)));
      }
      for (const agent of run.active) {
        run.seen.set(agent, (run.seen.get(agent) ?? new Set()).add(round));
      }
      mark();
    },
    /** Show that nothing runs; what ran stays marked unless it is forgotten. */
    rest(forget) {
      run.active = new Set();
      run.sent = new Set();
      if (forget) {
        run.seen = new Map();
      }
      mark();
    },
  };
}

function linkId(source, target) {
  return JSON.stringify([source, target]);
}

/** Return the layer of each agent: behind all whose messages it takes in the same round. */
function layersOf(system) {
  const layer = new Map(system.agents.map((agent) => [agent.name, 0]));
  const forward = system.links.filter((link) => !link.feedback && link.source !== link.target);
  for (let times = 0; times < system.agents.length; times += 1) {
    for (const { source, target } of forward) {
      layer.set(target, Math.max(layer.get(target), layer.get(source) + 1));
    }
  }
  return layer;
}

/** Return where agents and links lie. */
function placed(system, layer, node, isDown) {
  const [along, across] = isDown ? [node.height, node.width] : [node.width, node.height];
  const columns = [];
  for (const agent of system.agents) {
    (columns[layer.get(agent.name)] ??= []).push(agent.name);
  }
  const filledColumns = columns.filter((column) => column);
  const place = new Map();
  filledColumns.forEach((column, number) =>
    column.forEach((name, row) => place.set(name, { column: number, row, size: column.length }))
  );
  const lanes = laneOf(system.links, place);
  const numBefore = lanes.count.before;
  const numBehind = lanes.count.behind;
  const turns = Math.min(Math.max(numBefore, numBehind), LANE_TURNS);
  const side = turns > 0 ? TURN + turns * TURN_STEP : 0; // room for links to turn into their lanes
  const gap = (isDown ? 40 : node.width < NODE_WIDTH ? 70 : 88) + side;
  const tallest = Math.max(...filledColumns.map((column) => column.length));
  const core = tallest * across + (tallest - 1) * BETWEEN;
  const start = MARGIN + numBefore * LANE;
  const nodes = new Map();
  for (const [name, { column, row, size }] of place) {
    const height = size * across + (size - 1) * BETWEEN;
    nodes.set(name, {
      u: MARGIN + side + column * (along + gap),
      v: start + (core - height) / 2 + row * (across + BETWEEN),
    });
  }
  const laneAt = ({ where, number }) =>
    where === "before"
      ? start - LANE * (number + 0.5)
      : start + core + LANE * (number + 0.5) + (isDown ? 0 : 2);
  const links = system.links.map((link) => {
    const [from, to] = [nodes.get(link.source), nodes.get(link.target)];
    const lane = lanes.of.get(link);
    if (lane === undefined) {
      const [a, b] = [
        [from.u + along, from.v + across / 2],
        [to.u, to.v + across / 2],
      ];
      return { link, curve: [a, b], end: b, label: [(a[0] + b[0] - 8) / 2, (a[1] + b[1]) / 2] };
    }
    const shift = across * (lane.where === "before" ? 0.25 : 0.75);
    const step = TURN + (lane.number % LANE_TURNS) * TURN_STEP;
    const at = laneAt(lane);
    const [out, back] = [from.u + along + step, to.u - step - 4];
    const end = [to.u, to.v + shift];
    const corners = [
      [from.u + along, from.v + shift],
      [out, from.v + shift],
      [out, at],
      [back, at],
      [back, to.v + shift],
      end,
    ];
    return { link, corners, end, label: [(out + back) / 2, at], isOnLane: true };
  });
  const columnsLength = filledColumns.length * along + (filledColumns.length - 1) * gap;
  const length = columnsLength + 2 * (MARGIN + side);
  const breadth = start + core + numBehind * LANE + MARGIN;
  return {
    isDown,
    node,
    nodes,
    links,
    width: isDown ? breadth : length,
    height: isDown ? length : breadth,
  };
}

/**
 * Return a lane for each link that does not lead to the next layer. Links of one agent that carry
 * the same share a lane, and so do those that do not meet.
 */
function laneOf(links, place) {
  const groups = new Map();
  for (const link of links) {
    const [from, to] = [place.get(link.source).column, place.get(link.target).column];
    if (link.feedback || to - from !== 1) {
      const key = JSON.stringify([link.source, link.carries, link.feedback]);
      const group = groups.get(key) ?? groups.set(key, { links: [], ends: [] }).get(key);
      group.links.push(link);
      group.ends.push(from + 0.5, to - 0.5);
      group.where = link.feedback ? "behind" : "before";
    }
  }
  const of = new Map();
  const taken = { before: [], behind: [] };
  const reach = ({ ends }) => [Math.min(...ends), Math.max(...ends)];
  const length = (group) => reach(group)[1] - reach(group)[0];
  for (const group of [...groups.values()].sort((a, b) => length(a) - length(b))) {
    const [first, last] = reach(group);
    const lanes = taken[group.where];
    let number = lanes.findIndex((used) => used.every(([a, b]) => last < a || b < first));
    if (number < 0) {
      number = lanes.push([]) - 1;
    }
    lanes[number].push([first, last]);
    group.links.forEach((link) => of.set(link, { where: group.where, number }));
  }
  return { of, count: { before: taken.before.length, behind: taken.behind.length } };
}

/** Return the drawing, and its parts by name. */
function picture(system, layout, label) {
  const xy = ([u, v]) => (layout.isDown ? [v, u] : [u, v]);
  const text = (point) => xy(point).map((n) => n.toFixed(1)).join(" ");
  const element = svg("svg", {
    class: "graph",
    role: "img",
    "aria-label": `${label}. ${inWords(system)}`,
    viewBox: `0 0 ${layout.width} ${layout.height}`,
    width: layout.width,
    height: layout.height,
  });
  const links = new Map();
  const labels = [];
  const boxes = [];
  for (const { link, curve, corners, end, label: at, isOnLane } of layout.links) {
    const group = svg("g", { class: link.feedback ? "link feedback" : "link" });
    group.append(svg("title", {}, linkInWords(link)));
    group.append(svg("path", { d: curve ? curved(curve, text) : rounded(corners, text) }));
    const [u, v] = end;
    const head = [[u, v], [u - 8, v - 4], [u - 8, v + 4]].map(text).join(" L ");
    group.append(svg("path", { class: "head", d: `M ${head} Z` }));
    element.append(group);
    links.set(linkId(link.source, link.target), group);
    const carried = CARRIED[link.carries] ?? link.carries;
    const tag = labelled(carried, xy(at), layout.isDown && isOnLane);
    if (!boxes.some((box) => overlap(box, tag.box))) {
      boxes.push(tag.box);
      labels.push(tag.element);
    }
  }
  element.append(...labels);
  const nodes = new Map();
  for (const agent of system.agents) {
    const { u, v } = layout.nodes.get(agent.name);
    nodes.set(agent.name, nodeOf(system, agent, xy([u, v]), layout.node));
    element.append(nodes.get(agent.name).box);
  }
  return { element, nodes, links };
}

function nodeOf(system, agent, [x, y], { width, height }) {
  const isLast = agent.name === system.answer_agent;
  const box = svg("g", { class: isLast ? "agent answers" : "agent" });
  const middle = x + width / 2;
  const isLong = agent.name.length > width / 11;
  const name = cut(agent.name, Math.floor(width / (isLong ? 8 : 10)));
  const detail = agentDetail(agent, isLast && (width === NODE_WIDTH || agent.latent_steps === 0));
  box.append(
    svg("title", {}, agentInWords(agent, isLast)),
    svg("rect", { x, y, width, height, rx: 10 }),
    svg("text", { x: middle, y: y + 22, class: isLong ? "name long" : "name" }, name),
    svg("text", { x: middle, y: y + 38, class: "detail" }, detail)
  );
  const pips = [];
  if (system.rounds <= FEW_ROUNDS) {
    for (let round = 1; round <= system.rounds; round += 1) {
      const at = middle + (round - (system.rounds + 1) / 2) * 11;
      pips.push(svg("circle", { class: "pip", cx: at, cy: y + 51, r: 3.2 }));
    }
  }
  box.append(...pips);
  return { box, pips };
}

function agentDetail(agent, isLast) {
  const steps = agent.latent_steps ? counted(agent.latent_steps, "thought") : "";
  return [steps, isLast ? "answers" : ""].filter(Boolean).join(", ");
}

function agentInWords(agent, isLast) {
  const parts = [agent.backbone && `on ${agent.backbone}`, agentDetail(agent, isLast)];
  return [agent.name, ...parts.filter(Boolean)].join(", ");
}

function linkInWords(link) {
  const when = link.feedback ? ", in the next round" : "";
  return `${link.source} to ${link.target}: ${CARRIED[link.carries] ?? link.carries}${when}`;
}

function inWords(system) {
  const agents = system.agents.map((a) => agentInWords(a, a.name === system.answer_agent));
  const links = system.links.map(linkInWords);
  return `Agents: ${agents.join("; ")}. Links: ${links.join("; ") || "none"}.`;
}

function cut(text, most) {
  const characters = [...text];
  return characters.length > most ? `${characters.slice(0, most - 1).join("")}\u2026` : text;
}

function curved([a, b], text) {
  const bend = (b[0] - a[0]) / 2;
  const straight = [b[0] - 8, b[1]];
  return `M ${text(a)} C ${text([a[0] + bend, a[1]])} ${text([b[0] - bend, b[1]])} ${text(straight)}`;
}

/** Return a path of straight lines with round corners; it ends before its arrow's head. */
function rounded(corners, text) {
  const last = corners.length - 1;
  const parts = [`M ${text(corners[0])}`];
  for (let i = 1; i < last; i += 1) {
    parts.push(`L ${text(toward(corners[i], corners[i - 1]))}`);
    parts.push(`Q ${text(corners[i])} ${text(toward(corners[i], corners[i + 1]))}`);
  }
  parts.push(`L ${text([corners[last][0] - 8, corners[last][1]])}`);
  return parts.join(" ");
}

function toward([u, v], [toU, toV]) {
  const length = Math.hypot(toU - u, toV - v);
  const part = length === 0 ? 0 : Math.min(CORNER, length / 2) / length;
  return [u + (toU - u) * part, v + (toV - v) * part];
}

function labelled(words, [x, y], isTurned) {
  const [width, height] = [words.length * 6.2 + 8, 16];
  const group = svg("g", { class: "carried", transform: isTurned ? `rotate(-90 ${x} ${y})` : null });
  group.append(
    svg("rect", { x: x - width / 2, y: y - height / 2, width, height, rx: 4 }),
    svg("text", { x, y: y + 4 }, words)
  );
  const [w, h] = isTurned ? [height, width] : [width, height];
  return { element: group, box: [x - w / 2, y - h / 2, x + w / 2, y + h / 2] };
}

function overlap(a, b) {
  return a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
}

/** Return the system that a trace is of, as far as its steps tell. */
function systemOfTrace(trace) {
  const names = [];
  const links = new Map();
  const first = new Map();
  const vectors = new Set(trace.messages.map((message) => message.link));
  let rounds = 1;
  let answers = null;
  const depth = new Map(trace.thoughts.map((thought) => [thought.agent, 0]));
  trace.thoughts.forEach((t) => depth.set(t.agent, Math.max(depth.get(t.agent), t.step)));
  trace.steps.forEach(({ op, round, agents, handed_rows: rows }, place) => {
    rounds = Math.max(rounds, round);
    const acting = op === "send" ? agents.slice(0, 1) : agents;
    acting.filter((agent) => !names.includes(agent)).forEach((agent) => names.push(agent));
    acting.filter((agent) => !first.has(agent)).forEach((agent) => first.set(agent, place));
    // An ask is the last step where a model behind an API writes the answer.
    answers = ["decode", "ask"].includes(op) ? agents[0] : answers;
    for (const target of op === "send" ? agents.slice(1) : []) {
      const isVector = vectors.has(`${agents[0]}->${target}`);
      const carries = rows === undefined ? (isVector ? "vectors" : "text") : "cache";
      links.set(linkId(agents[0], target), { source: agents[0], target, carries });
    }
  });
  const known = [...links.values()].filter((link) => first.has(link.target));
  return {
    rounds,
    answer_agent: answers,
    agents: names.map((name) => ({ name, backbone: "", latent_steps: depth.get(name) ?? 0 })),
    links: known.map((link) => ({
      ...link,
      feedback: first.get(link.target) <= first.get(link.source),
    })),
  };
}
