"""Many rounds on a CPU: does anything grow, slow down, compile again, or drift from the contract?

    python benchmarks/soak.py [--rounds 20000] [--json FILE]

The tiny model watches noise; tests/contract.py keeps the same stream in plain Python, and survivors and positions are
compared with the engine's state every thousand rounds and at the end.
"""

import argparse
import datetime
import json
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from contract import Contract  # noqa: E402

import svlm_jax  # noqa: E402
from svlm_jax.config import StreamConfig  # noqa: E402
from svlm_jax.demo.make_tiny import tiny_path  # noqa: E402
from svlm_jax.streaming.engine import Engine, make_spec  # noqa: E402
from svlm_jax.streaming.prompt import encode_query, encode_time, encode_words  # noqa: E402
from svlm_jax.streaming.visible import visible  # noqa: E402


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def compare(engine: Engine, contract: Contract) -> int:
    """Slots that hold what the contract says; AssertionError where they do not."""
    seen = visible(engine.state)
    assert seen.tokens.tolist() == contract.ids, "survivors differ from the contract"
    assert np.array_equal(seen.positions, np.array(contract.positions(), float)), "positions differ from the contract"
    return len(contract.ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.rounds < 1_000:
        parser.error("--rounds must be at least 1,000: rounds 500 to 1,000 are what the last ones are compared with")
    model = svlm_jax.load(tiny_path())
    config = StreamConfig(text_sink=64, text_sliding=64, vision_window=8, text_window=8, query="What is going on?", question_capacity=0)
    spec = make_spec(model.config, config, model.tokenizer, height=56, width=84)
    engine = Engine(model.params, spec, model.tokenizer)
    p, tokenizer = spec.prompt, model.tokenizer
    contract = Contract(p, config, spec.grid, Fraction(spec.temporal_step), tokenizer.encode("Time")[0])
    noise = np.random.default_rng(0).integers(0, 256, (64, 1, 2, 3, 56, 84), dtype=np.uint8)
    compilations = 0

    def listen(event: str, _: float, **__: object) -> None:
        nonlocal compilations
        compilations += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    milliseconds, memory, warm, checked = np.zeros(arguments.rounds), 0, 0, 0
    engine.open()
    for index in range(arguments.rounds):
        if index == 50:
            memory, warm = resident_bytes(), compilations
        span = (float(index), index + 1.0)
        if index:
            contract.evict()
        head = [*p.system, *p.previous_text_head, *encode_words(tokenizer, config.previous_text), *p.block_close] if not index else [p.newline]
        query = encode_query(tokenizer, config.query) if not index else ()
        contract.append_round(
            [*head, *p.user_head, *encode_time(tokenizer, *span), *spec.clip_tokens, *query, *p.block_close, *p.assistant_head]
        )
        start = time.perf_counter()
        tokens = engine.step(noise[index % 64], {0: span}).tokens()[0]
        milliseconds[index] = 1e3 * (time.perf_counter() - start)
        contract.close_turn(tokens)
        if index % 1000 == 49 or index == arguments.rounds - 1:
            # The last sampled token and the closing of a cut turn have not been run
            pending = contract.ids[contract.cached :]
            del contract.ids[contract.cached :]
            checked = compare(engine, contract)
            contract.ids += pending
            recent = np.median(milliseconds[max(0, index - 999) : index + 1])
            print(f"{index + 1:,} rounds: {recent:.2f} ms, contract holds, {resident_bytes() / 1e6:.1f} MB", flush=True)
    early = float(np.median(milliseconds[500:1000]))
    late = float(np.median(milliseconds[-500:]))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    record = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "commit": commit,
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
        "rounds": arguments.rounds,
        "compilations_after_warmup": compilations - warm,
        "round_ms_500_to_1000": early,
        "round_ms_last_500": late,
        "late_over_early": late / early,
        "host_memory_growth": resident_bytes() / memory - 1,
        "tokens_compared_at_the_end": checked,
        "largest_coordinate": int(np.abs(np.asarray(engine.state.coordinates)).max()),
    }
    print(json.dumps(record, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
