"""Formats of other programs: mapping of keys and shards, reading and writing of their folders.

Every format meets the others in the names of the paper's public implementation (``reference``). ``formats`` has a
module for each; ``stored`` is what they all read into and write from, tensor by tensor; ``tensor_files`` and
``tensor_writers`` are the files of Hugging Face folders; ``layout`` asks a model which tensors it has; ``convert``
goes from folder to folder, ``handing_on`` takes the tokenizer along, ``verify`` runs both sides; ``implicit_start``
makes an implicit model of an explicit one; ``remote_code`` is what an exported implicit model brings along; ``values``
checks those of a config.json; ``benchmark`` measures. May import everything below ``checkpoint`` in the import order,
and ``checkpoint``.
"""
