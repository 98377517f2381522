"""What processes that tests fork have imported, which takes seconds; their collections of garbage leave it out."""

import gc

import dvc.cli.parser
import dvc.repo  # noqa: F401
import networkx  # noqa: F401    # as DVC's graph does
import torch._dynamo  # noqa: F401    # as the first optimizer does

import data_pipeline.curate.curation
import data_pipeline.tokenize.tokenization  # noqa: F401
import model.compression.funnel
import model.evaluation.harness
import model.training.trainer  # noqa: F401

gc.freeze()
