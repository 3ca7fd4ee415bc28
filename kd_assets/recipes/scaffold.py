"""`dg scaffold defs kd_assets.TeacherCaches my_teacher`: a recipe to begin with, each line of it explained.

It validates as it is written, and says what to change. Imported by the component that it writes a file of.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import BaseModel, Field

from kd_assets.errors import RecipeError

_RECIPE = """\
# A teacher and what is kept of it. All fields: `kd-assets fields`, and the docs of this component in the web UI.
type: {type_name}

attributes:
  # First part of every asset key, and the folder in the store (KD_HOME/store): one name, one project.
  recipe: {recipe}

  # A path is a file, a folder, a pattern or a URL; $NAME is a variable of the environment (KD_HOME is always set).
  # Records are texts ({{"text": ...}}), chats ({{"messages": [...]}}) or another common shape. In the place of `path`
  # may stand `dataset: {{name: ..., split: train}}`, a data set of the Hugging Face hub.
  sources:
    - name: texts
      path: {source}
      # Of the texts; one that is not known stops the plan.
      licence: {licence}

  # A shard is a partition: what one materialization makes, and what is made again when something of it changes.
  documents_per_shard: 1000

  teacher:
    # A model of the Hugging Face cache, or a folder (it may have $NAME, too). Safetensors only.
    model_id: {model_id}
    # Of the forward pass; logits are reduced in float32 whatever it is.
    dtype: bfloat16

  # One teacher load and one forward pass feed all of them. Leave out what you do not need. Documents are cut at the
  # longest max_length.
  caches:
    # The k most likely next tokens of each position, with true log-probabilities (draws: 50 adds random-sampling KD).
    topk: {{k: 16, max_length: 4096}}
    # Outputs of decoder blocks, counted from 0: 2 bytes a value, by far the largest of the three.
    # hidden_states: {{blocks: [16], max_length: 2048}}
    # Final hidden states pooled over each document.
    # embeddings: {{max_length: 4096}}

  # A small student that is trained for some steps, as proof that the caches teach.
  # student: {{steps: 60}}

  # What tasks ask for on a cluster (KD_SCHEDULER=slurm); what is left out is the cluster profile's word.
  # jobs:
  #   teacher:
  #     n_tasks: 4
  #     slurm: {{partition: gpu, gpus_per_node: 1, time: "12:00:00"}}
"""


class RecipeToBeginWith(BaseModel):
    """What `dg scaffold` can be told; all of it stands in the file and can be changed there."""

    model_id: str = Field(default="meta-llama/Llama-3.1-8B-Instruct", description="The teacher: a hub id, or a folder.")
    source: str = Field(default="$KD_HOME/data/*.jsonl", description="The texts: a file, a folder, a pattern or a URL.")
    licence: str = Field(default="CC-BY-4.0", description="The licence of the texts.")


class RecipeScaffolder(dg.Scaffolder[RecipeToBeginWith]):
    """Writes `defs.yaml` of a recipe that is called as its folder is."""

    @classmethod
    def get_scaffold_params(cls) -> type[RecipeToBeginWith]:
        return RecipeToBeginWith

    def scaffold(self, request: dg.ScaffoldRequest[RecipeToBeginWith]) -> None:
        """Raises RecipeError for a format that recipes are not written in, and for a name that no recipe can have."""
        if request.scaffold_format != "yaml":
            raise RecipeError("a recipe is a YAML file: leave --format out")
        folder = request.target_path.parent if request.append else request.target_path
        text = recipe_text(request.type_name, recipe_name(folder), request.params)
        if request.append:
            with request.target_path.open("a") as existing:
                existing.write("---\n" + text)
        else:
            (folder / "defs.yaml").write_text(text)


def recipe_name(folder: Path) -> str:
    """The name of a recipe in this folder: the folder's, in letters that a recipe's name can have."""
    name = re.sub(r"[^A-Za-z0-9_]", "_", folder.name)
    if not re.match(r"[A-Za-z]", name):
        raise RecipeError(f"a recipe cannot be called {folder.name!r}: begin with a letter")
    return name


def recipe_text(type_name: str, recipe: str, begin_with: RecipeToBeginWith) -> str:
    values: dict[str, Any] = begin_with.model_dump()
    return _RECIPE.format(type_name=type_name, recipe=recipe, **{name: json.dumps(v) for name, v in values.items()})
