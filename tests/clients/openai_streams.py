"""OpenAI's Python client: streams, many at the same time, and some that are left."""

import asyncio

import openai
from checks import BASE_URL, ENDLESS, GOLDENS, MODEL, close_to_golden, messages, raised, run, same

client = openai.OpenAI(base_url=BASE_URL, api_key="any", max_retries=0)


def joined(chunks):
    return "".join(choice.text for chunk in chunks for choice in chunk.choices)


def completions_come_in_pieces():
    for golden in GOLDENS:
        fields = {"model": MODEL, "prompt": golden["prompt"], "temperature": 0, "max_tokens": 48}
        chunks = list(client.completions.create(stream=True, logprobs=2, **fields))
        assert len(chunks) > 40, chunks
        same(joined(chunks), golden["greedy_text"])
        same([chunk.choices[0].finish_reason for chunk in chunks][-1], "length")
        same({chunk.id for chunk in chunks}, {chunks[0].id})
        tops = [top for chunk in chunks for top in chunk.choices[0].logprobs.top_logprobs]
        for step, top in zip(golden["top5"], tops):
            close_to_golden(step, list(top.values()))


def chats_come_in_pieces_and_say_their_usage():
    for golden in GOLDENS:
        fields = {"model": MODEL, "messages": messages(golden), "temperature": 0, "max_completion_tokens": 48}
        *chunks, last = client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **fields)
        same(chunks[0].choices[0].delta.role, "assistant")
        same("".join(chunk.choices[0].delta.content or "" for chunk in chunks), golden["greedy_text"])
        same(chunks[-1].choices[0].finish_reason, "length")
        same((last.choices, last.usage.completion_tokens), ([], 48))
        same(last.usage.prompt_tokens, len(golden["input_ids"]))
        same({chunk.usage for chunk in chunks}, {None})


def the_clients_own_accumulator_agrees():
    golden = GOLDENS[3]
    fields = {"model": MODEL, "messages": messages(golden), "temperature": 0, "max_completion_tokens": 48}
    try:
        with client.chat.completions.stream(**fields) as stream:
            texts = [event.delta for event in stream if event.type == "content.delta"]
            stream.get_final_completion()
    except openai.LengthFinishReasonError as error:
        # It insists on an end that is not for length; what it has gathered by then is the whole answer.
        choice = error.completion.choices[0]
        same((choice.message.content, choice.finish_reason), (golden["greedy_text"], "length"))
    else:
        same("".join(texts), golden["greedy_text"])


def choices_of_a_stream_keep_apart():
    fields = {"model": MODEL, "prompt": GOLDENS[0]["prompt"], "seed": 5, "n": 3, "max_tokens": 24}
    whole = client.completions.create(**fields)
    texts = ["", "", ""]
    for chunk in client.completions.create(stream=True, **fields):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    same(texts, [choice.text for choice in whole.choices])


def a_stream_that_is_left_makes_room():
    for _ in range(3):
        stream = client.completions.create(model=MODEL, prompt="x", stream=True, **ENDLESS)
        assert next(iter(stream)).choices
        stream.close()
    golden = GOLDENS[2]
    answer = client.completions.create(model=MODEL, prompt=golden["prompt"], temperature=0, max_tokens=48)
    same(answer.choices[0].text, golden["greedy_text"])


def sixteen_streams_at_the_same_time_change_no_byte():
    async def one(client, golden):
        fields = {"model": MODEL, "messages": messages(golden), "temperature": 0, "max_tokens": 48}
        stream = await client.chat.completions.create(stream=True, **fields)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them():
        goldens = (GOLDENS + GOLDENS)[:16]
        async with openai.AsyncOpenAI(base_url=BASE_URL, api_key="any", max_retries=0) as client:
            texts = await asyncio.gather(*(one(client, golden) for golden in goldens))
        same(texts, [golden["greedy_text"] for golden in goldens])

    asyncio.run(all_of_them())


def a_bad_request_is_refused_before_the_stream():
    fields = {"model": MODEL, "prompt": "x", "stream": True}
    error = raised(openai.BadRequestError, client.completions.create, top_p=2, **fields)
    same(error.param, "top_p")


run(
    completions_come_in_pieces,
    chats_come_in_pieces_and_say_their_usage,
    the_clients_own_accumulator_agrees,
    choices_of_a_stream_keep_apart,
    a_stream_that_is_left_makes_room,
    sixteen_streams_at_the_same_time_change_no_byte,
    a_bad_request_is_refused_before_the_stream,
)
