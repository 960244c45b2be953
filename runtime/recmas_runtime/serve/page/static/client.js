"use strict";

// What the page asks of the service, over its public forms. Paths are relative, so that the page
// works behind a prefix too.

const KEY = "recmas-key";

/** Why there is no answer, in words: a title, what was said, and the code of the problem. */
class AnswerError extends Error {
  constructor(title, message, code = "", status = 0) {
    super(message);
    this.title = title;
    this.code = code;
    this.status = status;
  }
}

const TITLES = {
  400: "The question cannot be answered as it is",
  401: "The key is missing or wrong",
  403: "The service refuses this page",
  404: "There is no such system",
  408: "The question did not arrive in time",
  413: "The question is too long",
  421: "The service is not reached under this name",
  429: "The service has no room now",
  500: "The engine failed",
  503: "The service is not ready",
  504: "The answer took too long",
};

/** Send a request with the key, if there is one; whatever is no success is an AnswerError. */
async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    throw lost(error);
  }
  if (!response.ok) {
    throw await refusal(response);
  }
  return response;
}

function lost(error) {
  if (error.name === "AbortError" || error instanceof AnswerError) {
    return error;
  }
  return new AnswerError("The service cannot be reached", "Is it running? Ask again in a few seconds.");
}

async function refusal(response) {
  const title = TITLES[response.status] ?? `The service answers with status ${response.status}`;
  const body = await response.json().catch(() => null);
  const told = problem(body?.error);
  const wait = response.headers.get("Retry-After");
  const again = wait ? ` The service asks to wait ${counted(Number(wait), "second")}.` : "";
  return new AnswerError(title, `${told.message}${again}`, told.code, response.status);
}

/** Return message and code of an error object as OpenAI's form has it. */
function problem(error) {
  return { message: error?.message ?? "No reason was given.", code: error?.code ?? "" };
}

/** Yield the data of a stream of server-sent events, parsed; comments are left out. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for await (const line of linesOf(reader)) {
      if (line === "data: [DONE]") {
        return;
      }
      if (line.startsWith("data:")) {
        yield JSON.parse(line.slice(5));
      }
    }
    throw new AnswerError("The answer was cut off", "The connection ended before the answer did.");
  } finally {
    reader.cancel().catch(() => {}); // it has ended, or nobody reads the rest
  }
}

async function* linesOf(reader) {
  let parts = []; // of a line that is not whole: a trace may be long
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      throw lost(error);
    }
    if (read.done) {
      return;
    }
    const [first, ...others] = read.value.split("\n");
    parts.push(first);
    if (others.length > 0) {
      yield* [parts.join(""), ...others.slice(0, -1)].map((line) => line.replace(/\r$/, ""));
      parts = others.slice(-1);
    }
  }
}

async function loadedModels() {
  return (await (await request("v1/models")).json()).data.map((model) => model.id);
}

async function systemOf(model) {
  return (await request(`recmas/systems/${model.split("/").map(encodeURIComponent).join("/")}`)).json();
}

/** Ask, and call `on.step`, `on.text`, `on.trace` and `on.end` with what the stream says. */
async function ask(body, signal, on) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const chunk of events(response)) {
    if (chunk.error) {
      const told = problem(chunk.error);
      throw new AnswerError("The answer failed", told.message, told.code);
    }
    if (chunk.recmas?.step) {
      on.step(chunk.recmas.step);
    }
    if (chunk.recmas?.trace) {
      on.trace(chunk.recmas.trace);
    }
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) {
      on.text(choice.delta.content);
    }
    if (choice?.finish_reason || chunk.usage) {
      on.end(choice?.finish_reason ?? null, chunk.usage ?? null);
    }
  }
}
