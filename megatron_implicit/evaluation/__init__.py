"""What a trained model can do: held-out perplexity. May import everything but ``training``'s session and ``tools``."""
