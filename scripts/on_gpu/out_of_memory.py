"""What a run says when the GPU's memory ends."""

from __future__ import annotations

from functools import partial

import torch

from flowtrain import train
from flowtrain.config.compose import train_config
from flowtrain.errors import FlowtrainError
from on_gpu.part import Part, Place, verdict

SHARE = 0.02  # of the GPU's memory that the process may use
WORDS = "model=glow dataset=synthetic dataset.image_size=32 model.hidden=1024 max_steps=2 compile=false".split()


def run(place: Place, words: list[str]) -> dict:
    """Train what does not fit."""
    place.need_gpu()
    torch.cuda.set_per_process_memory_fraction(SHARE)
    try:
        train.main(train_config(*WORDS, *words), str(place.folder))
    except FlowtrainError as error:
        text = str(error)
        return {"said": text, "passed": text.startswith("out of memory on ") and "\n" not in text}
    return {"said": "nothing: it fitted", "passed": False}


PART = Part(
    "out of memory",
    "What a run says that may use 2 % of the memory.",
    {
        "in a training step": partial(run, words=["batch_size=2048", "trainer.init_batch=8"]),
        "in the data-dependent start": partial(run, words=["batch_size=8", "trainer.init_batch=3276"]),
    },
    {"said": lambda row: row["said"], "passed": verdict},
    seconds=90,
    processes=2,
)
