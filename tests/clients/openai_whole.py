"""OpenAI's Python client: everything that comes whole, and errors."""

import openai
from checks import BASE_URL, ENDLESS, GOLDENS, MODEL, close_to_golden, messages, raised, run, same

client = openai.OpenAI(base_url=BASE_URL, api_key="any", max_retries=0)


def complete(prompt, **fields):
    return client.completions.create(**{"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 48, **fields})


def chat(given, **fields):
    return client.chat.completions.create(**{"model": MODEL, "messages": given, "temperature": 0, **fields})


def the_model_is_listed():
    models = client.models.list().data
    same([(model.id, model.object, model.owned_by) for model in models], [(MODEL, "model", "sirocco")])
    same(client.models.retrieve(MODEL), models[0])


def completions_are_the_goldens():
    for golden in GOLDENS:
        answer = complete(golden["prompt"], extra_body={"return_token_ids": True})
        choice = answer.choices[0]
        same((choice.text, choice.finish_reason), (golden["greedy_text"], "length"))
        same((choice.token_ids, choice.prompt_token_ids), (golden["greedy_ids"], golden["input_ids"]))
        same((answer.object, answer.model), ("text_completion", MODEL))
        tokens = len(golden["input_ids"])
        usage = answer.usage
        same((usage.prompt_tokens, usage.completion_tokens, usage.total_tokens), (tokens, 48, tokens + 48))


def a_prompt_has_four_forms():
    first, second = GOLDENS[0], GOLDENS[5]
    both = [first["greedy_text"], second["greedy_text"]]
    texts = lambda prompt: [choice.text for choice in complete(prompt).choices]
    same(texts(first["input_ids"]), both[:1])
    same(texts([first["prompt"], second["prompt"]]), both)
    same(texts([first["input_ids"], second["input_ids"]]), both)


def log_probabilities_are_the_goldens():
    golden = GOLDENS[1]
    logprobs = complete(golden["prompt"], logprobs=3, max_tokens=5).choices[0].logprobs
    same("".join(logprobs.tokens), "".join(chat_tokens := [entry.token for entry in chat_logprobs(golden)]))
    same(len(chat_tokens), 5)
    for step, top, own in zip(golden["top5"], logprobs.top_logprobs, logprobs.token_logprobs):
        close_to_golden(step, list(top.values()))
        same(own, max(top.values()))
    same(logprobs.text_offset[0], 0)


def chat_logprobs(golden):
    content = chat(messages(golden), logprobs=True, top_logprobs=3, max_completion_tokens=5).choices[0].logprobs.content
    for step, entry in zip(golden["top5"], content):
        close_to_golden(step, [top.logprob for top in entry.top_logprobs])
        same(bytes(entry.bytes).decode(), entry.token)
    return content


def echo_repeats_the_prompt():
    golden = GOLDENS[2]
    for prompt in (golden["prompt"], golden["input_ids"]):
        same(complete(prompt, echo=True).choices[0].text, golden["prompt"] + golden["greedy_text"])


def chats_are_the_goldens():
    for golden in GOLDENS:
        answer = chat(messages(golden), max_completion_tokens=48)
        message = answer.choices[0].message
        same((message.role, message.content, message.refusal), ("assistant", golden["greedy_text"], None))
        same((answer.object, answer.choices[0].finish_reason), ("chat.completion", "length"))
        assert answer.system_fingerprint.startswith("fp_"), answer


def text_parts_and_developers_are_understood():
    golden = GOLDENS[3]
    parts = [{"role": "developer", "content": [{"type": "text", "text": golden["prompt"]}]}]
    same(chat(parts, max_tokens=48).choices[0].message.content, golden["greedy_text"])


def a_seed_repeats_its_choices():
    def draw(seed):
        answer = chat(messages(GOLDENS[4]), temperature=1, seed=seed, n=3, max_tokens=24)
        same([choice.index for choice in answer.choices], [0, 1, 2])
        return [choice.message.content for choice in answer.choices]

    drawn = draw(7)
    same(draw(7), drawn)
    same(len(set(drawn)), 3)
    assert draw(8) != drawn


def stop_strings_end_it():
    golden = GOLDENS[6]
    text = golden["greedy_text"]
    for stop in (text[20:24], ["never said", text[20:24]]):
        choice = chat(messages(golden), stop=stop, max_tokens=48).choices[0]
        same((choice.message.content, choice.finish_reason), (text[: text.index(text[20:24])], "stop"))


def penalties_and_biases_change_the_words():
    golden = GOLDENS[0]
    say = lambda **fields: chat(messages(golden), max_tokens=48, **fields).choices[0].message.content
    same(say(), golden["greedy_text"])
    banned = {"logit_bias": {golden["greedy_ids"][0]: -100}}
    for fields in ({"presence_penalty": 2}, {"frequency_penalty": 2}, banned):
        assert say(**fields) != golden["greedy_text"], fields
    ended = chat(messages(golden), logit_bias={"2": 100}).choices[0]
    same((ended.message.content, ended.finish_reason), ("", "stop"))


def errors_are_the_clients_own():
    def check(kind, param, code, part, call, **fields):
        error = raised(kind, call, **fields)
        same((error.param, error.code, error.type), (param, code, "invalid_request_error"))
        assert part in error.message, error.message

    bad, missing = openai.BadRequestError, openai.NotFoundError
    completions, chats = client.completions.create, client.chat.completions.create
    given = messages(GOLDENS[0])
    check(bad, "temperature", None, "from 0 to 2", completions, model=MODEL, prompt="x", temperature=9)
    check(bad, "max_tokens", None, "at least 1", chats, model=MODEL, messages=given, max_tokens=0)
    check(bad, "messages[0].role", None, "wizard", chats, model=MODEL, messages=[{"role": "wizard"}])
    check(bad, "audio", "unsupported_parameter", "not supported", chats, model=MODEL, messages=given, audio={})
    check(missing, "model", "model_not_found", "gpt-9", completions, model="gpt-9", prompt="x")
    check(missing, "model", "model_not_found", "gpt-9", chats, model="gpt-9", messages=given)
    check(missing, "model", "model_not_found", "gpt-9", client.models.retrieve, model="gpt-9")
    check(missing, None, None, "/v1/embeddings", client.embeddings.create, model=MODEL, input="x")
    check(missing, None, None, "/v1/responses", client.responses.create, model=MODEL, input="x")


def a_client_that_runs_out_of_time_harms_nobody():
    impatient = client.with_options(timeout=0.2)
    raised(openai.APITimeoutError, impatient.completions.create, model=MODEL, prompt="x", **ENDLESS)
    same(complete("x", max_tokens=4).usage.completion_tokens, 4)


def request_ids_are_returned():
    raw = client.completions.with_raw_response
    mine = raw.create(model=MODEL, prompt="x", extra_headers={"x-request-id": "mine-1"})
    same((mine.headers["x-request-id"], mine.parse()._request_id), ("mine-1", "mine-1"))
    made = raw.create(model=MODEL, prompt="x").headers["x-request-id"]
    assert made and made != "mine-1", made
    error = raised(openai.BadRequestError, client.completions.create, model=MODEL, prompt="")
    assert error.request_id, error


run(
    the_model_is_listed,
    completions_are_the_goldens,
    a_prompt_has_four_forms,
    log_probabilities_are_the_goldens,
    echo_repeats_the_prompt,
    chats_are_the_goldens,
    text_parts_and_developers_are_understood,
    a_seed_repeats_its_choices,
    stop_strings_end_it,
    penalties_and_biases_change_the_words,
    errors_are_the_clients_own,
    a_client_that_runs_out_of_time_harms_nobody,
    request_ids_are_returned,
)
