"""What the library is judged by. Nothing here imports ``sdit_kernels``, and nothing here changes with it.

``loops.py``: every op as loops in numpy float64, with gradients written out by hand.
``frozen_lif.py``, ``frozen_leaky.py``: the neurons in plain PyTorch, in the order of operations that every backend repeats.
``surrogates.py``: the surrogate derivatives that both use.
"""
