"""Tools and JSON of a schema, by the Python clients of OpenAI and Mistral and by LangChain. The bundled model knows neither, so
what comes is what was enforced."""

import json
from typing import Literal

import openai
from checks import BASE_URL, GOLDENS, HTTP, MODEL, messages, raised, run, same
from langchain_openai import ChatOpenAI
from mistralai.client import Mistral
from pydantic import BaseModel, ConfigDict

client = openai.OpenAI(base_url=BASE_URL, api_key="any", max_retries=0)
mistral = Mistral(api_key="any", server_url=f"http://{HTTP}", timeout_ms=60_000)
chain = ChatOpenAI(base_url=BASE_URL, api_key="any", model=MODEL, max_retries=0, temperature=1, seed=5, max_completion_tokens=200)


class Place(BaseModel):
    """Where to look."""

    model_config = ConfigDict(extra="forbid")
    where: Literal["up", "down"]
    often: bool


SCHEMA = Place.model_json_schema()
LOOK = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "look"}}
ASKED = {"model": MODEL, "messages": messages(GOLDENS[0]), "temperature": 1, "max_tokens": 200}


def draw(**fields):
    return client.chat.completions.create(**{**ASKED, "seed": 5, **fields}).choices[0]


def place(text):
    return Place.model_validate_json(text)


def a_model_of_pydantic_is_parsed():
    answer = client.chat.completions.parse(response_format=Place, seed=5, **ASKED)
    assert isinstance(answer.choices[0].message.parsed, Place), answer
    same(answer.choices[0].finish_reason, "stop")


def formats_are_enforced():
    schema = {"name": "place", "strict": True, "schema": SCHEMA}
    place(draw(response_format={"type": "json_schema", "json_schema": schema}).message.content)
    # Any object may be a long one.
    said = draw(response_format={"type": "json_object"})
    assert said.message.content.startswith("{"), said
    if said.finish_reason == "stop":
        assert isinstance(json.loads(said.message.content), dict)


def tools_are_called_whole_and_streamed_alike():
    for choice in ("required", NAMED):
        fields = {"tools": [LOOK], "tool_choice": choice, "parallel_tool_calls": False}
        said = draw(**fields)
        (call,) = said.message.tool_calls
        same((said.finish_reason, said.message.content, call.type, call.function.name), ("tool_calls", None, "function", "look"))
        place(call.function.arguments)
        with client.chat.completions.stream(seed=5, **ASKED, **fields) as stream:
            (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
        same((streamed.function.name, streamed.function.arguments), (call.function.name, call.function.arguments))


def results_of_tools_are_taken():
    (call,) = draw(tools=[LOOK], tool_choice=NAMED).message.tool_calls
    answered = [
        *ASKED["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "the sky"},
    ]
    said = draw(messages=answered, tools=[LOOK], tool_choice="none", max_tokens=8)
    assert said.message.content and said.message.tool_calls is None, said


def what_cannot_be_enforced_is_refused():
    missing = {"type": "function", "function": {"name": "leap"}}
    same(raised(openai.BadRequestError, draw, tools=[LOOK], tool_choice=missing).param, "tool_choice.function.name")
    schema = {"name": "odd", "strict": True, "schema": {"type": "odd"}}
    error = raised(openai.BadRequestError, draw, response_format={"type": "json_schema", "json_schema": schema})
    same(error.param, "response_format.json_schema.schema")
    same(raised(openai.BadRequestError, draw, extra_body={"functions": [LOOK["function"]]}).param, "functions")


def mistrals_client_gets_them_too():
    for choice in ("required", "any", NAMED):
        answer = mistral.chat.complete(random_seed=5, tools=[LOOK], tool_choice=choice, parallel_tool_calls=False, **ASKED)
        (call,) = answer.choices[0].message.tool_calls
        same((call.function.name, answer.choices[0].finish_reason), ("look", "tool_calls"))
        place(call.function.arguments)
    with mistral.chat.stream(random_seed=5, tools=[LOOK], tool_choice=NAMED, **ASKED) as stream:
        chunks = [event.data.choices[0] for event in stream]
    same(chunks[-1].finish_reason, "tool_calls")
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    place("".join(call.function.arguments for call in calls))
    assert isinstance(mistral.chat.parse(Place, random_seed=5, **ASKED).choices[0].message.parsed, Place)


def langchain_binds_tools_and_gives_structures():
    for method in ("json_schema", "function_calling"):
        assert isinstance(chain.with_structured_output(Place, method=method).invoke("The kernel"), Place), method
    (call,) = chain.bind_tools([LOOK], tool_choice="look").invoke("The kernel").tool_calls
    same(call["name"], "look")
    Place.model_validate(call["args"])


run(
    a_model_of_pydantic_is_parsed,
    formats_are_enforced,
    tools_are_called_whole_and_streamed_alike,
    results_of_tools_are_taken,
    what_cannot_be_enforced_is_refused,
    mistrals_client_gets_them_too,
    langchain_binds_tools_and_gives_structures,
)
