"""What processes that tests fork have imported: it takes each of them seconds, and their collections of garbage leave it
out."""

import gc

import data_pipeline.curate.curation
import data_pipeline.tokenize.tokenization
import model.compression.funnel
import model.evaluation.harness
import model.training.trainer  # noqa: F401

gc.freeze()
