// A page of another origin in a headless Chromium, which streams.
import { createServer } from "node:http";
import puppeteer from "puppeteer-core";
import { BASE_URL, MODEL, TEXT, check, end } from "./checks.mjs";

const [, , , , CHROMIUM, PORT] = process.argv;
const page = createServer((_, answer) => answer.end("<!doctype html><title>page</title>"));
await new Promise((done) => page.listen(Number(PORT), "127.0.0.1", done));
const browser = await puppeteer.launch({
  executablePath: CHROMIUM, args: ["--no-sandbox", "--disable-dev-shm-usage"],
});

async function inPage(run, ...given) {
  const tab = await browser.newPage();
  await tab.goto(`http://127.0.0.1:${PORT}/`);
  return tab.evaluate(run, ...given);
}

await check("a page of an allowed origin streams", async () => {
  const said = await inPage(async (url, model, text) => {
    const answer = await fetch(`${url}/chat/completions`, {
      method: "POST",
      headers: { "content-type": "application/json", authorization: "Bearer none" },
      body: JSON.stringify({
        // Long enough to come in several pieces, however fast it is.
        model, messages: [{ role: "user", content: text }], max_tokens: 200, ignore_eos: true,
        stream: true,
      }),
    });
    let pieces = 0;
    let all = "";
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      pieces += 1;
      all += part.value;
    }
    return { pieces, all, id: answer.headers.get("x-request-id") };
  }, BASE_URL, MODEL, TEXT);
  if (!said.all.endsWith("data: [DONE]\n\n") || said.pieces < 2 || !said.id) {
    throw new Error(JSON.stringify(said));
  }
});
await check("it can read an error", async () => {
  const status = await inPage(async (url) => {
    const answer = await fetch(`${url}/completions`, {
      method: "POST", headers: { "content-type": "application/json" }, body: '{"prompt": 3}',
    });
    return [answer.status, (await answer.json()).error.param];
  }, BASE_URL);
  if (status[0] !== 400 || status[1] !== "prompt") throw new Error(String(status));
});
await check("/docs shows the paths", async () => {
  const tab = await browser.newPage();
  const answer = await tab.goto(`${BASE_URL.replace("/v1", "")}/docs`);
  if (answer.status() !== 200) throw new Error(String(answer.status()));
});
await browser.close();
page.close();
end();
