"""OpenAI's Python client against a router that runs one request and lets one more wait."""

from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Event

import openai
from checks import BASE_URL, ENDLESS, MODEL, run, same

client = openai.OpenAI(base_url=BASE_URL, api_key="any", max_retries=0)


def short(client):
    return client.completions.create(model=MODEL, prompt="x", max_tokens=4).usage.completion_tokens


def short_or_refused(client):
    try:
        return short(client)
    except openai.RateLimitError as error:
        return error


def a_full_queue_is_a_rate_limit_error_and_the_clients_retry_succeeds():
    running = client.completions.create(model=MODEL, prompt="x", stream=True, **ENDLESS)
    assert next(iter(running)).choices
    with ThreadPoolExecutor() as pool:
        calls = as_completed([pool.submit(short_or_refused, client) for _ in range(4)], timeout=30)
        # One of the four waits, whichever came first; the others are refused while it does.
        for error in (next(calls).result() for _ in range(3)):
            assert isinstance(error, openai.RateLimitError), error
            same((error.code, error.type), ("queue_full", "rate_limit_error"))
            same(error.response.headers["retry-after"], "1")
        was_refused = Event()
        note = lambda response: was_refused.set() if response.status_code == 429 else None
        http_client = openai.DefaultHttpxClient(event_hooks={"response": [note]})
        patient = openai.OpenAI(base_url=BASE_URL, api_key="any", max_retries=5, http_client=http_client)
        retried = pool.submit(short, patient)
        assert was_refused.wait(30), "the patient client was not refused"
        running.close()
        same(retried.result(30), 4)
        same(next(calls).result(), 4)


run(a_full_queue_is_a_rate_limit_error_and_the_clients_retry_succeeds)
