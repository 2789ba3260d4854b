"""`pikv chat`: a conversation in a terminal with a model on one rank or several. Rank 0 is the process that was started."""
