// What every Node script here begins with: where the endpoint is, and checks by name.
export const [BASE_URL, MODEL] = process.argv.slice(2);
export const TEXT = "The pass key is 4711. Remember it. What is the pass key?";

let failed = false;

export async function check(name, run) {
  try {
    await run();
    console.log(`ok ${name}`);
  } catch (error) {
    failed = true;
    console.log(`FAILED ${name}`);
    console.error(error);
  }
}

export function end() {
  process.exit(failed ? 1 : 0);
}
