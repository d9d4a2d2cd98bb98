"""LangChain over OpenAI's API: the chat model, the completion model, and embeddings, which are refused."""

import asyncio

import openai
from checks import BASE_URL, GOLDENS, MODEL, raised, run, same
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

settings = {"base_url": BASE_URL, "api_key": "any", "model": MODEL, "max_retries": 0}
model = ChatOpenAI(temperature=0, max_completion_tokens=48, **settings)


def an_invocation_is_the_golden():
    for golden in GOLDENS[:4]:
        answer = model.invoke([HumanMessage(golden["prompt"])])
        same(answer.content, golden["greedy_text"])
        same(answer.response_metadata["finish_reason"], "length")
        same((answer.usage_metadata["input_tokens"], answer.usage_metadata["output_tokens"]), (len(golden["input_ids"]), 48))


def a_stream_is_the_golden():
    golden = GOLDENS[4]
    chunks = list(model.stream(golden["prompt"]))
    assert len(chunks) > 40, chunks
    same("".join(chunk.content for chunk in chunks), golden["greedy_text"])


def a_batch_comes_in_order():
    answers = model.batch([golden["prompt"] for golden in GOLDENS])
    same([answer.content for answer in answers], [golden["greedy_text"] for golden in GOLDENS])


def a_stream_may_be_asynchronous():
    async def stream(golden):
        return "".join([chunk.content async for chunk in model.astream(golden["prompt"])])

    async def both():
        return await asyncio.gather(stream(GOLDENS[5]), stream(GOLDENS[6]))

    same(asyncio.run(both()), [golden["greedy_text"] for golden in GOLDENS[5:7]])


def log_probabilities_and_seeds_are_passed_on():
    answer = model.bind(logprobs=True, top_logprobs=2).invoke(GOLDENS[7]["prompt"])
    content = answer.response_metadata["logprobs"]["content"]
    same(("".join(entry["token"] for entry in content), len(content[0]["top_logprobs"])), (answer.content, 2))
    drawn = ChatOpenAI(temperature=1, seed=7, max_completion_tokens=24, **settings)
    same(drawn.invoke("The").content, drawn.invoke("The").content)
    assert drawn.invoke("The").content != drawn.bind(seed=8).invoke("The").content


def completions_are_the_goldens():
    completions = OpenAI(temperature=0, max_tokens=48, **settings)
    prompts, texts = ([golden[key] for golden in GOLDENS[:4]] for key in ("prompt", "greedy_text"))
    same([choices[0].text for choices in completions.generate(prompts).generations], texts)
    same("".join(completions.stream(prompts[0])), texts[0])


def what_is_not_served_is_refused():
    embeddings = OpenAIEmbeddings(check_embedding_ctx_length=False, **settings)
    error = raised(openai.NotFoundError, embeddings.embed_query, "x")
    assert "/v1/embeddings" in error.message, error.message
    error = raised(openai.BadRequestError, ChatOpenAI(temperature=9, **settings).invoke, "x")
    same(error.param, "temperature")


run(
    an_invocation_is_the_golden,
    a_stream_is_the_golden,
    a_batch_comes_in_order,
    a_stream_may_be_asynchronous,
    log_probabilities_and_seeds_are_passed_on,
    completions_are_the_goldens,
    what_is_not_served_is_refused,
)
