"""Formats of other programs: mapping of keys and shards, reading and writing of their folders.

``reference`` is the Hugging Face folder of the paper's public implementation (config.json + model.safetensors or
pytorch_model.bin). May import everything below ``checkpoint`` in the import order, and ``checkpoint``.
"""
