"""The public operators: argument checks, one torch.library operator each, and its gradient."""
