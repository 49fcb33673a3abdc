"""What an exported implicit model brings along: a transformers model in plain torch, without this package.

The modules are copied into the folder, so they import nothing but torch, transformers and each other.
"""
