"""Two tasks of lm-evaluation-harness on local data: `choice`, by log-likelihood, and `write`, by generation."""

import json
from pathlib import Path
from typing import Any

COMMON = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
WRITE = """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["STOP"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def write_tasks(folder: Path, rows: list[dict[str, Any]], stop: str) -> None:
    """Rows have `question`, `choices` and the right one's number, `answer`; generation ends at the word `stop`."""
    data = folder / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    for name, kind in (("choice", CHOICE), ("write", WRITE.replace("STOP", stop))):
        (folder / f"{name}.yaml").write_text(COMMON.format(name=name, data=data) + kind)
