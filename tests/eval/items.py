"""A few items for each of the nine benchmarks, in the columns of their datasets."""

import json

ITEMS = {
    "wikitext": [
        {"page": " \n = Sheep = \n \n The 1 @,@ 000 sheep , it is said , sleep . \n"},
        {"page": " \n = Weight = \n \n No word is worth the weight of a glance . \n"},
    ],
    "lambada_openai": [
        {"text": "attention may look at nothing when no word is worth the weight"},
        {"text": "no word is worth the weight of a glance"},
    ],
    "piqa": [
        {"goal": "look at nothing", "sol1": "close the eyes", "sol2": "weigh a word", "label": 0},
        {"goal": "weigh a word", "sol1": "look", "sol2": "use a scale", "label": 1},
    ],
    "hellaswag": [
        {
            "ind": 1,
            "activity_label": "Looking",
            "ctx_a": "a word looks up.",
            "ctx_b": "it",
            "ctx": "a word looks up. it",
            "endings": ["is worth it", "sleeps", "weighs nothing", "glances at a sheep"],
            "source_id": "made",
            "split": "val",
            "split_type": "indomain",
            "label": "3",
        }
    ],
    "winogrande": [
        {
            "sentence": "the word looked at the sheep since _ was light",
            "option1": "the word",
            "option2": "the sheep",
            "answer": "1",
        }
    ],
    "social_iqa": [
        {
            "context": "a word was looked at",
            "question": "how does it feel?",
            "answerA": "worth a glance",
            "answerB": "heavy",
            "answerC": "like nothing",
            "label": "1",
        }
    ],
    "boolq": [
        {
            "question": "is a word worth a glance",
            "passage": "Word -- no word is worth the weight of a glance.",
            "idx": 0,
            "label": 0,
        }
    ],
}
for _name in ("arc_easy", "arc_challenge"):
    ITEMS[_name] = [
        {
            "id": _name,
            "question": "what may attention look at?",
            "choices": {"text": ["nothing", "sheep", "words"], "label": ["A", "B", "C"]},
            "answerKey": "A",
        }
    ]


def write_items(folder, names=tuple(ITEMS)):
    """Writes TASK.jsonl for each name; returns the folder."""
    folder.mkdir(exist_ok=True)
    for name in names:
        lines = (json.dumps(item) + "\n" for item in ITEMS[name])
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder
