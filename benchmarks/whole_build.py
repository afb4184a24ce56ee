"""Time and memory of a whole build, compared with one plain pass of training over the same documents and with the estimate of `plan`.

    python benchmarks/whole_build.py --model MODEL_DIR --data corpus.jsonl [--documents 60 300] [--dtype bfloat16] [--rounds 3]

The plain pass is forward and backward with gradients of all weights, in this process, over the same batches, with one thread. The build is
a process of its own with one worker and one thread, from the start of Python to the search files. Both take turns. Given are the ratio of
their CPU seconds (the median, the least and the most); the peak of the build's own memory, which is not that of files, above the bytes of
the model; and the seconds that `wherefrom plan` predicts over those that the build took.

Then the index is asked about one of its texts, by `wherefrom query` and `wherefrom explain`, each a process of its own without a server.
Given are their CPU seconds over those of a process that loads the model with transformers and runs the text forward and backward, and
their memory as above.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from processes import run
from wherefrom.indexer.examples import TextConverter
from wherefrom.indexer.models import ModelSource, configure_memory, load_tokenizer
from wherefrom.indexer.tasks import CausalLM
from wherefrom.store.corpus import read_corpus
from wherefrom.store.documents import Example

_CONFIGURATIONS = {
    "head": ["-o", "components=head"],
    "800 bytes": ["--bytes-per-example", "800"],
    "2,400 bytes": ["--bytes-per-example", "2400"],
}
_CLI = "from wherefrom.cli import main; main()"
_PLAIN = "; ".join(
    (
        "import torch",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))",
        "ids = AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[3], return_tensors='pt')['input_ids']",
        "model(input_ids=ids, labels=ids).loss.backward()",
    )
)
_QUERY_ROUNDS = 5
_QUERY_COMMANDS = {"query": ["--no-rerank"], "explain": ["--example", "0"]}


def command(*arguments):
    """Run the command line in a process of its own; returns its output, CPU seconds and peak of memory (bytes)."""
    output, used, peak = run(_CLI, *arguments, OMP_NUM_THREADS="1")
    return output, used.ru_utime + used.ru_stime, peak


def plain_pass(task, model, examples, batch_tokens):
    """CPU seconds of one forward and backward pass over the examples with a gradient for every weight."""
    started = time.process_time()
    for _, batch in task.batches((model,), examples, batch_tokens):
        task.loss(model, batch).sum().backward()
        for parameter in model.parameters():
            parameter.grad = None
    return time.process_time() - started


def measure_queries(index, model, dtype, text, rounds):
    """Each one-shot command's CPU seconds over those of a plain pass over the text, round by round, and its peak of memory (bytes)."""
    ratios: dict[str, list[float]] = {name: [] for name in _QUERY_COMMANDS}
    peaks = dict.fromkeys(_QUERY_COMMANDS, 0)
    for _ in range(rounds):
        _, used, _ = run(_PLAIN, model, dtype, text, OMP_NUM_THREADS="1")
        for name, options in _QUERY_COMMANDS.items():
            _, seconds, peak = command(name, index, "--text", text, *options, "--json")
            ratios[name].append(seconds / (used.ru_utime + used.ru_stime))
            peaks[name] = max(peaks[name], peak)
    return {name: (ratios[name], peaks[name]) for name in _QUERY_COMMANDS}


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--configurations", nargs="+", default=list(_CONFIGURATIONS), choices=_CONFIGURATIONS)
    parser.add_argument("--documents", type=int, nargs="+", default=[60, 300])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-tokens", type=int, default=None, help="by default that of the build")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    configure_memory()
    source, task = ModelSource(args.model, dtype=args.dtype, device="cpu"), CausalLM()
    model = task.load(source).requires_grad_(True)
    batch_tokens = args.batch_tokens or task.default_batch_tokens((model,))
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    converter = TextConverter(load_tokenizer(source), task.context(model))
    folder = Path(tempfile.mkdtemp())
    with open(args.data) as lines:
        documents = list(lines)
    for count in args.documents:
        data = folder / f"{count}.jsonl"
        data.write_text("".join(documents[:: max(1, len(documents) // count)][:count]))
        examples = [e for e in converter.documents(read_corpus([str(data)])) if isinstance(e, Example)]
        for name in args.configurations:
            options = ["--model", args.model, "--data", data, "--dtype", args.dtype, "-o", f"batch_tokens={batch_tokens}"]
            plan = json.loads(command("plan", *options, *_CONFIGURATIONS[name], "--json")[0])
            ratios, peaks, predicted = [], [], []
            for round_ in range(args.rounds):
                times = {}
                for side in ("plain", "build") if round_ % 2 else ("build", "plain"):
                    if side == "plain":
                        times[side] = plain_pass(task, model, examples, batch_tokens)
                    else:
                        started = time.perf_counter()
                        _, times[side], peak = command("build", *options, *_CONFIGURATIONS[name], "--out", folder / "i.wherefrom")
                        predicted.append((plan["fit_seconds"] + plan["row_seconds"]) / (time.perf_counter() - started))
                        peaks.append(peak)
                ratios.append(times["build"] / times["plain"])
                if round_ + 1 < args.rounds:
                    shutil.rmtree(folder / "i.wherefrom")
            spread = f"{statistics.median(ratios):.2f} plain passes ({min(ratios):.2f} to {max(ratios):.2f})"
            memory = f"{(max(peaks) - model_bytes) / 2**20:,.0f} MiB above the model's {model_bytes / 2**20:,.0f}"
            print(
                f"{args.dtype} {count:>5} documents, {sum(e.tokens for e in examples):,} tokens, {name:>11}: {spread}; {memory}; "
                f"plan said {statistics.median(predicted):.2f} of the seconds",
                flush=True,
            )
            measured = measure_queries(folder / "i.wherefrom", args.model, args.dtype, examples[0].text, _QUERY_ROUNDS)
            for query, (query_ratios, peak) in measured.items():
                print(
                    f"{query}: {statistics.median(query_ratios):.2f} times a process that loads the model and runs the text "
                    f"({min(query_ratios):.2f} to {max(query_ratios):.2f}); {(peak - model_bytes) / 2**20:,.0f} MiB above the model's",
                    flush=True,
                )
            shutil.rmtree(folder / "i.wherefrom")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
