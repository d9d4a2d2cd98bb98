// OpenAI's client for Node: chats and completions whole and streamed, streams that are left, and errors.
//
//     node openai_node.cjs HTTP_ADDRESS GRPC_ADDRESS GOLDENS

const assert = require("node:assert/strict");
const { readFileSync } = require("node:fs");
const OpenAI = require("openai");

const [http, , goldens] = process.argv.slice(2);
const GOLDENS = JSON.parse(readFileSync(goldens, "utf8")).prompts;
const MODEL = "demo";
const client = new OpenAI({ baseURL: `http://${http}/v1`, apiKey: "any", maxRetries: 0 });

const complete = (prompt, fields) =>
  client.completions.create({ model: MODEL, prompt, temperature: 0, max_tokens: 48, ...fields });
const chat = (golden, fields) => {
  const messages = [{ role: "user", content: golden.prompt }];
  return client.chat.completions.create({ model: MODEL, messages, temperature: 0, max_completion_tokens: 48, ...fields });
};

async function all(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

async function the_model_is_listed() {
  const models = await all(await client.models.list());
  assert.deepEqual(models.map((model) => [model.id, model.owned_by]), [[MODEL, "sirocco"]]);
  assert.deepEqual(await client.models.retrieve(MODEL), models[0]);
}

async function completions_are_the_goldens() {
  for (const golden of GOLDENS) {
    const whole = await complete(golden.prompt);
    assert.deepEqual([whole.choices[0].text, whole.choices[0].finish_reason], [golden.greedy_text, "length"]);
    assert.deepEqual([whole.usage.prompt_tokens, whole.usage.completion_tokens], [golden.input_ids.length, 48]);
    const chunks = await all(await complete(golden.input_ids, { stream: true }));
    assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), golden.greedy_text);
  }
}

async function chats_are_the_goldens() {
  for (const golden of GOLDENS) {
    const { message, finish_reason } = (await chat(golden)).choices[0];
    assert.deepEqual([message.role, message.content, finish_reason], ["assistant", golden.greedy_text, "length"]);
    const chunks = await all(await chat(golden, { stream: true, stream_options: { include_usage: true } }));
    const last = chunks.pop();
    assert.equal(chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join(""), golden.greedy_text);
    assert.deepEqual([last.choices, last.usage.completion_tokens], [[], 48]);
  }
}

async function the_clients_own_accumulator_agrees() {
  const golden = GOLDENS[3];
  const messages = [{ role: "user", content: golden.prompt }];
  const stream = client.chat.completions.stream({ model: MODEL, messages, temperature: 0, max_tokens: 48 });
  assert.equal(await stream.finalContent(), golden.greedy_text);
}

async function streams_at_the_same_time_change_no_byte() {
  const text = async (golden) => {
    const chunks = await all(await chat(golden, { stream: true }));
    return chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join("");
  };
  assert.deepEqual(await Promise.all(GOLDENS.map(text)), GOLDENS.map((golden) => golden.greedy_text));
}

async function a_stream_that_is_aborted_makes_room() {
  for (let left = 0; left < 3; left += 1) {
    const aborting = new AbortController();
    const body = { model: MODEL, prompt: "x", max_tokens: 2000, ignore_eos: true, stream: true };
    const stream = await client.completions.create(body, { signal: aborting.signal });
    let pieces = 0;
    for await (const chunk of stream) {
      assert.ok(chunk.choices);
      pieces += 1;
      if (pieces === 3) aborting.abort();
    }
    assert.ok(pieces < 1000, `${pieces} pieces came after all`);
  }
  assert.equal((await complete("x", { max_tokens: 4 })).usage.completion_tokens, 4);
}

async function errors_are_the_clients_own() {
  const check = async (kind, param, part, call) => {
    await assert.rejects(call, (error) => {
      assert.ok(error instanceof kind, error);
      assert.deepEqual([error.param, error.type], [param, "invalid_request_error"]);
      assert.ok(error.message.includes(part) && error.requestID, error.message);
      return true;
    });
  };
  await check(OpenAI.BadRequestError, "temperature", "from 0 to 2", () => complete("x", { temperature: 9 }));
  await check(OpenAI.BadRequestError, "top_p", "2", () => chat(GOLDENS[0], { top_p: 2, stream: true }));
  await check(OpenAI.NotFoundError, "model", "gpt-9", () => complete("x", { model: "gpt-9" }));
  await check(OpenAI.NotFoundError, null, "/v1/embeddings", () => client.embeddings.create({ model: MODEL, input: "x" }));
  const impatient = client.withOptions({ timeout: 200 });
  const endless = { model: MODEL, prompt: "x", max_tokens: 2000, ignore_eos: true };
  await assert.rejects(() => impatient.completions.create(endless), OpenAI.APIConnectionTimeoutError);
}

async function tools_are_called_and_json_is_of_its_schema() {
  const schema = {
    type: "object",
    properties: { where: { enum: ["up", "down"] } },
    required: ["where"],
    additionalProperties: false,
  };
  const drawn = { temperature: 1, seed: 5, max_completion_tokens: 200 };
  const json_schema = { name: "place", strict: true, schema };
  const said = await chat(GOLDENS[0], { ...drawn, response_format: { type: "json_schema", json_schema } });
  assert.ok(schema.properties.where.enum.includes(JSON.parse(said.choices[0].message.content).where), said);
  const tools = [{ type: "function", function: { name: "look", parameters: schema } }];
  const asked = { ...drawn, tools, tool_choice: { type: "function", function: { name: "look" } } };
  const { message, finish_reason } = (await chat(GOLDENS[0], asked)).choices[0];
  const call = message.tool_calls[0].function;
  assert.deepEqual([call.name, finish_reason, message.content], ["look", "tool_calls", null]);
  assert.ok(schema.properties.where.enum.includes(JSON.parse(call.arguments).where), call.arguments);
}

async function run(...checks) {
  for (const check of checks) {
    console.log(check.name);
    await check();
  }
  console.log(`${checks.length} checks passed`);
}

run(
  the_model_is_listed,
  completions_are_the_goldens,
  chats_are_the_goldens,
  the_clients_own_accumulator_agrees,
  streams_at_the_same_time_change_no_byte,
  a_stream_that_is_aborted_makes_room,
  errors_are_the_clients_own,
  tools_are_called_and_json_is_of_its_schema,
).catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
