"""Compile the Triton kernels for several GPUs, without a GPU, and report the compiler's output. No time is measured.

launch.py compiles the kernels of a call for a GPU. code.py reads the machine code. lif.py, wkv.py, spiking_wkv.py, mix.py and
pack.py hold the calls of each stem and the bytes that they must move. A stem is a group of kernels with one table. rows.py
turns launches into rows, and report.py checks and prints the rows.
"""
