// Usage: node with_ai.mjs URL KEY. What npm's `ai` with its providers makes of a server, as JSON.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const [baseURL, apiKey] = process.argv.slice(2);
const ours = createOpenAI({ baseURL, apiKey });
const compatible = createOpenAICompatible({ name: "recmas", baseURL, apiKey, includeUsage: true });
const told = {};
const models = {
  responses: ours("tiny"),
  chat: ours.chat("tiny"),
  compatible: compatible("tiny"),
};
for (const [name, model] of Object.entries(models)) {
  const whole = await generateText({ model, prompt: "what 7", maxRetries: 0 });
  const errors = [];
  const stream = streamText({
    model,
    system: "Be kind.",
    prompt: "what 3",
    maxRetries: 0,
    onError: ({ error }) => errors.push(String(error)),
  });
  let text = "";
  for await (const part of stream.textStream) text += part;
  const usage = await stream.usage;
  told[name] = {
    whole: whole.text,
    finish: whole.finishReason,
    total: whole.usage.totalTokens,
    stream: text,
    stream_total: usage.totalTokens,
    errors,
  };
}
try {
  await generateText({ model: ours.chat("tiny"), prompt: "what 7", topK: 3, maxRetries: 0,
    providerOptions: { openai: { logprobs: true } } });
} catch (error) {
  told.refused = [error.statusCode, JSON.parse(error.responseBody).error.param];
}
console.log(JSON.stringify(told));
