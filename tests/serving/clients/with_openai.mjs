// Usage: node with_openai.mjs URL KEY. What npm's `openai` makes of a server, as JSON.
import OpenAI from "openai";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 1, timeout: 30_000 });
const question = { model: "tiny", messages: [{ role: "user", content: "what 7" }] };
const told = {};

const chat = await client.chat.completions.create({ ...question, max_completion_tokens: 8 });
told.chat = chat.choices[0].message.content;
told.usage = chat.usage.total_tokens;

let text = "";
const options = { stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create({ ...question, ...options })) {
  text += chunk.choices[0]?.delta?.content ?? "";
  if (chunk.usage) told.stream_usage = chunk.usage.total_tokens;
}
told.stream = text;

const helper = client.chat.completions.stream({ ...question, recmas: {} });
told.helper = (await helper.finalChatCompletion()).choices[0].message.content;

const response = await client.responses.create({ model: "tiny", input: "what 7" });
told.response = response.output_text;
const kinds = [];
for await (const event of await client.responses.create({
  model: "tiny",
  input: "what 7",
  stream: true,
})) {
  kinds.push(event.type);
}
told.response_kinds = kinds;

told.models = (await client.models.list()).data.map((model) => model.id);
told.model = (await client.models.retrieve("team/tiny:v1")).id;
try {
  await client.chat.completions.create({ ...question, tools: [{ type: "function" }] });
} catch (error) {
  told.refused = [error.status, error.code, error.param];
}
console.log(JSON.stringify(told));
