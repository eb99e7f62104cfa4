"""What the compilers make of the Triton kernels on GPUs that need not be there; compiler output, no time is measured.

launch.py compiles the kernels of a call for a GPU, code.py reads the machine code, lif.py, wkv.py, spiking_wkv.py and mix.py
hold the calls of each stem and the bytes that they must move, rows.py turns launches into rows, report.py checks and prints
them.
"""
