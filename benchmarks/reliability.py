"""Reliability of answers: which queries are doubted, and how many shown opponents have the right sign.

    python benchmarks/reliability.py INDEX --shared ../shared

INDEX is an index of the shared corpus under the shared model, with `-o hidden=true`. A sign is right if it is that of the exact row, which
has all tokens and coordinates and no codes.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from wherefrom import Client, Query

_UNLIKE = {
    "German": [
        "Der schnelle braune Fuchs springt über den faulen Hund und rennt davon.",
        "Wir haben gestern Abend lange über die Politik in Deutschland gesprochen.",
        "Das Wetter war am Montag sehr schön, aber kalt und windig.",
        "Bitte senden Sie mir die Unterlagen bis Freitag zurück.",
    ],
    "code": [
        "def f(x):\n    return [y**2 for y in range(x) if y % 2]",
        "for (int i=0;i<n;i++){ sum += a[i]*b[i]; }",
        "SELECT name, COUNT(*) FROM users GROUP BY name HAVING COUNT(*) > 3;",
        "import numpy as np\nx = np.zeros((3,4))\nprint(x.T @ x)",
    ],
}
_UNANSWERABLE = {
    "The capital of Mongolia is": " Ulaanbaatar",
    "The boiling point of tungsten is": " 5555 degrees",
    "The CEO of Nvidia is": " Jensen Huang",
    "CRISPR was discovered by": " Jennifer Doudna",
    "The password of the server is": " hunter2",
}
_ABOUT_THE_QUERY = ("does not expect", "as like this", "hidden state near", "nearly certain")


def main() -> None:
    """Ask, and print a table for each kind of query."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("index")
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--problems", type=int, default=60)
    arguments = parser.parse_args()
    client = Client(arguments.index)
    lines = (arguments.shared / "data/gsm8k-questions.jsonl").read_text().strip().split("\n")[: arguments.problems]
    problems = [json.loads(line) for line in lines]
    held_out = [Query(prompt=p["prompt"], completion=p["completion"][:300]) for p in problems]
    generator = np.random.default_rng(0)
    noise = ["".join(map(chr, generator.integers(33, 126, 80))) for _ in range(20)]
    odd = [Query(prompt=p["prompt"], completion=" zqx jv kkw wvq 77 xx ##") for p in problems[:20]]
    kinds = {
        "held-out problems": held_out,
        "facts that the corpus does not hold": [Query(prompt=prompt, completion=said) for prompt, said in _UNANSWERABLE.items()],
        **{name: [Query(text=text) for text in texts] for name, texts in _UNLIKE.items()},
        "random characters": [Query(text=text) for text in noise],
        "problems with a nonsense answer": odd,
    }
    print("| queries | number | doubted: what is asked | doubted: noise | doubted: kinds of score differ |")
    print("|---|---|---|---|---|")
    for name, queries in kinds.items():
        answers = client.query_many(queries, rerank=0)
        about = [any(sign in w for w in a.reliability.warnings for sign in _ABOUT_THE_QUERY) for a in answers]
        noisy = [any("two standard errors" in w for w in a.reliability.warnings) for a in answers]
        differ = [any("choice of the score" in w for w in a.reliability.warnings) for a in answers]
        print(f"| {name} | {len(queries)} | {np.mean(about):.0%} | {np.mean(noisy):.0%} | {np.mean(differ):.0%} |", flush=True)
    shown = {"stored rows": {"rerank": 0}, "by default": {}}
    for name, options in shown.items():
        right: dict[str, list[bool]] = {"proponents": [], "opponents": []}
        errors: list[bool] = []
        for query in held_out[:12]:
            answer = client.query(query, **options)
            for side, sign in (("proponents", 1), ("opponents", -1)):
                hits = getattr(answer, side)
                exact = client.recomputed_scores([query], [hit.row for hit in hits])[0]
                right[side] += (sign * exact > 0).tolist()
            errors += [hit.uncertain for hit in answer.opponents]
        shares = ", ".join(f"{side} {np.mean(values):.0%}" for side, values in right.items())
        print(f"{name}: right sign: {shares}; opponents within two standard errors of zero: {np.mean(errors):.0%}", flush=True)


if __name__ == "__main__":
    main()
