"""Attention kernels of other packages over our pages, where they are installed and the case is theirs."""
