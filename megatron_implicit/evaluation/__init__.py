"""What a trained model can do: held-out perplexity, and the paper's experiments (``studies``). May import everything
but ``training``'s session and ``tools``."""
