"use strict";

// The page of a service: a question, the system at work, the answer, and its trace.

const $ = (id) => document.getElementById(id);
const page = { system: null, graph: null, running: null };
const DOING = {
  prefill: "reads",
  think: "thinks",
  send: "sends",
  write: "writes for others",
  decode: "writes the answer",
  ask: "asks a model behind an API",
  tools: "uses a tool",
};

async function start() {
  clearError();
  try {
    const names = await loadedModels();
    $("key-form").hidden = true;
    $("model").replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    if (names.length === 0) {
      throw new AnswerError("No system is loaded", "Load a bundle, then open this page again.");
    }
    await choose(names[0]);
  } catch (error) {
    show(error);
  }
}

async function choose(name) {
  const system = await systemOf(name);
  page.system = system;
  $("system-title").textContent = system.system;
  document.title = `${system.system} - recmas`;
  page.graph = drawGraph($("graph"), system, `The system ${system.system}`);
  $("progress").textContent =
    `${counted(system.agents.length, "agent")}, ${counted(system.rounds, "round")}`;
  $("fields").replaceChildren(...fieldInputs(system));
  const rounds = Array.from({ length: system.rounds }, (_, place) => place + 1);
  $("rounds").replaceChildren(...rounds.map((n) => el("option", { value: n }, String(n))));
  $("rounds").value = String(system.rounds);
  $("max-tokens").max = String(system.max_new_tokens);
  $("max-tokens").value = String(system.default_max_tokens);
  // Vectors of messages are read too, thoughts or not.
  const hasVectors =
    system.agents.some((agent) => agent.latent_steps > 0) ||
    system.links.some((link) => !["text", "cache"].includes(link.carries));
  $("thoughts-setting").hidden = $("thoughts").disabled = !hasVectors;
  $("send").disabled = $("model").disabled = false;
  $("answer").replaceChildren(el("p", { class: "empty" }, "The answer will stand here."));
  $("facts").textContent = "";
  $("trace-section").hidden = true;
}

/** Return a label and an input for the question, the system's message and each other field. */
function fieldInputs(system) {
  const filled = Object.keys(system.serve.fields);
  const asked = filled.filter((name) => system.serve.fields[name] === "last_user");
  const given = system.fields.filter((field) => !filled.includes(field.split("[")[0]));
  const places = [
    { name: asked[0] ?? "question", rows: 3, kind: "question" },
    ...given.map((name) => ({ name, rows: 3, kind: "field" })),
    ...filled
      .filter((name) => system.serve.fields[name] === "system")
      .map((name) => ({ name, rows: 2, kind: "system" })),
  ];
  return places.map(({ name, rows, kind }) => {
    const input = el("textarea", { id: `field-${name}`, name, rows, required: kind !== "system" });
    input.dataset.kind = kind;
    input.value = $(input.id)?.value ?? ""; // what was written for another system, or without a key
    const checkBlank = () => {
      const isBlank = input.required && input.value !== "" && input.value.trim() === "";
      input.setCustomValidity(isBlank ? "Write something here: there are only spaces." : "");
    };
    input.addEventListener("input", checkBlank);
    checkBlank();
    const words = name.replaceAll("_", " ");
    const label = words.charAt(0).toUpperCase() + words.slice(1);
    return el("div", { class: "field" }, el("label", { for: input.id }, label), input);
  });
}

/** Return the body of the request that the form asks for. */
function requestBody() {
  const inputs = [...$("fields").querySelectorAll("textarea")];
  const of = (kind) => inputs.filter((input) => input.dataset.kind === kind);
  const messages = [
    ...of("system").filter((input) => input.value.trim()).map(({ value }) => ({ role: "system", content: value })),
    ...of("question").map(({ value }) => ({ role: "user", content: value })),
  ];
  const record = {};
  for (const { name, value } of of("field")) {
    const [field, index] = name.split(/[[\]]/);
    if (index === undefined) {
      record[field] = value;
    } else {
      (record[field] ??= [])[Number(index)] = value;
    }
  }
  const recmas = { trace: true, thoughts: $("thoughts").disabled ? 0 : Number($("thoughts").value) };
  if (Object.keys(record).length > 0) {
    // Entries that no prompt shows must still be there.
    const whole = (value) => (Array.isArray(value) ? Array.from(value, (entry) => entry ?? "-") : value);
    recmas.record = Object.fromEntries(Object.entries(record).map(([k, v]) => [k, whole(v)]));
  }
  if (Number($("rounds").value) !== page.system.rounds) {
    recmas.rounds = Number($("rounds").value);
  }
  const body = { model: page.system.name, messages, recmas };
  const most = $("max-tokens").value;
  return most ? { ...body, max_tokens: Number(most) } : body;
}

