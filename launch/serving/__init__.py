"""`pikv serve`: rank 0 schedules, every rank runs its share of the requests in one packed forward per step, http/ answers clients."""
