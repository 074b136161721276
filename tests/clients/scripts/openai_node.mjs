// The openai package for Node.
import OpenAI from "openai";
import { BASE_URL, MODEL, TEXT, check, end } from "./checks.mjs";

const client = new OpenAI({ baseURL: BASE_URL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: TEXT }];
const common = { model: MODEL, messages, temperature: 0 };

await check("chat, streamed", async () => {
  const stream = await client.chat.completions.create({ ...common, max_tokens: 24, stream: true });
  let text = "";
  for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
  if (!text) throw new Error("no text");
});
await check("runTools", async () => {
  let called = null;
  const runner = client.chat.completions.runTools({
    ...common,
    max_tokens: 200,
    tool_choice: { type: "function", function: { name: "find" } },
    tools: [{
      type: "function",
      function: {
        name: "find",
        description: "Finds a city.",
        parameters: {
          type: "object",
          properties: { name: { type: "string", maxLength: 8 } },
          required: ["name"],
          additionalProperties: false,
        },
        parse: JSON.parse,
        function: (found) => { called = found; return "found"; },
      },
    }],
  });
  await runner.done();
  if (typeof called?.name !== "string") throw new Error("the tool was not called");
});
await check("responses, streamed", async () => {
  const stream = await client.responses.create({
    model: MODEL, input: TEXT, max_output_tokens: 24, stream: true,
  });
  let last = null;
  for await (const event of stream) last = event;
  if (!["response.completed", "response.incomplete"].includes(last.type)) throw new Error(last.type);
});
end();
