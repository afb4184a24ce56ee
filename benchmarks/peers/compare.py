"""Wherefrom beside Bergson and LogIX; see README.md.

python benchmarks/peers/compare.py --model MODEL_DIR --data corpus.jsonl --peers peers/bin/python [--examples 1000] [--rounds 3]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

HERE = Path(__file__).parent
MAX_TOKENS = 256


def main():
    """Run all in turns, and print medians with their spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--peers", required=True, help="Python of the environment with both peers")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with open(args.data) as lines:
        documents = [json.loads(line)["text"] for line in lines]
    step = len(documents) // (args.examples + args.queries)
    ids = [tokenizer(text).input_ids[:MAX_TOKENS] for text in documents[::step]]
    ids = [example for example in ids if len(example) > 8]
    runs = {
        "Wherefrom, 800 bytes": [sys.executable, "wherefrom_run.py", "800 bytes"],
        "Wherefrom, rank 16": [sys.executable, "wherefrom_run.py", "rank 16"],
        "Bergson 2.5.1, rank 16": [args.peers, "bergson_run.py"],
        "LogIX 0.1.1, rank 16": [args.peers, "logix_run.py"],
    }
    results = {name: [] for name in runs}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as scratch:
        files = {"examples": ids[: args.examples], "queries": ids[args.examples : args.examples + args.queries]}
        for name, content in files.items():
            Path(scratch, name).write_text("".join(json.dumps(example) + "\n" for example in content))
        for number in range(args.rounds):
            for name, (python, script, *more) in runs.items():
                out = Path(scratch) / f"{len(results[name])}-{number}-{script.removesuffix('.py')}-{len(more and more[0])}"
                command = [python, str(HERE / script), args.model, f"{scratch}/examples", f"{scratch}/queries", str(out), *more]
                done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
                if done.returncode:
                    sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
                results[name].append(json.loads(done.stdout.splitlines()[-1]))
    table = {}
    for name, rounds in results.items():
        figures = {key: [one[key] for one in rounds] for key in rounds[0]}
        table[name] = {key: [round(f(values), 4) for f in (statistics.median, min, max)] for key, values in figures.items()}
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
