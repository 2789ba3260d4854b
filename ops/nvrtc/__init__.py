"""The CUDA kernels compiled at run time, through cupy."""
