"""Tokenizers, indexed datasets and the order samples are read in.

Making datasets:

- ``corpus``, ``formats``: documents from .jsonl, .jsonl.zst, .jsonl.gz, .parquet and .txt files
- ``tokenizers``: the ``Tokenizer`` protocol, ``load_tokenizer``, ``train_sentencepiece``; ``byte_bpe``: a fast path
- ``indexed``, ``index_file``, ``manifest``, ``publishing``: NAME.bin, NAME.idx, NAME.json, written durably and opened
- ``preparation``: corpus files to datasets; ``shards``, ``workers``, ``team``: its work, processes and MPI ranks;
  ``progress``, ``merging``, ``summary``, ``verification``

Reading them:

- ``blend``: which datasets are read and how much of each; ``packing``: documents to samples of fixed length
- ``datasets``: ``open_datasets``: train, validation and test samples, split by random documents
- ``sampling``: ``MicrobatchSampler`` and batches
- ``tasks``: training data other than text
- ``inspection``: what is in a dataset or blend
- ``megatron``: the one place that imports Megatron-Core's dataset modules

Imports only ``config``, ``device``, ``comm`` and ``errors`` of the package.
"""
