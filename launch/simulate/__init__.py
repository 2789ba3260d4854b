"""`pikv plan --simulate`: a decode step on ranks that are not there. Counts are exact, times are lower bounds."""
