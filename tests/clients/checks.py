"""What the scripts share: where the cluster is, what it must say, and how checks are run. Imports no client of a cluster.

    python SCRIPT.py HTTP_ADDRESS GRPC_ADDRESS GOLDENS

Each script is a public client as its registry has it, used as its own documentation says; tests/tests/e2e/clients starts them.
"""

import json
import sys

HTTP, GRPC = sys.argv[1:3]
BASE_URL = f"http://{HTTP}/v1"
MODEL = "demo"

with open(sys.argv[3]) as file:
    # What Hugging Face transformers makes of each prompt.
    GOLDENS = json.load(file)["prompts"]

# Goes on for as long as the context allows.
ENDLESS = {"max_tokens": 2000, "extra_body": {"ignore_eos": True}}


def same(given, expected):
    assert given == expected, f"\n{given!r} is not\n{expected!r}"


def messages(golden):
    """A conversation that the bundled model's chat template makes the prompt of."""
    return [{"role": "user", "content": golden["prompt"]}]


def raised(kind, call, *args, **fields):
    """The error of `kind` that the call must end with."""
    try:
        answer = call(*args, **fields)
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was expected for {fields}, not {answer!r}")


def close_to_golden(step, top):
    """Whether log probabilities `top` are those of the golden's logits at `step`: they differ from each other as these do."""
    values = step["values"][: len(top)]
    for logprob, logit in zip(sorted(top, reverse=True), values, strict=True):
        difference = (max(top) - logprob) - (values[0] - logit)
        assert abs(difference) < 1e-3, f"{top} is not {values}"


def run(*checks):
    """Runs all; the name of each is printed before, so that the last one is the one that failed."""
    for check in checks:
        print(check.__name__, flush=True)
        check()
    print(f"{len(checks)} checks passed")
