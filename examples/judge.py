"""An annotator of one's own, for the kind `command`: prefers the summary that takes more of its words from the post.

Reads the table of pairs and writes the table of preferences as JSON lines, so it needs nothing but Python.
`temper kinds --type Pairs` and `temper kinds --type Preferences` list the columns.
"""

import json
import os


def score(pair, side):
    words = pair[side + "_text"].lower().split()
    return sum(word in pair["prompt"].lower().split() for word in words) / max(1, len(words))


margin = json.loads(os.environ["TEMPER_PARAMS"])["margin"]
with open(os.path.join(os.environ["TEMPER_OUTPUT"], "preferences.jsonl"), "w", encoding="utf-8") as preferences:
    for folder in os.environ["TEMPER_INPUT_pairs"].splitlines():
        for line in open(os.path.join(folder, "pairs.jsonl"), encoding="utf-8"):
            pair = json.loads(line)
            a, b = score(pair, "a"), score(pair, "b")
            row = {name: pair[name] for name in ("id", "post_id", "prompt", "prompt_ids", "facts", "corruption")}
            for role, side in zip(("chosen", "rejected"), "ab" if a >= b else "ba"):
                row.update({f"{role}_{part}": pair[f"{side}_{part}"] for part in ("text", "ids", "ended")})
            row["outcome"] = "labelled" if abs(a - b) > margin else "tie"
            row["annotator"] = "judge.py"
            row["chosen_first"] = a >= b
            preferences.write(json.dumps(row) + "\n")
