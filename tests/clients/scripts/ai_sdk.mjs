// Vercel's AI SDK.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateText, streamText, tool } from "ai";
import { z } from "zod";
import { BASE_URL, MODEL, TEXT, check, end } from "./checks.mjs";

const provider = createOpenAICompatible({
  name: "longreach", baseURL: BASE_URL, apiKey: "none", supportsStructuredOutputs: true,
});
const common = { model: provider(MODEL), prompt: TEXT, temperature: 0, maxRetries: 0 };
const City = z.object({ name: z.string().max(8) });

await check("generateText", async () => {
  const { text } = await generateText({ ...common, maxOutputTokens: 24 });
  if (!text) throw new Error("no text");
});
await check("streamText", async () => {
  let text = "";
  for await (const part of streamText({ ...common, maxOutputTokens: 24 }).textStream) text += part;
  if (!text) throw new Error("no text");
});
await check("structured output", async () => {
  const { output } = await generateText({
    ...common, maxOutputTokens: 200, output: Output.object({ schema: City }),
  });
  City.parse(output);
});
await check("tools", async () => {
  const { toolCalls } = await generateText({
    ...common,
    maxOutputTokens: 200,
    tools: { find: tool({ description: "Finds a city.", inputSchema: City }) },
    toolChoice: "required",
  });
  if (toolCalls[0].toolName !== "find") throw new Error("not called");
});
end();
