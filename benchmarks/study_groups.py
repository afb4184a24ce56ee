"""Groups of queries over the shared corpus, for `wherefrom study`: held-out problems, facts of articles, and lines of plays.

    python benchmarks/study_groups.py --shared ../shared --out groups.jsonl
    wherefrom study INDEX --queries groups.jsonl --out study

Problems were not in training, and their answers are equations of theirs; facts and lines were, and their answers are the words themselves.
"""

import argparse
import json
import re
from pathlib import Path


def main() -> None:
    """Write the queries."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=10, help="Queries of each group.")
    arguments = parser.parse_args()
    queries = []
    for number, line in enumerate((arguments.shared / "data/gsm8k-questions.jsonl").read_text().strip().split("\n")):
        problem = json.loads(line)
        equations = re.findall(r"<<[^>]*>>", problem["completion"])
        if len(problem["prompt"]) + len(problem["completion"]) < 500 and len(equations) >= 2 and len(queries) < arguments.count:
            named = {"id": f"problem {number}", "group": "problems", "answers": [equations[-1]], "steps": equations[:-1]}
            queries.append({"prompt": problem["prompt"], "completion": problem["completion"], **named})
    documents = [json.loads(line) for line in (arguments.shared / "data/corpus.jsonl").read_text().strip().split("\n")]
    for source, group in (("wikitext", "facts"), ("shakespeare", "lines of plays")):
        own = [document for document in documents if document["source"] == source and len(document["text"]) > 200]
        for document in own[:: len(own) // arguments.count][: arguments.count]:
            words = document["text"].split(" ")
            prompt, said = " ".join(words[:12]), " " + " ".join(words[12:20])
            queries.append({"prompt": prompt, "completion": said, "id": document["id"], "group": group, "answers": [said]})
    arguments.out.write_text("".join(json.dumps(query) + "\n" for query in queries))


if __name__ == "__main__":
    main()
