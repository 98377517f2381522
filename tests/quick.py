"""`python -m tests.quick MODULE ARGUMENTS`: a stage without the paper's tasks, whose sets take seconds to read, and
with little of the text that scorers learn from where the corpus has none."""

import runpy
import sys

from data_pipeline.annotate.quality import training_text
from model.evaluation import paper_tasks

paper_tasks.PAPER_TASKS = ()
training_text.INSTALLED_BYTES = 200_000
_, module, *sys.argv[1:] = sys.argv
runpy.run_module(module, run_name="__main__", alter_sys=True)
