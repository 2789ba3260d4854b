"""Each op in torch: slow, obviously right. What every compiled version is checked against."""