async function run() {
  const abort = new AbortController();
  const run = { abort, steps: 0, round: 0, rounds: 0, start: performance.now(), doing: "waits", end: null };
  page.running = run;
  clearError();
  setRunning(true);
  page.graph.rest(true);
  const text = document.createTextNode("");
  $("answer").replaceChildren(text);
  $("facts").textContent = "";
  $("trace-section").hidden = true;
  say("Asked.");
  const ticks = setInterval(() => showProgress(run), 100);
  let trace = null;
  try {
    await ask(requestBody(), abort.signal, {
      step(step) {
        run.steps += 1;
        run.doing = `${named(step)} ${DOING[step.op] ?? step.op}`;
        if (step.round !== run.round) {
          [run.round, run.rounds] = [step.round, step.rounds];
          say(`Round ${step.round} of ${step.rounds}.`);
        }
        page.graph.step(step);
        showProgress(run);
      },
      text(piece) {
        text.appendData(piece);
      },
      trace(told) {
        trace = told;
      },
      end(reason, usage) {
        run.end = { reason: reason ?? run.end?.reason, usage: usage ?? run.end?.usage };
      },
    });
    run.doing = "done";
    $("facts").textContent = facts(run);
    say("The answer is whole.");
  } catch (error) {
    run.doing = abort.signal.aborted ? "stopped" : "failed";
    if (abort.signal.aborted) {
      $("facts").textContent = "You stopped this answer.";
      say("Stopped.");
    } else {
      show(error);
      say("There is no whole answer.");
    }
  } finally {
    clearInterval(ticks);
    showProgress(run);
    page.running = null;
    page.graph.rest(false);
    setRunning(false);
    if (trace !== null) {
      showTrace(trace);
    }
  }
}

function named({ op, agents }) {
  return (op === "send" ? agents.slice(0, 1) : agents).join(", ");
}

function showProgress(run) {
  const time = `${((performance.now() - run.start) / 1000).toFixed(1)} s`;
  const round = run.round ? `round ${run.round} of ${run.rounds}, ` : "";
  $("progress").textContent = `${round}${counted(run.steps, "step")}, ${time} \u00b7 ${run.doing}`;
}

function facts(run) {
  const usage = run.end?.usage ?? {};
  const latent = usage.completion_tokens_details?.latent_steps;
  const parts = [
    run.end?.reason === "length" ? "cut off at the most tokens" : null,
    usage.prompt_tokens ? counted(usage.prompt_tokens, "prompt token") : null,
    latent ? counted(latent, "latent step") : null,
    usage.completion_tokens ? counted(usage.completion_tokens, "answer token") : null,
    duration(performance.now() - run.start),
  ];
  return parts.filter(Boolean).join(" \u00b7 ");
}

function showTrace(trace) {
  const details = el("details", { id: "trace" }, $("trace").querySelector("summary"));
  whenOpened(details, () => details.append(traceView(trace)));
  $("trace").replaceWith(details);
  $("trace-section").hidden = false;
}

/** Swap the buttons; whoever has the focus on one gets it on the other. */
function setRunning(isRunning) {
  const [shown, hidden] = isRunning ? [$("stop"), $("send")] : [$("send"), $("stop")];
  const hadFocus = document.activeElement === hidden;
  shown.hidden = false;
  hidden.hidden = true;
  if (hadFocus) {
    shown.focus();
  }
  $("answer").setAttribute("aria-busy", String(isRunning));
  $("model").disabled = isRunning;
}

function show(error) {
  if (error.status === 401) {
    $("key-form").hidden = false;
    $("key").focus();
    if (!sessionStorage.getItem(KEY)) {
      return; // nobody gave a wrong one
    }
  }
  const told = error instanceof AnswerError ? error : new AnswerError("This page failed", String(error));
  $("error").replaceChildren(
    el(
      "div",
      { class: "error" },
      el("strong", {}, told.title),
      told.code ? el("code", { class: "code" }, told.code) : null,
      el("p", { dir: "auto" }, told.message)
    )
  );
}

function clearError() {
  $("error").replaceChildren();
}

function say(words) {
  $("status").textContent = words;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (page.running === null && page.system !== null) {
    run();
  }
});
$("stop").addEventListener("click", () => page.running?.abort.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    page.running?.abort.abort();
  } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && $("ask").contains(event.target)) {
    event.preventDefault();
    $("ask").requestSubmit($("send").hidden ? undefined : $("send"));
  }
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value);
  $("key").value = "";
  start().then(() => $("key-form").hidden && $("fields").querySelector("textarea")?.focus());
});
$("model").addEventListener("change", () => {
  clearError();
  choose($("model").value).catch(show);
});
start();
