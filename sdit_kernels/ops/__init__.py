"""The public ops: argument checks, and for each op a torch.library operator with its gradient."""
