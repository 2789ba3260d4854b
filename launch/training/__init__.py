"""What `pikv train` does around the loop: data, engines, curves."""
