"""The oracle: tests compare the library with it. It does not import ``sdit_kernels`` and does not change with it.

``loops.py``: every op as loops in numpy float64, with gradients written by hand.
``frozen_lif.py``, ``frozen_leaky.py``: the neurons in plain PyTorch, in the order of operations that every backend repeats.
``surrogates.py``: the surrogate derivatives that both use.
"""
