"""SDiT, the Spiking Diffusion Transformer (arXiv 2402.11588), over sdit_kernels. The model itself is still to come."""
