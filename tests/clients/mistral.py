"""Mistral's Python client, with its own names of fields."""

from checks import GOLDENS, HTTP, MODEL, messages, raised, run, same
from mistralai.client import Mistral
from mistralai.client.errors import SDKError

client = Mistral(api_key="any", server_url=f"http://{HTTP}", timeout_ms=60_000)


def chat(golden, **fields):
    return client.chat.complete(**{"model": MODEL, "messages": messages(golden), "temperature": 0, **fields})


def the_model_is_listed():
    (model,) = client.models.list().data
    same((model.id, model.type, model.max_context_length), (MODEL, "base", 2048))
    assert model.capabilities.completion_chat, model
    same(client.models.retrieve(model_id=MODEL).id, MODEL)


def chats_are_the_goldens():
    for golden in GOLDENS:
        answer = chat(golden, max_tokens=48)
        choice = answer.choices[0]
        same((choice.message.role, choice.message.content), ("assistant", golden["greedy_text"]))
        same((choice.finish_reason, answer.object, answer.model), ("length", "chat.completion", MODEL))
        tokens = len(golden["input_ids"])
        usage = answer.usage
        same((usage.prompt_tokens, usage.completion_tokens, usage.total_tokens), (tokens, 48, tokens + 48))


def streams_are_the_goldens():
    for golden in GOLDENS:
        fields = {"model": MODEL, "messages": messages(golden), "temperature": 0, "max_tokens": 48}
        with client.chat.stream(**fields) as stream:
            chunks = [event.data for event in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        same(text, golden["greedy_text"])
        same((chunks[0].choices[0].delta.role, chunks[-1].choices[0].finish_reason), ("assistant", "length"))


def a_random_seed_repeats_its_choices():
    def draw(seed):
        choices = chat(GOLDENS[4], temperature=1, random_seed=seed, n=3, max_tokens=24).choices
        return [choice.message.content for choice in choices]

    drawn = draw(7)
    same(draw(7), drawn)
    same(len(set(drawn)), 3)
    assert draw(8) != drawn


def stops_and_penalties_are_followed():
    golden = GOLDENS[6]
    text = golden["greedy_text"]
    choice = chat(golden, stop=[text[20:24]], max_tokens=48).choices[0]
    same((choice.message.content, choice.finish_reason), (text[: text.index(text[20:24])], "stop"))
    for fields in ({"presence_penalty": 2}, {"frequency_penalty": 2}):
        assert chat(golden, max_tokens=48, **fields).choices[0].message.content != text, fields


def what_changes_no_answer_is_tolerated():
    golden = GOLDENS[7]
    prediction = {"type": "content", "content": "anything"}
    for fields in (
        {"prediction": prediction},
        {"safe_prompt": False},
        {"response_format": {"type": "text"}},
        {"tool_choice": "auto"},
        {"metadata": {"who": "me"}},
        {"parallel_tool_calls": True},
    ):
        same(chat(golden, max_tokens=48, **fields).choices[0].message.content, golden["greedy_text"])


def errors_name_the_field():
    def check(param, part, **fields):
        error = raised(SDKError, chat, GOLDENS[0], **fields)
        same(error.status_code, 404 if param == "model" else 400)
        assert f'"param":"{param}"' in error.body and part in error.body, error.body

    check("temperature", "from 0 to 2", temperature=3)
    check("model", "gpt-9", model="gpt-9")
    check("safe_prompt", "not supported", safe_prompt=True)
    check("prompt_mode", "not supported", prompt_mode="reasoning")
    check("random_seed", "64 bits", random_seed=2**64)


run(
    the_model_is_listed,
    chats_are_the_goldens,
    streams_are_the_goldens,
    a_random_seed_repeats_its_choices,
    stops_and_penalties_are_followed,
    what_changes_no_answer_is_tolerated,
    errors_name_the_field,
)
