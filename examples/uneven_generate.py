"""Another number of prompts on every rank: torchrun --nproc-per-node 2 examples/uneven_generate.py [CHECKPOINT]"""

import os
import sys
from pathlib import Path

import transformers

import lockstep

STARTS = ("The import statement", "A class definition", "Names refer to", "The built-in function")

rank = int(os.environ.get("RANK", "0"))
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "small_moe"
tokenizer = transformers.AutoTokenizer.from_pretrained(path)
model = lockstep.from_pretrained(path, dtype="auto" if len(sys.argv) > 1 else "float32")

with lockstep.join(model):
    for start in STARTS[: 1 + 3 * rank]:
        output = model.generate(**tokenizer(start, return_tensors="pt"), max_new_tokens=40, do_sample=False)
        print(f"rank {rank}: {tokenizer.decode(output[0])!r}", flush=True)
