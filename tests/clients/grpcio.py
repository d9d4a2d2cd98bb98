"""Python's grpcio with reflection, both versions of it: no .proto and no generated code of this project."""

from types import SimpleNamespace

import grpc
from checks import GOLDENS, GRPC, MODEL, raised, run, same
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

SERVICE = "sirocco.inference.v1.InferenceService"
channel = grpc.insecure_channel(GRPC)


class DatabaseV1(ProtoReflectionDescriptorDatabase):
    """The same by version 1, whose messages are those of v1alpha."""

    def __init__(self, channel):
        super().__init__(channel)
        ask = channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        self._stub = SimpleNamespace(ServerReflectionInfo=ask)


def service(database):
    """Every method of the service as a function, and its messages by name."""
    pool = DescriptorPool(database)
    methods = {}
    for method in pool.FindServiceByName(SERVICE).methods:
        request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        call = channel.unary_stream if method.server_streaming else channel.unary_unary
        stub = call(
            f"/{SERVICE}/{method.name}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        methods[method.name] = lambda stub=stub, request=request, **fields: stub(request(**fields), timeout=60)
    return methods


def check(database):
    assert {SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())
    call = service(database)
    same([model.name for model in call["ListModels"]().models], [MODEL])
    for golden in GOLDENS:
        ids, text = golden["input_ids"], golden["greedy_text"]
        same(list(call["Tokenize"](text=golden["prompt"]).ids), ids)
        for prompt in ({"text": golden["prompt"]}, {"token_ids": {"ids": ids}}):
            first, *tokens, last = call["Generate"](sampling={"temperature": 0}, max_tokens=48, **prompt)
            same((first.started.model, first.started.prompt_tokens), (MODEL, len(ids)))
            same([event.token.id for event in tokens], golden["greedy_ids"])
            same("".join(event.token.text for event in tokens) + last.finished.text, text)
            same((last.finished.usage.completion_tokens, last.finished.reason), (48, 2))
    same(call["Detokenize"](ids=golden["greedy_ids"]).text.strip(), golden["greedy_text"].strip())


def reflection_v1_is_enough_to_ask():
    check(DatabaseV1(channel))


def reflection_v1alpha_is_enough_to_ask():
    check(ProtoReflectionDescriptorDatabase(channel))


def errors_have_codes_and_name_the_field():
    generate = service(DatabaseV1(channel))["Generate"]
    error = raised(grpc.RpcError, lambda: list(generate(text="x", sampling={"temperature": 9})))
    same(error.code(), grpc.StatusCode.INVALID_ARGUMENT)
    assert "temperature" in error.details() and "from 0 to 2" in error.details(), error.details()
    error = raised(grpc.RpcError, lambda: list(generate(text="x", model="gpt-9")))
    same(error.code(), grpc.StatusCode.NOT_FOUND)


def a_call_that_is_cancelled_makes_room():
    generate = service(DatabaseV1(channel))["Generate"]
    for _ in range(3):
        events = generate(text="x", max_tokens=2000, ignore_eos=True)
        next(events)
        events.cancel()
    same(len(list(generate(text="x", max_tokens=4))), 6)


run(
    reflection_v1_is_enough_to_ask,
    reflection_v1alpha_is_enough_to_ask,
    errors_have_codes_and_name_the_field,
    a_call_that_is_cancelled_makes_room,
)
