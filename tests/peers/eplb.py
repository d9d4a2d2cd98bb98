#!/usr/bin/env python3
"""Compares `sirocco simulate` with DeepSeek's EPLB on the same loads and the same slots.

    python3 tests/peers/eplb.py --eplb FOLDER_OF_EPLB [--sirocco target/release/sirocco]

FOLDER_OF_EPLB holds the eplb.py of https://github.com/deepseek-ai/EPLB, which needs torch; nothing of it is copied here.
Both plan for loads, the loads drift by up to 10 % each, and both plan again: EPLB from scratch as it does, Sirocco from
its layout; replicas cost it no rent, because EPLB fills every slot too. An expert's replicas share its load equally for both. Balance is the mean over layers of the mean node's load
over the slowest one's; an expert is moved when a node that did not hold it in that layer does. Exits with 1 when Sirocco
is less balanced on any input, before or after the drift, by more than 0.00001, or does not move at least five times
fewer experts.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time

# nodes, groups, servers, and what a move costs Sirocco. EPLB is hierarchical when servers divide groups, else global. Its
# hierarchical plans are less balanced and move less, so there a move costs more.
CLUSTERS = [(144, 8, 18, 20), (144, 8, 8, 400), (32, 1, 32, 100), (32, 8, 4, 400)]
LAYERS, EXPERTS, EXTRA, DRIFT = 58, 256, 32, 0.10
FEWER_MOVES, TOLERANCE = 5, 1e-5


def skews(seed):
    """Loads by name, each [layers][experts] of whole numbers."""
    shuffled = lambda layer, rng: rng.sample(layer, len(layer))
    for exponent in (0.4, 0.8, 1.0, 1.2):
        rng = random.Random(f"zipf {exponent} {seed}")
        ranked = [int(1e8 / (rank + 1) ** exponent) for rank in range(EXPERTS)]
        yield f"zipf {exponent}", [shuffled(ranked, rng) for _ in range(LAYERS)]
    # measured-like: log-normal with a spread that grows with depth, as gates of trained models have
    rng = random.Random(f"lognormal {seed}")
    yield "lognormal", [
        [int(1e6 * rng.lognormvariate(0, 0.3 + 0.7 * layer / LAYERS)) for _ in range(EXPERTS)] for layer in range(LAYERS)
    ]


def drift(layers, seed):
    rng = random.Random(f"drift {seed}")
    return [[round(load * (1 + DRIFT * rng.uniform(-1, 1))) for load in layer] for layer in layers]


def balance(layers, plan, nodes):
    """`plan`: [layers] of {(node, expert): replicas of the expert on the node}."""
    ratios = []
    for loads, placed in zip(layers, plan):
        replicas = [0] * EXPERTS
        for (_, expert), count in placed.items():
            replicas[expert] += count
        assert min(replicas) > 0, "an expert has no node"
        times = [0.0] * nodes
        for (node, expert), count in placed.items():
            times[node] += loads[expert] * count / replicas[expert]
        ratios.append(sum(times) / nodes / max(times))
    return sum(ratios) / len(ratios)


def moved(before, after):
    return sum(len(new.keys() - old.keys()) for old, new in zip(before, after))


def plan_eplb(rebalance, layers, nodes, groups, servers):
    import torch

    weight = torch.tensor(layers)
    began = time.perf_counter()
    physical, _, _ = rebalance(weight, EXPERTS + EXTRA, groups, servers, nodes)
    took = time.perf_counter() - began
    slots = (EXPERTS + EXTRA) // nodes
    plan = []
    for experts in physical.tolist():
        placed = {}
        for slot, expert in enumerate(experts):
            key = (slot // slots, expert)
            placed[key] = placed.get(key, 0) + 1
        plan.append(placed)
    return plan, took


def plan_sirocco(sirocco, rounds, nodes, knobs):
    """The plan for each of `rounds`, every one from the one before."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(rounds, file)
        file.flush()
        flags = f"--shape deepseek-v3 --nodes {nodes} --extra-replicas {EXTRA} --drift 0 --rounds {len(rounds)}".split()
        command = [sirocco, "simulate", *flags, *knobs, "--loads", f"file:{file.name}", "--layout", "-o", "json"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SIROCCO_")}
        answer = json.loads(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)
    plans = []
    for found in answer:
        layers = [
            {(node, expert): 1 for expert, holders in enumerate(layer) for node in holders} for layer in found["layout"]
        ]
        assert all(len(layer) <= EXPERTS + EXTRA for layer in layers), "more replicas than slots"
        plans.append((layers, found["plan_ms"] / 1e3))
    return plans


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eplb", required=True, metavar="FOLDER", help="the folder of EPLB's eplb.py")
    parser.add_argument("--sirocco", default="target/release/sirocco", help="the sirocco command")
    parser.add_argument("--seeds", type=int, default=2, help="how many seeds of each load")
    args = parser.parse_args()
    sys.path.insert(0, args.eplb)
    from eplb import rebalance_experts

    head = ("nodes", "EPLB", "loads", "seed", "balance", "EPLB", "drifted", "EPLB", "moved", "EPLB", "fewer", "ms", "EPLB")
    line = "{:>5} {:>12} {:>10} {:>4}  {:>7} {:>7}  {:>7} {:>7}  {:>6} {:>6} {:>6}  {:>6} {:>6}"
    print(line.format(*head))
    failed = 0
    for nodes, groups, servers, move_cost in CLUSTERS:
        knobs = ["--move-cost", str(move_cost), "--replica-rent", "0"]
        policy = f"{groups}/{servers}" if groups % servers == 0 else "global"
        for seed in range(args.seeds):
            for name, first in skews(seed):
                second = drift(first, seed)
                (ours, ours_s), (ours_then, ours_then_s) = plan_sirocco(args.sirocco, [first, second], nodes, knobs)
                theirs, theirs_s = plan_eplb(rebalance_experts, first, nodes, groups, servers)
                theirs_then, theirs_then_s = plan_eplb(rebalance_experts, second, nodes, groups, servers)
                balances = [
                    balance(first, ours, nodes),
                    balance(first, theirs, nodes),
                    balance(second, ours_then, nodes),
                    balance(second, theirs_then, nodes),
                ]
                moves = moved(ours, ours_then), moved(theirs, theirs_then)
                fewer = moves[1] / max(moves[0], 1)
                gaps = balances[1] - balances[0], balances[3] - balances[2]
                below = max(gaps) > TOLERANCE or fewer < FEWER_MOVES
                failed += below
                times = [f"{1e3 * max(pair):.0f}" for pair in ((ours_s, ours_then_s), (theirs_s, theirs_then_s))]
                cells = [nodes, policy, name, seed, *(f"{value:.4f}" for value in balances), *moves, f"{fewer:.1f}x"]
                print(line.format(*cells, *times), "BELOW" if below else "", flush=True)
    print(f"{failed} inputs below" if failed else "at least as balanced, with five times fewer moves, on every input")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
