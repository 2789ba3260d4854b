"""What `python -m pikv_ds.launch.gpu_first_hour` runs on a GPU that has never seen this project."""
