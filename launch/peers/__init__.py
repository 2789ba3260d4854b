"""Decode attention of other projects beside ours: `pikv bench peers`. Each peer runs in a process and with packages of its own."""
