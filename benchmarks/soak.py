"""A long run of mixed requests on one loaded model: its memory stays flat, and every answer is a fresh process's answer.

    python benchmarks/soak.py build/tiny-llama --minutes 30 --json benchmarks/results/soak/today.json

Requests are drawn from a seed: prompts of one to a few hundred tokens, some that continue the one before (the cache then
keeps the common beginning), batches of up to five ragged rows, greedy and sampled with every setting, stop texts,
logprobs, requests that do not fit, and streams that the consumer leaves in the middle. Each is made twice: by the one process that lives all the time, and by
a new process that makes no other. The largest requests come first, so that memory that is kept for them is not growth. Tokens, texts, reasons and stops must be equal. The memory of the long-lived process is
read after each request; between the second and the last quarter of the run its median may grow by 4 MiB at most.

Exit code 1: an answer differed, or memory grew.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from processes import log, machine

import llama_export
from llama_export._system.process import resident_bytes
from llama_export.errors import ShapeError
from llama_export.runtime.sampling_params import SamplingParams

MAY_GROW = 4 << 20
"""Bytes."""
_FRESH = """
import json, sys
sys.path.insert(0, sys.argv[1])
import soak
request = json.loads(sys.stdin.read())
print(json.dumps(soak.answer(soak.open_model(sys.argv[2]), request)))
"""


def open_model(bundle: str) -> Any:
    """On one thread: sums then have one order whatever else the machine does."""
    return llama_export.load(bundle, backend="onnxruntime", threads=1)


def draw(rng: random.Random, words: list[str], before: str) -> dict[str, Any]:
    """A request: prompts, settings of each, and after how many pieces its consumer leaves."""
    batch = rng.choice([1, 1, 1, 2, 3, 5])
    prompts = [" ".join(rng.choices(words, k=rng.choice([1, 3, 10, 40, 120]))) for _ in range(batch)]
    if batch == 1 and before and rng.random() < 0.5:
        prompts = [before[:600] + prompts[0]]
    settings = []
    for _ in range(batch):
        one: dict[str, Any] = {"max_new_tokens": rng.choice([1, 2, 8, 24, 64]), "seed": rng.randrange(1 << 30)}
        if rng.random() < 0.7:
            one["temperature"] = rng.choice([0.3, 0.8, 1.5])
        for name, values in {
            "top_k": [1, 5, 50], "top_p": [0.2, 0.9], "min_p": [0.05, 0.5], "repetition_penalty": [1.1, 1.8],
            "presence_penalty": [0.5, -0.5], "frequency_penalty": [0.7], "logprobs": [0, 3], "stop": [["\\n"], ["e", "the"]],
            "stop_token_ids": [[5, 17]], "ignore_eos": [True],
        }.items():  # fmt: skip
            if rng.random() < 0.25:
                one[name] = rng.choice(values)
        settings.append(one)
    leave_after = rng.choice([0, 1, 5]) if batch == 1 and rng.random() < 0.3 else None
    return {"prompts": prompts, "settings": settings, "leave_after": leave_after}


def answer(llm: Any, request: dict[str, Any]) -> list[dict[str, Any]]:
    """What a model makes of a request: a refusal, or what must not depend on what was before, and ``reused_tokens``."""
    params = [SamplingParams(**one) for one in request["settings"]]
    try:
        if len(params) > 1:
            made = llm.complete(request["prompts"], params)
        else:
            with llm.generate(request["prompts"][0], params[0]) as pieces:
                for count, _ in enumerate(pieces):
                    if count == request["leave_after"]:
                        break
            made = [pieces.result]
    except ShapeError as err:
        return [{"refused": str(err), "text": "", "tokens": [], "reused_tokens": 0}]
    keys = ("text", "tokens", "finish_reason", "stop", "reused_tokens")
    return [{key: getattr(one, key) for key in keys} for one in made]


def main() -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    args = parser.parse_args()
    rng, llm = random.Random(args.seed), open_model(str(args.bundle))
    words = (Path(__file__).read_text(encoding="utf-8") + "naïve 你好 🙂").split()
    kinds = {
        "requests": 0,
        "batches": 0,
        "left early": 0,
        "with reused tokens": 0,
        "sampled": 0,
        "refused": 0,
        "tokens": 0,
    }
    differing: list[dict[str, Any]] = []
    memory: list[int] = []
    settings = {"max_new_tokens": 64, "ignore_eos": True, "temperature": 1.0, "logprobs": 3, "seed": 0}
    for batch in (1, 5):  # the largest requests first: what onnxruntime keeps for them is not growth
        answer(
            llm,
            {
                "prompts": [[1] * (llm.session.capacity - 64)] * batch,
                "settings": [settings] * batch,
                "leave_after": None,
            },
        )
    before, host, start = "", machine(), time.monotonic()
    while time.monotonic() - start < 60 * args.minutes:
        request = draw(rng, words, before)
        got = answer(llm, request)
        memory.append(resident_bytes() or 0)
        before = request["prompts"][0] + got[0]["text"] if len(got) == 1 else ""
        command = [sys.executable, "-c", _FRESH, str(Path(__file__).parent), str(args.bundle)]
        fresh = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=True)
        reused = [one.pop("reused_tokens") for one in got]
        want = [
            {key: value for key, value in one.items() if key != "reused_tokens"} for one in json.loads(fresh.stdout)
        ]
        if want != got:
            differing.append({"request": request, "got": got, "fresh": want})
        kinds["requests"] += 1
        kinds["batches"] += len(got) > 1
        kinds["left early"] += request["leave_after"] is not None
        kinds["with reused tokens"] += any(reused)
        kinds["sampled"] += any("temperature" in one for one in request["settings"])
        kinds["refused"] += "refused" in got[0]
        kinds["tokens"] += sum(len(one["tokens"]) for one in got)
        if kinds["requests"] % 100 == 0:
            log(f"{kinds['requests']} requests, {len(differing)} differ, {memory[-1] / 1e6:.1f} MB")
    quarter = max(1, len(memory) // 4)
    second, last = (statistics.median(part) for part in (memory[quarter : 2 * quarter] or memory, memory[-quarter:]))
    report = {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": host,
        "minutes": round((time.monotonic() - start) / 60, 1), "seed": args.seed, **kinds, "differing": differing,
        "resident_mb": {"second_quarter": round(second / 1e6, 2), "last_quarter": round(last / 1e6, 2), "max": round(max(memory) / 1e6, 2)},
        "ok": not differing and last - second <= MAY_GROW,
    }  # fmt: skip
    print(json.dumps({key: value for key, value in report.items() if key != "differing"}, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(not report["ok"])


if __name__ == "__main__":
    raise SystemExit(main())
