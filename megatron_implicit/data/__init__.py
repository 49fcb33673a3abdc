"""Tokenizers, indexed datasets and the order samples are read in.

- ``tokenizers``: the ``Tokenizer`` protocol, ``load_tokenizer``, ``train_sentencepiece``
- ``corpus``: documents from .jsonl, .jsonl.zst, .jsonl.gz and .txt files
- ``indexed``: writing and opening NAME.bin / NAME.idx / NAME.json, ``dataset_fingerprint``
- ``preparation``: corpus files to an indexed dataset; ``progress``: its progress bar
- ``datasets``: ``open_datasets``: train, validation and test samples, split by random documents
- ``sampling``: ``MicrobatchSampler`` and batches
- ``megatron``: the one place that imports Megatron-Core's dataset modules

Imports only ``config``, ``device``, ``comm`` and ``errors`` of the package.
"""
